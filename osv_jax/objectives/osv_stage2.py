"""Stage 2 of OSV: adversarial consistency distillation (ACD, Eq. 8 to 10)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from osv_jax.objectives import consistency
from osv_jax.objectives.batches import Batch
from osv_jax.objectives.consistency import ConsistencyOptions
from osv_jax.objectives.example import Example
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Draws, register
from osv_jax.objectives.osv import OSV, OSVOptions
from osv_jax.objectives.players import TrainState


@dataclasses.dataclass(frozen=True)
class Stage2Options(OSVOptions, ConsistencyOptions):
    """The options of both; the defaults are the paper's."""


@register
class Stage2(OSV):
    """The student maps x at t_{n+m} to x_0. Its training target is what its own EMA predicts from x at t_n, which the
    guided teacher reaches from there in m Euler steps; the discriminator takes that target for real.
    """

    name = "stage2"
    Options = Stage2Options

    @classmethod
    def check(cls, options: Any, num_frames: int) -> None:
        super().check(options, num_frames)
        consistency.check(options)

    def warnings(self) -> list[str]:
        return consistency.warnings(self.options)

    def draw(self, key: jax.Array, batch: Batch) -> Draws:
        key, of_judge = self.judge.draw(key, batch.latents.shape)
        return consistency.draw(key, batch, self.options) | of_judge

    def example(self, state: TrainState, frozen: Params, batch: Batch, draws: Draws) -> Example:
        return consistency.example(self, state, frozen, batch, draws)
