"""The step that both stages of OSV take: an adversarial and a pseudo-Huber loss towards a target (Eq. 6, 7, 9, 10).

The stages differ only in the student input and in the training target: see `osv_stage1`, `osv_stage2`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import optax
from jaxtyping import Array, Float

from osv_jax.errors import UserError
from osv_jax.objectives import losses
from osv_jax.objectives.accumulation import mean_over_parts, split_batch
from osv_jax.objectives.batches import Batch
from osv_jax.objectives.consistency import Example
from osv_jax.objectives.distillation import Distillation, DistillationOptions
from osv_jax.objectives.judges import FramesJudge, Judge, LatentJudge, PixelJudge, real_and_fake
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Draws, Metrics
from osv_jax.objectives.options import AdversarialOptimizerOptions, setting
from osv_jax.objectives.players import Player, Student, TrainState, make_optimizer, norms, start
from osv_jax.runtime.ranges import NOT_NEGATIVE, WHOLE

ACCUMULATE = ("together", "in_turn")


@dataclasses.dataclass(frozen=True)
class AdversarialOptions(DistillationOptions):
    """The options that the stages share; the defaults are the paper's.

    Attributes:
        optimizer: of both players.
        adversarial_weight: lambda^LGP and lambda^ACD (appendix C).
        accumulate: with `grad_accum` > 1, whether both players' gradients are taken at the state before the step
            (`together`), or the discriminator is updated on all parts before the student's gradient is taken
            (`in_turn`, which is what happens without parts, and costs one more forward pass of the student).
        discriminator_blocks: blocks of DINOv2 whose features the discriminator sees, counted from 0.
        discriminator_input: `latents`, or `decoded` by the VAE (Table 2e).
        discriminator_frames: how many consecutive frames of each clip the discriminator sees, to save memory, starting
            at a random one in every step; 0: all of them, as in the paper.
    """

    optimizer: AdversarialOptimizerOptions = dataclasses.field(default_factory=AdversarialOptimizerOptions)
    adversarial_weight: float = setting(0.1, NOT_NEGATIVE)
    accumulate: str = setting("together", ACCUMULATE)
    discriminator_blocks: tuple[int, ...] = setting((2, 5, 8, 11), WHOLE)
    discriminator_input: str = setting("latents", ("latents", "decoded"))
    discriminator_frames: int = setting(0, WHOLE)


class Adversarial(Distillation):
    """An objective whose student is judged by a discriminator while it is regressed to a target."""

    components: ClassVar[tuple[str, ...]] = ("unet", "vae", "image_encoder", "dinov2")
    curves: ClassVar[tuple[str, ...]] = ("loss_huber", "loss_adversarial", "loss_disc")

    def __init__(self, networks, options, optimizers=None):
        super().__init__(networks, options, optimizers)
        self.judge = make_judge(networks, options)

    @classmethod
    def check(cls, options: AdversarialOptions, num_frames: int) -> None:
        if num_frames and options.discriminator_frames > num_frames:
            raise UserError(
                f"config.discriminator_frames={options.discriminator_frames} must lie in 1 .. {num_frames}"
                " (config.data.num_frames), or be 0 for all frames."
            )
        blocks = options.discriminator_blocks
        if not blocks or len(set(blocks)) < len(blocks):
            raise UserError(f"config.discriminator_blocks={blocks} must name one block of DINOv2 or more, each once.")

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

    def step(self, state: TrainState, frozen: Params, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        return step(self, state, frozen, batch, key)


def make_judge(networks: Any, options: AdversarialOptions) -> Judge:
    """The judge that the options ask for."""
    judge = LatentJudge(networks.discriminator, networks.dinov2)
    if options.discriminator_input == "decoded":
        judge = PixelJudge(networks.discriminator, networks.dinov2, networks.codec)
    return FramesJudge(judge, options.discriminator_frames) if options.discriminator_frames else judge


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
    g_disc, stats, metrics = discriminator_gradient(objective, state.players["disc"], frozen, example, whole[1], fake)
    disc = update_discriminator(objective, state.players["disc"], g_disc, stats)
    g_fake, more = student_gradient(objective, disc, frozen, example, whole[1], fake)
    return {"student": pull_back(g_fake)[0], "disc": g_disc}, disc, metrics | more


def parts_together(objective: Adversarial, state: TrainState, frozen: Params, whole: tuple[Batch, Draws]) -> Any:
    """As `whole_batch`, part by part, but both players' gradients are taken at the state before the step."""
    disc = state.players["disc"]

    def gradients(part: tuple[Batch, Draws]) -> tuple[Any, None]:
        example = make_example(objective, state, frozen, part)
        fake, pull_back = student_forward(objective, state.players["student"].params, frozen, example)
        g_disc, stats, metrics = discriminator_gradient(objective, disc, frozen, example, part[1], fake)
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
        return discriminator_gradient(objective, state.players["disc"], frozen, example, part[1], fake), example

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
    objective: Adversarial, disc: Player, frozen: Params, example: Example, draws: Draws, fake: Array
) -> tuple[Params, Params, Metrics]:
    """Gradient of `discriminator_loss`, the statistics after it, metrics."""

    def loss_fn(params: Params) -> tuple[Array, tuple[Params, Metrics]]:
        return discriminator_loss(objective, params, disc.stats, frozen, example, draws, fake)

    gradient, (stats, metrics) = jax.grad(loss_fn, has_aux=True)(disc.params)
    return gradient, stats, metrics


def discriminator_loss(
    objective: Adversarial,
    params: Params,
    stats: Params,
    frozen: Params,
    example: Example,
    draws: Draws,
    fake: Float[Array, "b f h w c"],
) -> tuple[Float[Array, ""], tuple[Params, Metrics]]:
    """Eq. 6 and 9: the target is real, the student's output fake."""
    clips = (example.target, jax.lax.stop_gradient(fake), example.sigma, example.cond)
    real, fake_logits, stats = real_and_fake(objective.judge, params, stats, frozen, *clips, draws)
    loss = losses.hinge_discriminator(real, fake_logits).mean()
    metrics = {f"logits_real/{kind}": values.mean() for kind, values in real.items()}
    metrics |= {f"logits_fake/{kind}": values.mean() for kind, values in fake_logits.items()}
    return loss, (stats, {"loss_disc": loss, **metrics})


def update_discriminator(objective: Adversarial, disc: Player, gradient: Params, stats: Params) -> Player:
    return disc.update(gradient, objective.optimizers["disc"]).replace(stats=stats)


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
    options = objective.options
    arguments = (disc.params, disc.stats, frozen, fake, example.sigma, example.cond, draws)
    logits, _ = objective.judge(*arguments)
    adversarial = losses.hinge_generator(logits).mean()
    distance = (example.weight * losses.pseudo_huber(example.target, fake, options.huber_c)).mean()
    loss = options.adversarial_weight * adversarial + distance
    return loss, {"loss_student": loss, "loss_adversarial": adversarial, "loss_huber": distance}
