"""DDPM's noise in discrete time, networks that predict it, and samplers: Stable Diffusion 1.5 and AnimateDiff.

Levels are integer times t in 0 .. T - 1; a network's own schedule says how much signal and noise each has. Denoisers
give x_0, so that `ode.guided_denoiser` serves them, too: one is affine in the other, and guiding x_0 guides epsilon.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from osv_jax.diffusion.edm import per_clip
from osv_jax.diffusion.ode import Denoiser
from osv_jax.diffusion.samplers import fresh_noises

NUM_TIMES = 1000
_FIRST_BETA, _LAST_BETA = 0.00085, 0.012

# noisy latents [b f h w c], t [b], text [b s d] -> predicted noise [b f h w c].
NoiseNetwork = Callable[[Array, Array, Array], Array]


class Schedule(NamedTuple):
    """How much signal and noise x_t = alpha_t x_0 + sigma_t eps has, at each t; alpha^2 + sigma^2 = 1."""

    alpha: Float[np.ndarray, " times"]
    sigma: Float[np.ndarray, " times"]


def animatediff_schedule() -> Schedule:
    """AnimateDiff's: beta grows linearly."""
    return _schedule(np.linspace(_FIRST_BETA, _LAST_BETA, NUM_TIMES))


def stable_diffusion_schedule() -> Schedule:
    """Stable Diffusion 1.5's: the root of beta grows linearly."""
    return _schedule(np.linspace(_FIRST_BETA**0.5, _LAST_BETA**0.5, NUM_TIMES) ** 2)


def _schedule(betas: Float[np.ndarray, " times"]) -> Schedule:
    """alpha_t^2 = prod of 1 - beta_s, s = 0 .. t (DDPM section 2)."""
    kept = np.cumprod(1 - betas)
    return Schedule(np.sqrt(kept).astype(np.float32), np.sqrt(1 - kept).astype(np.float32))


def add_noise(
    x0: Float[Array, "b f h w c"], noise: Float[Array, "b f h w c"], t: Int[Array, " b"], schedule: Schedule
) -> Float[Array, "b f h w c"]:
    """x_t = alpha_t x_0 + sigma_t eps (AVDM2 Eq. 1)."""
    alpha, sigma = _at(schedule, t)
    return alpha * x0 + sigma * noise


def remove_noise(
    x: Float[Array, "b f h w c"], noise: Float[Array, "b f h w c"], t: Int[Array, " b"], schedule: Schedule
) -> Float[Array, "b f h w c"]:
    """x_0 = (x_t - sigma_t eps) / alpha_t (AVDM2, below Eq. 2)."""
    alpha, sigma = _at(schedule, t)
    return (x - sigma * noise) / alpha


def _at(schedule: Schedule, t: Int[Array, " b"]) -> tuple[Array, Array]:
    return per_clip(jnp.asarray(schedule.alpha)[t]), per_clip(jnp.asarray(schedule.sigma)[t])


@flax.struct.dataclass
class TextConditioning:
    """The texts of a batch of clips, as the text encoder's states.

    Attributes:
        context: of the prompts.
        negative: of the negative prompts, or of empty ones: what guidance leads away from.
    """

    context: Float[Array, "b s d"]
    negative: Float[Array, "b s d"]

    def unconditional(self) -> TextConditioning:
        """The condition of the other half of classifier-free guidance."""
        return dataclasses.replace(self, context=self.negative)


@dataclasses.dataclass(frozen=True)
class DDPMBackbone:
    """G(x_t, t) = (x_t - sigma_t eps(x_t, t, c)) / alpha_t (AVDM2, below Eq. 2), with its condition bound.

    Attributes:
        network: eps, with its parameters.
        cond: the condition.
        schedule: the one that the network was trained with.
    """

    network: NoiseNetwork
    cond: TextConditioning
    schedule: Schedule

    def __call__(self, x: Float[Array, "b f h w c"], t: Int[Array, " b"]) -> Float[Array, "b f h w c"]:
        """The clean latents, float32, of noisy ones at one time a clip."""
        noise = self.network(x, t.astype(jnp.float32), self.cond.context)
        return remove_noise(x, noise, t, self.schedule)


def ddim_times(steps: int) -> Int[np.ndarray, " k"]:
    """The times of k DDIM steps, as AnimateDiff takes them: every T/k-th from 1 upwards, highest first.

    Reference: diffusers' `DDIMScheduler` with `steps_offset=1`.

    Raises:
        ValueError: if k is not in 1 .. T / 2.
    """
    _check_steps(steps, NUM_TIMES // 2)
    return (np.arange(steps) * (NUM_TIMES // steps) + 1)[::-1].astype(np.int32)


def few_step_times(steps: int) -> Int[np.ndarray, " k"]:
    """The times of a student of k steps: every T/k-th from T - 1 downwards; of four 999, 749, 499, 249.

    Raises:
        ValueError: if k is not in 1 .. T.
    """
    _check_steps(steps, NUM_TIMES)
    return (NUM_TIMES - 1 - np.arange(steps) * NUM_TIMES // steps).astype(np.int32)


def _check_steps(steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise ValueError(f"steps must be in 1 .. {most}, got {steps}.")


def ddim_step(
    x: Array, x0: Array, level: tuple[np.floating, np.floating], lower: tuple[np.floating, np.floating]
) -> Array:
    """x_s = alpha_s x_0 + sigma_s eps, with the eps that x_t and x_0 imply (DDIM Eq. 12 without noise).

    Args:
        x: x_t.
        x0: what it is taken for.
        level, lower: alpha and sigma at t and at s.
    """
    noise = (x - level[0] * x0) / level[1]
    return lower[0] * x0 + lower[1] * noise


def ddim(
    denoiser: Denoiser, noise: Float[Array, "b f h w c"], times: Int[np.ndarray, " k"], schedule: Schedule
) -> Float[Array, "b f h w c"]:
    """Deterministic DDIM steps down to clean latents: the teacher's sampler, of 25 steps.

    Args:
        denoiser: with guidance if it is wanted; see `ode.guided_denoiser`.
        noise: standard normal.
        times: descending; see `ddim_times`.
    """
    # Below the lowest time there is no noise (diffusers' `set_alpha_to_one`).
    levels = [*((schedule.alpha[t], schedule.sigma[t]) for t in times), (np.float32(1), np.float32(0))]
    x = noise
    for t, level, lower in zip(times, levels, levels[1:], strict=False):
        x = ddim_step(x, denoiser(x, jnp.full(len(x), t)), level, lower)
    return x


def few_step(
    denoiser: Denoiser,
    noise: Float[Array, "b f h w c"],
    times: Int[np.ndarray, " k"],
    schedule: Schedule,
    keys: Key[Array, " b"],
) -> Float[Array, "b f h w c"]:
    """The student's sampler: predict, add FRESH noise of the next time, predict again (AVDM2 section 4.1).

    Args:
        denoiser: without guidance.
        noise: standard normal; it is all that there is at the first time.
        times: descending; see `few_step_times`.
        keys: of the k - 1 other noises, one for each clip, whose noise then depends on no other.
    """
    x0 = denoiser(noise, jnp.full(len(noise), times[0]))
    for t, eps in zip(times[1:], fresh_noises(keys, len(times) - 1, noise), strict=True):
        time = jnp.full(len(noise), t)
        x0 = denoiser(add_noise(x0, eps, time, schedule), time)
    return x0


def few_step_input(
    denoiser: Denoiser,
    noise: Float[Array, "b f h w c"],
    fresh: Float[Array, "b k_minus_1 f h w c"],
    stop: Int[Array, ""],
    times: Int[np.ndarray, " k"],
    schedule: Schedule,
) -> Float[Array, "b f h w c"]:
    """What `few_step` gives its denoiser at the time number `stop`, for training there (AVDM2 Algorithm 1, line 5).

    It is a loop of `stop` rounds, a number that is only known when the compiled program runs.

    Args:
        fresh: the noises after the first; a stop at k - 1 needs all of them.
        stop: 0 .. k - 1, the same for the whole batch: devices that share a network's parameters go in step.
    """

    def lower(i: Array, x: Array) -> Array:
        t = jnp.asarray(times)
        x0 = denoiser(x, jnp.full(len(x), t[i]))
        return add_noise(x0, fresh[:, i], jnp.full(len(x), t[i + 1]), schedule)

    # (Of a single time there is no noise that the round, which is traced all the same, could take.)
    return jax.lax.fori_loop(0, stop, lower, noise) if len(times) > 1 else noise
