"""The step of all students that a discriminator judges: an adversarial loss, and a distance to a target.

Equations are OSV's (Eq. 6, 7, 9, 10). Objectives differ in the student input, the training target and the judge (`osv`,
`osv_stage1`, `osv_stage2`), or in the losses as well (`sf_v`, `add`).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import optax
from jaxtyping import Array, Float, Int

from osv_jax.objectives import losses
from osv_jax.objectives.accumulation import mean_over_parts, split_batch
from osv_jax.objectives.batches import Batch
from osv_jax.objectives.distillation import Distillation, DistillationOptions
from osv_jax.objectives.example import Example
from osv_jax.objectives.judges import Judge, real_and_fake
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Draws, Metrics, Optimizers
from osv_jax.objectives.options import AdversarialOptimizerOptions, setting
from osv_jax.objectives.players import Player, Student, TrainState, make_optimizer, norms, start
from osv_jax.runtime.ranges import NOT_NEGATIVE

ACCUMULATE = ("together", "in_turn")


@dataclasses.dataclass(frozen=True)
class AdversarialOptions(DistillationOptions):
    """The options of every student that is judged; the defaults are OSV's.

    Attributes:
        optimizer: of both players.
        adversarial_weight: lambda^LGP and lambda^ACD (appendix C).
        accumulate: with `grad_accum` > 1, whether both players' gradients are taken at the state before the step
            (`together`), or the discriminator is updated on all parts before the student's gradient is taken
            (`in_turn`, which is what happens without parts, and costs one more forward pass of the student).
    """

    optimizer: AdversarialOptimizerOptions = dataclasses.field(default_factory=AdversarialOptimizerOptions)
    adversarial_weight: float = setting(0.1, NOT_NEGATIVE)
    accumulate: str = setting("together", ACCUMULATE)


class Adversarial(Distillation):
    """An objective whose student is judged by a discriminator while it approaches a target."""

    curves: ClassVar[tuple[str, ...]] = ("loss_huber", "loss_adversarial", "loss_disc")
    # The metric of `distance`.
    distance_metric: ClassVar[str] = "loss_huber"

    def __init__(self, networks: Any, options: AdversarialOptions, optimizers: Optimizers | None = None):
        super().__init__(networks, options, optimizers)
        self.judge = self.make_judge()

    @abc.abstractmethod
    def make_judge(self) -> Judge:
        """The judge that the options ask for."""

    def make_optimizers(self) -> dict[str, optax.GradientTransformation]:
        chosen = self.options.optimizer
        disc = make_optimizer(chosen, chosen.disc_learning_rate)
        return super().make_optimizers() | {"disc": disc}

    def init(self, key: jax.Array, frozen: Params) -> dict[str, Player]:
        """A student equal to the teacher and a fresh discriminator."""
        _, disc_key = jax.random.split(key)
        params, stats = self.judge.init(disc_key)
        return super().init(key, frozen) | {"disc": start(params, self.optimizers["disc"], stats)}

    @abc.abstractmethod
    def draw(self, key: jax.Array, batch: Batch) -> Draws:
        """All random numbers of a step."""

    @abc.abstractmethod
    def example(self, state: TrainState, frozen: Params, batch: Batch, draws: Draws) -> Example:
        """The student input and the training target."""

    def penalty(
        self, disc: Player, frozen: Params, example: Example, draws: Draws, real: Any, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""] | float, Metrics]:
        """What is added to the discriminator's loss, and its metrics.

        Args:
            disc: with the singular vectors of this step.
            real: what the judge sees of the target.
            step: the number of the step.
        """
        return 0.0, {}

    def generator_loss(self, logits: losses.Logits) -> Float[Array, " b"]:
        """The adversarial term of the student's loss."""
        return losses.hinge_generator(logits)

    def distance(
        self, frozen: Params, example: Example, fake: Float[Array, "b f h w c"], draws: Draws
    ) -> Float[Array, " b"]:
        """How far the student's output is from its target, weighted."""
        return example.weight * losses.pseudo_huber(example.target, fake, self.options.huber_c)

    def step(self, state: TrainState, frozen: Params, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        return step(self, state, frozen, batch, key)


def step(
    objective: Adversarial, state: TrainState, frozen: Params, batch: Batch, key: jax.Array
) -> tuple[TrainState, Metrics]:
    """One update of the discriminator (Eq. 6, 9), then one of the student through it (Eq. 7, 10)."""
    whole = (batch, objective.draw(key, batch))
    take_turns = {
        1: whole_batch,
        "together": parts_together,
        "in_turn": parts_in_turn,
    }[1 if objective.options.grad_accum == 1 else objective.options.accumulate]
    gradients, disc, metrics = take_turns(objective, state, frozen, whole)
    optimizer, decay = objective.optimizers["student"], objective.options.ema_decay
    student = state.players["student"].update(gradients["student"], optimizer, decay)
    players = {"student": student, "disc": disc}
    return TrainState(step=state.step + 1, players=players), metrics | norms(gradients, players)


def whole_batch(objective: Adversarial, state: TrainState, frozen: Params, whole: tuple[Batch, Draws]) -> Any:
    """One forward pass of the student serves both players.

    The discriminator is updated on its output as a constant; then the student's loss is differentiated with respect to
    that output through the NEW discriminator, and pulled back once.

    Returns:
        The gradients by player, the new discriminator, metrics.
    """
    example = make_example(objective, state, frozen, whole)
    fake, pull_back = student_forward(objective, state.players["student"].params, frozen, example)
    g_disc, stats, metrics = discriminator_gradient(objective, state, frozen, example, whole[1], fake)
    disc = update_discriminator(objective, state.players["disc"], g_disc, stats)
    g_fake, more = student_gradient(objective, disc, frozen, example, whole[1], fake)
    return {"student": pull_back(g_fake)[0], "disc": g_disc}, disc, metrics | more


def parts_together(objective: Adversarial, state: TrainState, frozen: Params, whole: tuple[Batch, Draws]) -> Any:
    """As `whole_batch`, part by part, but both players' gradients are taken at the state before the step."""
    disc = state.players["disc"]

    def gradients(part: tuple[Batch, Draws]) -> tuple[Any, None]:
        example = make_example(objective, state, frozen, part)
        fake, pull_back = student_forward(objective, state.players["student"].params, frozen, example)
        g_disc, stats, metrics = discriminator_gradient(objective, state, frozen, example, part[1], fake)
        g_fake, more = student_gradient(objective, disc, frozen, example, part[1], fake)
        # The statistics depend on the weights alone, so that they are equal in all parts.
        return (g_disc, stats, pull_back(g_fake)[0], metrics | more), None

    count = objective.options.grad_accum
    (g_disc, stats, g_student, metrics), _ = mean_over_parts(gradients, split_batch(whole, count), count)
    return {"student": g_student, "disc": g_disc}, update_discriminator(objective, disc, g_disc, stats), metrics


def parts_in_turn(objective: Adversarial, state: TrainState, frozen: Params, whole: tuple[Batch, Draws]) -> Any:
    """As `whole_batch`, part by part: all of them for the discriminator, then all of them for the student."""
    student, count = state.players["student"].params, objective.options.grad_accum
    parts = split_batch(whole, count)

    def of_discriminator(part: tuple[Batch, Draws]) -> tuple[Any, Example]:
        example = make_example(objective, state, frozen, part)
        fake = objective.backbone(frozen, student, example.cond)(example.x, example.sigma)
        return discriminator_gradient(objective, state, frozen, example, part[1], fake), example

    (g_disc, stats, metrics), examples = mean_over_parts(of_discriminator, parts, count)
    disc = update_discriminator(objective, state.players["disc"], g_disc, stats)

    def of_student(part: tuple[Example, Draws]) -> tuple[Any, None]:
        fake, pull_back = student_forward(objective, student, frozen, part[0])
        g_fake, more = student_gradient(objective, disc, frozen, *part, fake)
        return (pull_back(g_fake)[0], more), None

    (g_student, more), _ = mean_over_parts(of_student, (examples, parts[1]), count)
    return {"student": g_student, "disc": g_disc}, disc, metrics | more


def make_example(objective: Adversarial, state: TrainState, frozen: Params, part: tuple[Batch, Draws]) -> Example:
    """The example of some clips, without a gradient."""
    return jax.lax.stop_gradient(objective.example(state, frozen, *part))


def student_forward(
    objective: Adversarial, student: Student, frozen: Params, example: Example
) -> tuple[Float[Array, "b f h w c"], Callable]:
    """f_theta(x, sigma), and the function that pulls a gradient back to the student's parameters."""
    return jax.vjp(lambda params: objective.backbone(frozen, params, example.cond)(example.x, example.sigma), student)


def discriminator_gradient(
    objective: Adversarial,
    state: TrainState,
    frozen: Params,
    example: Example,
    draws: Draws,
    fake: Float[Array, "b f h w c"],
) -> tuple[Params, Params, Metrics]:
    """Gradient of Eq. 6 and 9, where the target is real and the student's output fake; new statistics, metrics."""
    disc = state.players["disc"]
    real = objective.judge.see(frozen, example.target, example.judge_cond, draws)
    seen = objective.judge.see(frozen, jax.lax.stop_gradient(fake), example.judge_cond, draws)

    def loss_fn(params: Params) -> tuple[Array, tuple[Params, Metrics]]:
        real_logits, fake_logits, stats = real_and_fake(objective.judge, params, disc.stats, frozen, real, seen)
        now = dataclasses.replace(disc, params=params, stats=stats)
        penalty, of_penalty = objective.penalty(now, frozen, example, draws, real, state.step)
        loss = losses.hinge_discriminator(real_logits, fake_logits).mean() + penalty
        metrics = {f"logits_real/{kind}": values.mean() for kind, values in real_logits.items()}
        metrics |= {f"logits_fake/{kind}": values.mean() for kind, values in fake_logits.items()}
        return loss, (stats, {"loss_disc": loss, **metrics, **of_penalty})

    gradient, (stats, metrics) = jax.grad(loss_fn, has_aux=True)(disc.params)
    return gradient, stats, metrics


def update_discriminator(objective: Adversarial, disc: Player, gradient: Params, stats: Params) -> Player:
    return dataclasses.replace(disc.update(gradient, objective.optimizers["disc"]), stats=stats)


def student_gradient(
    objective: Adversarial, disc: Player, frozen: Params, example: Example, draws: Draws, fake: Array
) -> tuple[Float[Array, "b f h w c"], Metrics]:
    """Gradient of `student_loss` with respect to the student's output."""

    def loss_fn(fake: Array) -> tuple[Array, Metrics]:
        return student_loss(objective, disc, frozen, example, draws, fake)

    return jax.grad(loss_fn, has_aux=True)(fake)


def student_loss(
    objective: Adversarial,
    disc: Player,
    frozen: Params,
    example: Example,
    draws: Draws,
    fake: Float[Array, "b f h w c"],
) -> tuple[Float[Array, ""], Metrics]:
    """Eq. 7 and 10: lambda relu(1 - D(fake)) + weight d(target, fake)."""
    seen = objective.judge.see(frozen, fake, example.judge_cond, draws)
    logits, _ = objective.judge.score(disc.params, disc.stats, frozen, seen)
    adversarial = objective.generator_loss(logits).mean()
    distance = objective.distance(frozen, example, fake, draws).mean()
    loss = objective.options.adversarial_weight * adversarial + distance
    return loss, {"loss_student": loss, "loss_adversarial": adversarial, objective.distance_metric: distance}
