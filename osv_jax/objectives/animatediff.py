"""AnimateDiff's own training (Guo et al. 2023), from scratch too: epsilon prediction (AVDM2 Eq. 2), in two parts.

First a text-to-image UNet learns from single frames with their captions, by Stable Diffusion 1.5's schedule; then, with
it frozen, motion modules between its layers learn from clips, by AnimateDiff's own.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from osv_jax.diffusion.ddpm import (
    NUM_TIMES,
    DDPMBackbone,
    Schedule,
    TextConditioning,
    add_noise,
    animatediff_schedule,
    ddim,
    ddim_times,
    stable_diffusion_schedule,
)
from osv_jax.diffusion.ode import Denoiser
from osv_jax.errors import UserError
from osv_jax.models.layers import apply
from osv_jax.objectives import losses
from osv_jax.objectives.accumulation import mean_over_batch
from osv_jax.objectives.batches import TextBatch
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Draws, Metrics, register
from osv_jax.objectives.options import OptimizerOptions, setting
from osv_jax.objectives.players import Player, Student, TrainState, make_optimizer, norms, start
from osv_jax.objectives.text_objective import TextObjective, draw_frames, take_frames, to_float32
from osv_jax.runtime.ranges import COUNT, DECAY, PROBABILITY

PARTS = ("unet", "motion")
# What pictures are sampled with, as AnimateDiff is.
_DDIM_STEPS = 25


def _optimizer() -> OptimizerOptions:
    return OptimizerOptions(learning_rate=1e-4, max_grad_norm=1.0)


@dataclasses.dataclass(frozen=True)
class AnimateDiffOptions:
    """Hyperparameters of denoising training.

    `grad_accum` does not change the result: the gradient is a mean over clips.

    Attributes:
        part: what learns: the 2-D `unet`, all of it, or the `motion` modules.
        optimizer: of that part.
        frames: of the 2-D UNet: how many random frames of each clip are images of a step; motion modules see all.
        dropout: the probability with which an image, or a clip, has the empty prompt in the place of its caption, for
            classifier-free guidance.
        ema_decay: of the part's exponential moving average (EMA).
        grad_accum: the number of equal parts in which a batch is processed, one after the other.
    """

    part: str = setting("motion", PARTS)
    optimizer: OptimizerOptions = dataclasses.field(default_factory=_optimizer)
    frames: int = setting(1, COUNT)
    dropout: float = setting(0.1, PROBABILITY)
    ema_decay: float = setting(0.999, DECAY)
    grad_accum: int = setting(1, COUNT)


@register
class AnimateDiff(TextObjective):
    """Denoising of real frames or clips with captions, which makes a text-to-video teacher in two runs."""

    name = "animatediff"
    Options = AnimateDiffOptions
    curves = ("loss", "grad_norm/student")
    product = "text-to-video teacher"

    @classmethod
    def check(cls, options: AnimateDiffOptions, num_frames: int) -> None:
        super().check(options, num_frames)
        if options.frames > num_frames:
            raise UserError(f"config.frames={options.frames} must be at most {num_frames}, the frames of a clip.")

    def make_optimizers(self) -> dict[str, optax.GradientTransformation]:
        return {"student": make_optimizer(self.options.optimizer)}

    def init(self, key: jax.Array, frozen: Params) -> dict[str, Player]:
        """The part that learns, as it is."""
        part = frozen["unet_2d" if self._of_images else "motion_adapter"]
        return {"student": start(Student(lora={}, tuned=to_float32(part)), self.optimizers["student"], ema=True)}

    def step(self, state: TrainState, frozen: Params, batch: TextBatch, key: jax.Array) -> tuple[TrainState, Metrics]:
        return step(self, state, frozen, batch, key)

    @property
    def _of_images(self) -> bool:
        return bool(self.options.part == "unet")

    @property
    def schedule(self) -> Schedule:
        """The one of the part that learns."""
        return stable_diffusion_schedule() if self._of_images else animatediff_schedule()

    def backbone(self, frozen: Params, student: Student | None, cond: TextConditioning) -> DDPMBackbone:
        if not self._of_images:
            return super().backbone(frozen, student, cond)
        base = frozen["unet_2d"]
        variables = {"params": base} if student is None else student.variables(base)
        return DDPMBackbone(functools.partial(apply, self.networks.unet_2d, variables), cond, self.schedule)

    @property
    def preview_label(self) -> str:
        return f"{'images' if self._of_images else 'sample'}, {_DDIM_STEPS} DDIM steps"

    def preview_denoiser(self, backbone: DDPMBackbone, num_frames: int) -> Denoiser:
        return self.teacher_denoiser(backbone, num_frames)

    def preview(self, denoiser: Denoiser, noise: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
        return self.teacher_sample(denoiser, noise, _DDIM_STEPS)

    def teacher_sample(
        self, denoiser: Denoiser, noise: Float[Array, "b f h w c"], steps: int
    ) -> Float[Array, "b f h w c"]:
        return ddim(denoiser, noise, ddim_times(steps), self.schedule)


def step(
    objective: AnimateDiff, state: TrainState, frozen: Params, batch: TextBatch, key: jax.Array
) -> tuple[TrainState, Metrics]:
    """One update of the part that learns."""
    options, student = objective.options, state.players["student"]
    whole = (batch, draw(key, batch, options))

    def gradient_of(part: tuple[TextBatch, Draws]) -> tuple[Student, Metrics]:
        return jax.grad(mean_loss, has_aux=True)(student.params, objective, frozen, *part)

    gradient, metrics = mean_over_batch(gradient_of, whole, options.grad_accum)
    players = {"student": student.update(gradient, objective.optimizers["student"], options.ema_decay)}
    return TrainState(step=state.step + 1, players=players), metrics | norms({"student": gradient}, players)


def draw(key: jax.Array, batch: TextBatch, options: AnimateDiffOptions) -> Draws:
    """All random numbers of a step: of k images of each clip or, for motion modules, of one clip each (k = 1)."""
    time_key, noise_key, drop_key, frame_key = jax.random.split(key, 4)
    clips, frames, *size = batch.latents.shape
    count, length = (options.frames, 1) if options.part == "unet" else (1, frames)
    return {
        "t": jax.random.randint(time_key, (clips, count), 0, NUM_TIMES),
        "noise": jax.random.normal(noise_key, (clips, count, length, *size)),
        "uniform": jax.random.uniform(drop_key, (clips, count)),
        "frames": draw_frames(frame_key, clips, frames, count * length),
    }


def mean_loss(
    student: Student, objective: AnimateDiff, frozen: Params, batch: TextBatch, draws: Draws
) -> tuple[Float[Array, ""], Metrics]:
    """||eps(x_t, t, c) - eps||^2 (AVDM2 Eq. 2), as a mean over images or clips and over their elements."""
    noise, t = (draws[name].reshape(-1, *draws[name].shape[2:]) for name in ("noise", "t"))
    clean = take_frames(batch.latents, draws["frames"]).reshape(noise.shape)
    cond = drop_texts(batch.cond, draws["uniform"], objective.options.dropout)
    backbone = objective.backbone(frozen, student, cond)
    noisy = add_noise(clean, noise, t, backbone.schedule)
    predicted = backbone.network(noisy, t.astype(jnp.float32), cond.context)
    loss = losses.squared_error(predicted, noise).mean()
    return loss, {"loss": loss}


def drop_texts(cond: TextConditioning, uniform: Float[Array, "b k"], probability: float) -> TextConditioning:
    """The texts of k images of each clip, with the empty prompt in the place of some.

    Args:
        uniform: random numbers in [0, 1).
    """
    count = uniform.shape[1]
    context, empty = (jnp.repeat(states, count, axis=0) for states in (cond.context, cond.negative))
    dropped = uniform.reshape(-1, 1, 1) < probability
    return TextConditioning(jnp.where(dropped, empty, context), empty)
