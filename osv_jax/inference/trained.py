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
from flax.traverse_util import flatten_dict, unflatten_dict

from osv_jax.convert import lora_files
from osv_jax.convert.lora_files import check_lora
from osv_jax.convert.naming import Path, torch_name
from osv_jax.convert.weights import locate
from osv_jax.errors import UserError
from osv_jax.models.lora import closest_lora, merge_lora, scale_lora
from osv_jax.objectives.objective import find, is_known
from osv_jax.objectives.options import RunOptions, check_stored
from osv_jax.objectives.players import Student
from osv_jax.runtime import checkpoint, paths
from osv_jax.runtime.finite import check_finite
from osv_jax.runtime.ranges import PIXELS, WHOLE

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

    @classmethod
    def none(cls) -> Trained:
        """Nothing to be merged: the teacher."""
        return cls(Student(lora={}, tuned={}))

    @property
    def video(self) -> dict[str, Any]:
        """`height`, `width`, `num_frames` and `fps` of the clips that the run saw last, as far as they are known."""
        data = self.config.get("data", {})
        sizes = [(height, width) for start, height, width in data.get("resolutions", ()) if start < self.step]
        size = dict(zip(("height", "width"), sizes[-1], strict=True)) if sizes else {}
        return size | {name: data[name] for name in ("num_frames", "fps") if data.get(name)}

    @property
    def is_teacher(self) -> bool:
        """Whether a run trained another teacher, which takes as many steps as the one it started from."""
        name = self.config.get("objective")
        return is_known(name) and "teacher" in find(str(name)).product

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

    def fits(self, shapes: Mapping[Path, Any]) -> bool:
        """Whether `check_fits` has nothing to say."""
        try:
            self.check_fits(shapes, "")
        except UserError:
            return False
        return True

    def merge_into(self, params: Params, dtype: Any = None) -> dict[str, Any]:
        """The UNet's parameters with tuned ones replaced and the LoRA added.

        Args:
            params: as they are stored: rounding them before the LoRA is added would round it away where it is small.
            dtype: of the result; by default that of `params`.
        """
        variables = self.student.variables(params)
        merged = merge_lora(variables["params"], variables["lora"], dtype)
        return jax.tree.map(lambda new, old: new.astype(dtype or old.dtype), merged, dict(params))

    def closest_lora(self, params: Params, rank: int) -> tuple[dict[str, Any], float]:
        """All that was trained, tuned kernels too, as nearly as a LoRA of `rank` can be it, by singular values.

        Args:
            params: the UNet's, float32.

        Returns:
            The LoRA, and how far it is from what was trained: ||difference|| / ||what was trained||. Biases and norms,
            which no LoRA can change, are part of that difference.
        """
        base, merged = flatten_dict(params), flatten_dict(self.merge_into(params))
        touched = flatten_dict(self.student.tuned).keys() | {
            (*path[:-1], "kernel") for path in flatten_dict(self.student.lora)
        }
        changes = {path: np.asarray(merged[path]) - np.asarray(base[path]) for path in sorted(touched)}
        squares = {path: float(np.square(change, dtype=np.float64).sum()) for path, change in changes.items()}
        kernels = {path[:-1]: change for path, change in changes.items() if path[-1] == "kernel"}
        lora, left = closest_lora(kernels, rank)
        lost = left**2 + sum(square for path, square in squares.items() if path[-1] != "kernel")
        whole = sum(squares.values())
        return lora, (lost / whole) ** 0.5 if whole else 0.0


def read_student(path: str | os.PathLike | None, ema: bool, shapes: Mapping[Path, Any]) -> tuple[Trained, str]:
    """What `--lora` names, or of None a student equal to its teacher, and a notice about it.

    Args:
        path, ema: see `pipeline.ImageToVideo.load`.
        shapes: parameters of the UNet that it is to be merged into, by path; see `architectures.expected_params`.

    Raises:
        UserError: it cannot be read, or does not fit.
    """
    if path is None:
        return Trained.none(), ""
    path = locate(path)
    if is_workdir(path):
        trained = load_trained(path, ema)
        trained.check_fits(shapes, path)
        return trained, ""
    if ema:
        raise UserError(f"{path} is not a training workdir: only those have an EMA; leave out --ema.")
    read = lora_files.read_lora(path, shapes)
    return Trained(Student(lora=read.lora, tuned={})), read.notice


def is_workdir(path: str | os.PathLike) -> bool:
    """Whether `path` looks like the workdir of a training run."""
    return (locate(path) / "checkpoints").is_dir()


def load_trained(workdir: str | os.PathLike, ema: bool = False) -> Trained:
    """Reads the student of a run's last checkpoint.

    Only the student's arrays are read, a quarter or less of the checkpoint. A run that is still in progress is not
    disturbed.

    Args:
        workdir: the `--workdir` of the run.
        ema: the student's EMA instead of the student.

    Raises:
        UserError: not a workdir, no checkpoint in it yet, or a damaged one; numbers that are not in their range.
    """
    workdir = locate(workdir)
    try:
        config = json.loads((workdir / "config.json").read_text())
        _check_stored(config, f"{workdir / 'config.json'}: ")
        scale = config["lora"]["alpha"] / config["lora"]["rank"] if "lora" in config else 1.0
        for start, height, width in config["data"].get("resolutions", ()):
            if start not in WHOLE or height not in PIXELS or width not in PIXELS:
                raise ValueError("resolutions")
    except OSError as error:
        raise UserError(f"{workdir} has no config.json: give the --workdir of a training run.") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{workdir / 'config.json'} is damaged: restore it, or give another workdir.") from error
    step = checkpoint.latest_step(workdir)
    if step is None:
        raise UserError(f"{workdir} has no checkpoint: let the run reach its first one (config.checkpoint_every).")
    student = _read(workdir, step, "ema" if ema else "params")
    check_finite(student, f"The checkpoint of step {step} in {workdir}")
    return Trained(Student(lora=scale_lora(student["lora"], scale), tuned=student["tuned"]), step, config)


def _check_stored(config: Mapping[str, Any], where: str) -> None:
    check_stored(RunOptions, config, where)
    if is_known(config.get("objective")):
        check_stored(find(config["objective"]).Options, config, where)


def _read(workdir: paths.Path, step: int, part: str) -> dict[str, Any]:
    """The student's `params` or `ema` of a saved `TrainState` as NumPy arrays."""
    folder = workdir / "checkpoints" / str(step)
    try:
        stored = checkpoint.stored_shapes(workdir, step)["players"]["student"][part]
        wanted = flatten_dict({"players": {"student": {part: stored}}})
        restore = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in wanted}
        args = ocp.args.PyTreeRestore(
            item=unflatten_dict(wanted), restore_args=unflatten_dict(restore), partial_restore=True
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            # (A field without arrays is not there.)
            state = checkpointer.restore(paths.absolute(folder / "state"), args=args)
            return {"lora": {}, "tuned": {}} | state["players"]["student"][part]
    except checkpoint.DAMAGE as error:
        raise UserError(
            f"The checkpoint {folder} is damaged: restore it, or delete it to use the one before."
        ) from error
