"""Our own weights folder, `<folder>/<component>/{config.json, params}`: what the importers write and programs load.

`params` is an Orbax checkpoint of the bare parameter tree; config.json holds our architecture config under `config`,
and where the weights came from. A folder to load from may be in a bucket (`gs://...`). Weights that come with the
package have `params.safetensors` instead, one small file; their folder is called `miniature`. A folder whose UNet was
trained here also says on what clips, in `video.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from osv_jax.convert.architectures import ARCHITECTURES, Config, expected_params, make_config
from osv_jax.convert.json_files import read_json
from osv_jax.convert.readers import open_weights, read_floats
from osv_jax.errors import UserError
from osv_jax.runtime import paths
from osv_jax.runtime.checkpoint import DAMAGE
from osv_jax.runtime.finite import check_finite
from osv_jax.runtime.paths import Path, as_path
from osv_jax.runtime.ranges import FPS, NUM_FRAMES, PIXELS

FORMAT = 1
MINIATURE = "miniature"
_PACKED = "params.safetensors"
_VIDEO = "video.json"
_VIDEO_RANGES = {"height": PIXELS, "width": PIXELS, "num_frames": NUM_FRAMES, "fps": FPS}


def locate(folder: str | os.PathLike) -> Path:
    """The folder that a name stands for: `miniature` is the weights folder inside this package, also in a path."""
    if pathlib.PurePath(folder).parts[:1] == (MINIATURE,):
        return pathlib.Path(__file__).parents[1] / folder
    return as_path(folder)


def load_video(folder: str | os.PathLike) -> dict[str, Any]:
    """`height`, `width` [px], `num_frames` and `fps` of the clips that the UNet was trained on here, or nothing.

    Raises:
        UserError: a number that is none of a clip.
    """
    file = locate(folder) / _VIDEO
    clips = read_json(file) if file.exists() else {}
    for name in clips.keys() & _VIDEO_RANGES.keys():
        _VIDEO_RANGES[name].check(f"{file}: {name}", clips[name])
    return clips


def save_video(folder: pathlib.Path, clips: Mapping[str, Any]) -> None:
    """Writes what `load_video` reads, if anything is known."""
    if clips:
        (folder / _VIDEO).write_text(json.dumps(dict(clips)) + "\n")


def load_config(folder: str | os.PathLike, component: str) -> Any:
    """The architecture of `component` (one of `architectures.ARCHITECTURES`) in a weights folder.

    Raises:
        UserError: no such folder or component, another component's files, or a config.json that cannot be understood.
    """
    return _config(_component_folder(folder, component), component)


def load_params(folder: str | os.PathLike, component: str, shardings: Any = None, dtype: Any = None) -> dict[str, Any]:
    """Restores the parameters of `component`, each process reading only its shards.

    Args:
        folder: what osv_jax.convert_weights wrote.
        component: one of `architectures.ARCHITECTURES`.
        shardings: a `jax.sharding.Sharding` for all parameters, or a tree of them; by default the first local device.
        dtype: cast to this on the way; by default the stored dtype.

    Returns:
        The tree that goes under "params" in the network's `apply`.

    Raises:
        UserError: as `load_config`, or a checkpoint that is incomplete, damaged or of another network.
    """
    directory = _component_folder(folder, component)
    expected = expected_params(component, _config(directory, component))
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if (directory / _PACKED).exists():
        packed = _read_packed(directory / _PACKED, dtype)
        _check_shapes(directory, packed, expected)
        return jax.device_put(packed, shardings)
    params = paths.absolute(directory / "params")
    # Closing the checkpointer stops its threads.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer, _reading(directory):
        stored = checkpointer.metadata(params).item_metadata.tree
        _check_shapes(directory, stored, expected)
        if isinstance(shardings, jax.sharding.Sharding):
            shardings = jax.tree.map(lambda _: shardings, stored)
        restore = jax.tree.map(
            lambda array, sharding: ocp.ArrayRestoreArgs(
                sharding=sharding, global_shape=array.shape, dtype=array.dtype if dtype is None else dtype
            ),
            stored,
            shardings,
        )
        return checkpointer.restore(params, args=ocp.args.PyTreeRestore(restore_args=restore))


@contextlib.contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """What Orbax and TensorStore raise about damaged files becomes a `UserError`."""
    try:
        yield
    except DAMAGE as error:
        raise UserError(f"{directory} is damaged: convert the weights again with --overwrite.") from error


def _check_shapes(directory: Path, stored: Mapping[str, Any], expected: Mapping[tuple[str, ...], Any]) -> None:
    """Raises UserError, with the first name, unless the parameters are those of the network that config.json is of."""
    found = {path: tuple(leaf.shape) for path, leaf in flatten_dict(stored).items()}
    for path in sorted(found.keys() | expected.keys()):
        wanted = expected[path].shape if path in expected else None
        if found.get(path) != wanted:
            raise UserError(
                f"{directory} does not match its config.json: {'/'.join(path)} is {found.get(path, 'missing')}, not"
                f" {wanted or 'there'}; convert the weights again with --overwrite."
            )


def save_component(
    folder: pathlib.Path, component: str, config: Config, params: Mapping[str, Any], source: Path
) -> None:
    """Writes one component into a folder that is empty, or does not exist yet.

    `params` are NumPy arrays of one dtype. They are stored uncompressed: compression saves a quarter of the size, takes
    three times as long, and 1.7 GB more memory for SVD's UNet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # By default Orbax copies every NumPy array before it writes the first. (It wants the other handler to be there.)
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        (jax.Array, handlers.ArrayHandler()), (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False))
    )
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save((folder / "params").absolute(), args=ocp.args.PyTreeSave(params))
    _describe(folder, component, config, params, source)


def save_packed(folder: pathlib.Path, component: str, config: Config, params: Mapping[str, Any], source: Path) -> None:
    """Writes one component as a single file; see `save_component`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"/".join(path): np.ascontiguousarray(leaf) for path, leaf in flatten_dict(params).items()}
    save_file(tensors, folder / _PACKED)
    _describe(folder, component, config, params, source)


def _read_packed(file: Path, dtype: Any) -> dict[str, Any]:
    reader = open_weights(file)
    tensors = {tuple(name.split("/")): read_floats(reader, name) for name in reader.names()}
    check_finite(tensors, str(file))
    return unflatten_dict({path: x if dtype is None else x.astype(dtype) for path, x in tensors.items()})


def _describe(folder: pathlib.Path, component: str, config: Config, params: Mapping[str, Any], source: Path) -> None:
    leaves = flatten_dict(params).values()
    description = {
        "format": FORMAT,
        "component": component,
        "source": str(source),
        "dtype": str(next(iter(leaves)).dtype),
        "parameters": sum(leaf.size for leaf in leaves),
        "config": dataclasses.asdict(config),
        # So that a half-copied folder is recognised before Orbax trips over it.
        "files": {
            str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()
        },
    }
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")


def _component_folder(folder: str | os.PathLike, component: str) -> Path:
    if component not in ARCHITECTURES:
        raise UserError(f"There is no component {component!r}: expected one of {', '.join(ARCHITECTURES)}.")
    folder = locate(folder)
    if (folder / "params").is_dir():
        raise UserError(f"{folder} is one component: give the folder that contains it, {folder.parent}.")
    directory = folder / component
    if not directory.is_dir():
        command = f"python -m osv_jax.convert_weights {ARCHITECTURES[component].command} {folder}"
        raise UserError(f"{directory} does not exist: make it with `{command}`.")
    return directory


def _config(directory: Path, component: str) -> Any:
    file = directory / "config.json"
    if not file.exists():
        raise _incomplete(directory)
    description = read_json(file)
    try:
        actual, version = description["component"], description["format"]
        sizes = {directory / name: int(size) for name, size in description["files"].items()}
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in description["config"].items()}
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} was not written by osv_jax.convert_weights: convert the weights again.") from error
    if actual != component:
        raise UserError(f"{directory} holds {actual!r}, not {component!r}: put each component in its own folder.")
    config_class = ARCHITECTURES[component].config
    if version != FORMAT or fields.keys() != {field.name for field in dataclasses.fields(config_class)}:
        raise UserError(
            f"{file} was written by another version of osv_jax: convert the weights again with --overwrite."
        )
    if not all(path.exists() and paths.size_of(path) == size for path, size in sizes.items()):
        raise _incomplete(directory)
    return make_config(component, fields, file)


def _incomplete(directory: Path) -> UserError:
    return UserError(f"{directory} is incomplete: convert the weights again with --overwrite.")


def cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """`array` in another dtype, contiguous: safetensors writes an array's memory, whatever its strides.

    Raises:
        UserError: naming the array, if it has a value that is not finite, or becomes infinite.
    """
    check_finite(array, name)
    try:
        with np.errstate(over="raise"):
            return array.astype(dtype, order="C")
    except FloatingPointError as error:
        raise UserError(f"{name} has values beyond {np.dtype(dtype)}: use --dtype bfloat16.") from error
