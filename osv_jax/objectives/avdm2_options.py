"""The settings of AVDM2, and the optimizers that they ask for."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import optax
from jaxtyping import Array

from osv_jax.diffusion.ddpm import NUM_TIMES
from osv_jax.errors import UserError
from osv_jax.objectives.options import setting
from osv_jax.runtime.ranges import COUNT, DECAY, FINITE, NOT_NEGATIVE, PROBABILITY, WHOLE, Range

SCORES = ("frames", "video")


@dataclasses.dataclass(frozen=True)
class AdamWOptions:
    """AdamW of the three players, each with its own count of updates; the defaults are the paper's.

    Attributes:
        motion_learning_rate, unet_learning_rate: of the student's motion modules, and of the rest of it.
        disc_learning_rate, fake_score_learning_rate: of the other players.
        b1, b2: decay of the first and second moments.
        weight_decay: decoupled.
        warmup_steps: updates in which a rate rises linearly; 0: none.
        max_grad_norm: 0: no clipping.
    """

    motion_learning_rate: float = setting(2e-5, NOT_NEGATIVE)
    unet_learning_rate: float = setting(4e-6, NOT_NEGATIVE)
    disc_learning_rate: float = setting(2e-5, NOT_NEGATIVE)
    fake_score_learning_rate: float = setting(2e-5, NOT_NEGATIVE)
    b1: float = setting(0.9, DECAY)
    b2: float = setting(0.999, DECAY)
    weight_decay: float = setting(0.01, NOT_NEGATIVE)
    warmup_steps: int = setting(500, WHOLE)
    max_grad_norm: float = setting(0.0, NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class AVDM2Options:
    """The settings of AVDM2. What the paper does not print is marked.

    Attributes:
        optimizer: of the three players.
        steps: of the student; 4 take it from t = 999, 749, 499 and 249.
        student_every: the student learns in every so manieth step, the other players in all.
        adm_weight: lambda_ADM of Eq. 9 (not printed: DMD2's).
        adm_times: the fractions of T between which the discriminator's t lies.
        discriminator_width: channels of its head at each scale (not printed).
        sdm: which score is matched: that of `frames`, by the 2-D teacher, or of the `video`, by the video teacher.
        sdm_weight: lambda_SDM of Eq. 9 (not printed: DMD2's).
        sdm_times: as `adm_times`, of score matching and of the fake score's own training.
        sdm_frames: K, the random frames of each clip (not printed); of `video` all are taken.
        sdm_guidance: of the real score, which is guided away from the empty prompt; 1: not at all (not printed).
    """

    optimizer: AdamWOptions = dataclasses.field(default_factory=AdamWOptions)
    steps: int = setting(4, Range(1, NUM_TIMES, whole=True))
    student_every: int = setting(2, COUNT)
    adm_weight: float = setting(1e-3, NOT_NEGATIVE)
    adm_times: tuple[float, ...] = setting((0.0, 0.5), PROBABILITY)
    discriminator_width: int = setting(256, COUNT)
    sdm: str = setting("frames", SCORES)
    sdm_weight: float = setting(1.0, NOT_NEGATIVE)
    sdm_times: tuple[float, ...] = setting((0.2, 0.98), PROBABILITY)
    sdm_frames: int = setting(4, COUNT)
    sdm_guidance: float = setting(7.5, FINITE)

    def __post_init__(self) -> None:
        for name in ("adm_times", "sdm_times"):
            times = getattr(self, name)
            if len(times) != 2 or times[0] > times[1]:
                raise UserError(f"config.{name}={times} must be two fractions of T, the lower first.")


def adamw(options: AdamWOptions, learning_rate: float) -> optax.GradientTransformation:
    """AdamW whose rate rises to `learning_rate` in the first `warmup_steps` updates."""

    def rate(count: Array) -> Array:
        return learning_rate * jnp.minimum(1.0, (count + 1) / max(options.warmup_steps, 1))

    return optax.adamw(rate, b1=options.b1, b2=options.b2, weight_decay=options.weight_decay)


def clipped(options: AdamWOptions, learning_rate: float) -> optax.GradientTransformation:
    """The same after clipping by the global norm, where there is any."""
    chosen = adamw(options, learning_rate)
    return optax.chain(optax.clip_by_global_norm(options.max_grad_norm), chosen) if options.max_grad_norm else chosen
