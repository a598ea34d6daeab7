"""What objectives have in common whose student is a few-step copy of its teacher, the UNet as it was."""

from __future__ import annotations

import dataclasses

from osv_jax.diffusion.conditioning import Conditioning
from osv_jax.diffusion.edm import BOUNDARIES, EDMBackbone
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import StudentObjective
from osv_jax.objectives.options import StudentOptions, setting
from osv_jax.objectives.players import Student
from osv_jax.runtime.ranges import Range


@dataclasses.dataclass(frozen=True)
class DistillationOptions(StudentOptions):
    """The options that all few-step students have.

    Attributes:
        num_levels: N of the grid of noise levels, of which the highest is where samplers begin.
        huber_c: c of the pseudo-Huber distance (OSV appendix C).
        boundary: see `edm.scalings`.
    """

    num_levels: int = setting(100, Range(2, 10_000, whole=True))
    # Its square must not vanish in float32: the gradient of the distance at 0 would be 0 / 0.
    huber_c: float = setting(1e-3, Range(1e-8))
    boundary: str = setting("svd", BOUNDARIES)


class Distillation(StudentObjective):
    """An objective whose student starts as its teacher, and becomes a consistency function."""

    def backbone(self, frozen: Params, student: Student | None, cond: Conditioning) -> EDMBackbone:
        """The consistency function f of a student, or the teacher's denoiser (None), on a condition."""
        if student is None:
            return EDMBackbone(self.networks.unet_with({"params": frozen["unet"]}), cond)
        variables = student.variables(frozen["unet"], self.options.lora.scale)
        return EDMBackbone(self.networks.unet_with(variables), cond, self.options.boundary)
