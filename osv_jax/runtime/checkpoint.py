"""Checkpoints of a run: `workdir/checkpoints/<step>`, each complete or not there, and the configuration beside them."""

from __future__ import annotations

import json
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from osv_jax.errors import UserError
from osv_jax.runtime import paths
from osv_jax.runtime.paths import Path, in_bucket

# What every device holds can be written in slices, one by each. Orbax would do so with the smallest array, and cutting
# thousands of those stops a run for seconds at every save.
_MIN_SLICE_BYTES = 4 * 2**20

# The last file that Orbax writes of a checkpoint in a bucket.
_COMMITTED = "commit_success.txt"

# What Orbax and TensorStore raise about files that are damaged.
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError)

# What may differ from the run that wrote a workdir: it changes how long and where, not what is computed.
_INTERVALS = ("log_every", "checkpoint_every", "picture_every", "eval_every")
_OUTPUT = (*_INTERVALS, "evaluation", "preview_decoder", "keep_checkpoints")
_FREE_TO_CHANGE = ("num_steps", *_OUTPUT, "mesh", "data.num_workers")


def check_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """Compares the configuration with the one of the workdir's checkpoints, if there are any.

    Raises:
        UserError: naming the keys that differ, or when the folder cannot be written to or holds something else.
    """
    for folder in (workdir, *(workdir / name for name in ("checkpoints", "pictures", "tensorboard"))):
        if folder == workdir or folder.exists():
            paths.try_folder(folder, "--workdir")
    for name in ("config.json", "metrics.jsonl", "losses.png"):
        paths.check_file(workdir / name, "--workdir")
    if latest_step(workdir) is None:
        return  # Nothing that another configuration could spoil.
    file = workdir / "config.json"
    if not file.exists():
        raise UserError(f"{workdir} has checkpoints but no config.json; give another --workdir.")
    try:
        before = flatten_dict(json.loads(file.read_text()), sep=".", keep_empty_nodes=True)
    except (ValueError, AssertionError) as error:  # The second where it is no object.
        raise UserError(f"{file} is damaged; restore it, or give another --workdir.") from error
    now = flatten_dict(json.loads(json.dumps(config)), sep=".", keep_empty_nodes=True)
    differing = [
        f"{key} (was {before.get(key)!r}, is {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(f"{key}.".startswith(f"{free}.") for free in _FREE_TO_CHANGE)
    ]
    if differing:
        raise UserError(
            f"{workdir} was started with another configuration: {'; '.join(differing[:10])}. Use the same one to"
            " resume, or give another --workdir."
        )


def write_config(workdir: Path, config: dict[str, Any]) -> None:
    """Writes `config.json`, whole or not at all."""
    workdir.mkdir(parents=True, exist_ok=True)
    paths.write_text(workdir / "config.json", json.dumps(config, indent=2) + "\n")


def open_checkpoints(workdir: Path, keep: int) -> ocp.CheckpointManager:
    """Orbax's manager for the run's checkpoints; saves go on in the background.

    A save that was cut short lies under a temporary name, is never taken for a checkpoint, and is removed here.
    """
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(paths.absolute(workdir / "checkpoints"), options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any, data: dict[str, Any]) -> None:
    """Saves the state and the data position after `step` steps."""
    items = {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave(data)}
    checkpoints.save(step, args=ocp.args.Composite(**items))


def restore_data(checkpoints: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The data position of a checkpoint.

    Raises:
        UserError: see `restore_state`.
    """
    data = _restore(checkpoints, step, data=ocp.args.JsonRestore())["data"]
    kinds = {"position": int, "seed": int, "index_hash": str}
    if not (isinstance(data, dict) and all(type(data.get(name)) is kind for name, kind in kinds.items())):
        raise _damaged(checkpoints, step)
    return data


def restore_state(checkpoints: ocp.CheckpointManager, step: int, like: Any) -> Any:
    """The state of a checkpoint, each process reading its own shards.

    Args:
        like: the state's structure as `jax.ShapeDtypeStruct`s with shardings.

    Raises:
        UserError: when files of the checkpoint are missing or damaged.
    """
    return _restore(checkpoints, step, state=ocp.args.StandardRestore(like))["state"]


def _restore(checkpoints: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    try:
        return checkpoints.restore(step, args=ocp.args.Composite(**items))
    except DAMAGE as error:
        raise _damaged(checkpoints, step) from error


def _damaged(checkpoints: ocp.CheckpointManager, step: int) -> UserError:
    earlier = [s for s in checkpoints.all_steps() if s < step]
    fallback = f"to continue from step {max(earlier)}" if earlier else "and start again"
    return UserError(f"The checkpoint {checkpoints.directory / str(step)} is damaged; delete that folder {fallback}.")


def latest_step(workdir: Path) -> int | None:
    """The last complete checkpoint of a run, without opening it.

    One being written has another name, or in a bucket, where nothing can be renamed, lacks the file that Orbax ends
    with.
    """
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())
    if in_bucket(workdir):
        steps = [step for step in steps if (workdir / "checkpoints" / str(step) / _COMMITTED).exists()]
    return max(steps, default=None)


def stored_shapes(workdir: Path, step: int) -> dict[str, Any]:
    """What a checkpoint's state holds: nested dicts, the leaves having a `shape`.

    Raises:
        UserError: when it cannot be read.
    """
    folder = paths.absolute(workdir / "checkpoints" / str(step) / "state")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            return dict(checkpointer.metadata(folder).item_metadata.tree)
        except DAMAGE as error:
            raise UserError(f"The checkpoint {folder.parent} is damaged; restore it from a copy.") from error


def restore_parts(workdir: Path, step: int, like: Any) -> Any:
    """Some parts of another run's state, each process reading its own shards.

    Args:
        like: nested dicts with the wanted leaves, which give shapes, dtypes and shardings.

    Raises:
        UserError: when the checkpoint lacks one of them, has it in another shape, or cannot be read.
    """
    stored, wanted = flatten_dict(stored_shapes(workdir, step)), flatten_dict(like)
    wrong = [
        f"{'/'.join(path)} is {tuple(stored[path].shape) if path in stored else 'missing'}, not {leaf.shape}"
        for path, leaf in wanted.items()
        if path not in stored or tuple(stored[path].shape) != leaf.shape
    ]
    if wrong:
        raise UserError(
            f"The checkpoint of step {step} in {workdir} does not fit this run: {'; '.join(wrong[:10])}"
            f" ({len(wrong)} in all); use the configuration it was trained with."
        )
    folder = paths.absolute(workdir / "checkpoints" / str(step) / "state")
    restore = ocp.checkpoint_utils.construct_restore_args(like)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            arguments = ocp.args.PyTreeRestore(item=like, restore_args=restore, partial_restore=True)
            return checkpointer.restore(folder, args=arguments)
        except DAMAGE as error:
            raise UserError(f"The checkpoint {folder.parent} is damaged; restore it from a copy.") from error


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a tree."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
