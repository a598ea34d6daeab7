"""AnimateLCM on SVD: consistency distillation of an image-to-video model, without a discriminator.

The paper (Wang et al. 2024) distils images and motion apart. On SVD that is one UNet whose spatial transformers are
trained first, and its temporal ones after them: `phases`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import jax
import optax
from jaxtyping import Array, Float

from osv_jax.errors import UserError
from osv_jax.models import groups
from osv_jax.objectives import consistency, losses
from osv_jax.objectives.accumulation import mean_over_batch
from osv_jax.objectives.batches import Batch
from osv_jax.objectives.consistency import ConsistencyOptions
from osv_jax.objectives.distillation import Distillation
from osv_jax.objectives.example import Example
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Draws, Metrics, register
from osv_jax.objectives.options import setting
from osv_jax.objectives.players import Student, TrainState, norms, student_groups
from osv_jax.runtime.ranges import COUNT, NOT_NEGATIVE, WHOLE


@dataclasses.dataclass(frozen=True)
class AnimateLCMOptions(ConsistencyOptions):
    """As `ConsistencyOptions`, with one Euler step of the teacher; the defaults are those of the paper's SVD.

    Attributes:
        trainable: every group that some phase trains.
        phases: (first step, group, learning rate): from this step to the next phase's first the group learns with this
            rate, and everything else, its optimizer state included, stays as it is. Empty: all groups learn all the
            time, with the rates of `optimizer`.
    """

    trainable: tuple[str, ...] = setting(("spatial_transformer", "temporal_transformer"), groups.TRAINABLE)
    solver_steps: int = setting(1, COUNT)
    phases: tuple[tuple[int, str, float], ...] = (
        (0, "spatial_transformer", 1e-6),
        (30_000, "temporal_transformer", 3e-7),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.phases:
            return
        if all(_is_phase(phase) for phase in self.phases):
            starts, trained, _ = zip(*self.phases, strict=True)
            in_order = starts[0] == 0 and all(one < next_one for one, next_one in itertools.pairwise(starts))
            if in_order and sorted(trained) == sorted(self.trainable):
                return
        raise UserError(
            f"config.phases={self.phases} must be (first step, group, learning rate) triples, the first from step 0 and"
            f" each later one from a later step, with every group of config.trainable={self.trainable} once."
        )


def _is_phase(phase: object) -> bool:
    if not (isinstance(phase, tuple | list) and len(phase) == 3):
        return False
    first, group, rate = phase
    return first in WHOLE and group in groups.TRAINABLE[:-1] and rate in NOT_NEGATIVE


@register
class AnimateLCM(Distillation):
    """The student regresses to what its EMA predicts one guided step of the teacher further down."""

    name = "animatelcm"
    Options = AnimateLCMOptions
    curves = ("loss_huber", "grad_norm/student")

    @classmethod
    def check(cls, options: AnimateLCMOptions, num_frames: int) -> None:
        consistency.check(options)

    def warnings(self) -> list[str]:
        return consistency.warnings(self.options)

    def make_optimizers(self) -> dict[str, optax.GradientTransformation]:
        chosen, phases = self.options.optimizer, self.options.phases
        if not phases:
            return super().make_optimizers()
        ends = [*(first for first, _, _ in phases[1:]), None]
        by_group = {
            group: optax.transforms.conditionally_mask(
                optax.adam(rate, b1=chosen.b1, b2=chosen.b2), _during(first, end)
            )
            for (first, group, rate), end in zip(phases, ends, strict=True)
        }
        adam = optax.multi_transform(by_group, student_groups)
        clip = optax.clip_by_global_norm(chosen.max_grad_norm)
        return {"student": optax.chain(clip, adam) if chosen.max_grad_norm else adam}

    def step(self, state: TrainState, frozen: Params, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        return step(self, state, frozen, batch, key)


def step(
    objective: AnimateLCM, state: TrainState, frozen: Params, batch: Batch, key: jax.Array
) -> tuple[TrainState, Metrics]:
    """One update of the student on the consistency loss."""
    options, student = objective.options, state.players["student"]
    whole = (batch, consistency.draw(key, batch, options))

    def gradient_of(part: tuple[Batch, Draws]) -> tuple[Student, Metrics]:
        example = jax.lax.stop_gradient(consistency.example(objective, state, frozen, *part))
        return jax.grad(consistency_loss, has_aux=True)(student.params, objective, frozen, example)

    gradient, metrics = mean_over_batch(gradient_of, whole, options.grad_accum)
    players = {"student": student.update(gradient, objective.optimizers["student"], options.ema_decay)}
    return TrainState(step=state.step + 1, players=players), metrics | norms({"student": gradient}, players)


def consistency_loss(
    student: Student, objective: AnimateLCM, frozen: Params, example: Example
) -> tuple[Float[Array, ""], Metrics]:
    """lambda(t_n) d(f(x_{t_{n+1}}, t_{n+1}), target): OSV Eq. 5 with the distance of its appendix C."""
    prediction = objective.backbone(frozen, student, example.cond)(example.x, example.sigma)
    distance = losses.pseudo_huber(example.target, prediction, objective.options.huber_c)
    loss = (example.weight * distance).mean()
    return loss, {"loss_huber": loss}


def _during(first: int, end: int | None) -> Callable[[jax.Array], jax.Array]:
    """Whether a step lies in `first` .. `end` - 1; without an end, from `first` on."""
    return lambda step: (step >= first) & (True if end is None else step < end)
