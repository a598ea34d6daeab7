"""What a training run made, read back from its workdir without the optimizer and the discriminator."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from osv_jax.convert.lora_files import check_lora
from osv_jax.convert.naming import Path, torch_name
from osv_jax.distill.state import Student
from osv_jax.errors import UserError
from osv_jax.models.lora import merge_lora, scale_lora

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A student to sample from or to export.

    Attributes:
        student: float32 NumPy arrays, alpha / rank folded into the LoRA's `b`.
        step: optimizer steps it has seen.
        config: the run's configuration.
    """

    student: Student
    step: int = 0
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def check_fits(self, shapes: Mapping[Path, Any], source: Any) -> None:
        """Checks the student against the UNet it is to be merged into.

        Args:
            shapes: the UNet's parameters (or their shapes) by path.
            source: what messages call the student.

        Raises:
            UserError: naming what this UNet does not have, or has in another size.
        """
        check_lora(self.student.lora, shapes, source)
        for path, leaf in flatten_dict(self.student.tuned).items():
            if path not in shapes or shapes[path].shape != leaf.shape:
                raise UserError(
                    f"{source} does not fit: it was trained with another UNet (first difference: {torch_name(path)}). "
                    "Give the weights that the run used."
                )

    def merge_into(self, params: Params) -> dict[str, Any]:
        """The UNet's parameters with tuned ones replaced and the LoRA added, in the dtypes of `params`."""
        variables = self.student.variables(params)
        merged = merge_lora(variables["params"], variables["lora"])
        return jax.tree.map(lambda new, old: new.astype(old.dtype), merged, dict(params))


def is_workdir(path: str | os.PathLike) -> bool:
    """Whether `path` looks like the workdir of a training run."""
    return (epath.Path(path) / "checkpoints").is_dir()


def load_trained(workdir: str | os.PathLike, ema: bool = False) -> Trained:
    """Reads the student of a run's last checkpoint.

    Only the student's arrays are read, a quarter or less of the checkpoint. A run that is still going on is not
    disturbed.

    Args:
        workdir: the `--workdir` of the run.
        ema: the student's average instead of the student.

    Raises:
        UserError: not a workdir, no checkpoint in it yet, or a damaged one.
    """
    workdir = epath.Path(workdir)
    try:
        config = json.loads((workdir / "config.json").read_text())
        scale = config["lora"]["alpha"] / config["lora"]["rank"]
    except FileNotFoundError as error:
        raise UserError(f"{workdir} has no config.json: give the --workdir of a training run.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{workdir / 'config.json'} is damaged: restore it, or give another workdir.") from error
    folder = workdir / "checkpoints"
    # A checkpoint that is still being written has another name.
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    if not steps:
        raise UserError(f"{workdir} has no checkpoint: let the run reach its first one (config.checkpoint_every).")
    checkpoint = folder / str(max(steps))
    try:
        student = _read(checkpoint / "state", "ema" if ema else "student")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"The checkpoint {checkpoint} is damaged: delete that folder to use the one before.") from error
    return Trained(Student(lora=scale_lora(student["lora"], scale), tuned=student["tuned"]), max(steps), config)


def _read(state: epath.Path, part: str) -> dict[str, Any]:
    """One field of a saved `TrainState` as NumPy arrays."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = checkpointer.metadata(state.resolve()).item_metadata.tree[part]
        wanted = flatten_dict({part: stored})
        restore = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in wanted}
        args = ocp.args.PyTreeRestore(
            item=unflatten_dict(wanted), restore_args=unflatten_dict(restore), partial_restore=True
        )
        return {"tuned": {}} | checkpointer.restore(state.resolve(), args=args)[part]
