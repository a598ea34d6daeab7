"""SVD's Euler sampler, consistency sampling and OSV's Time Travel Sampler: functions of a denoiser, no parameters.

They are plain loops: compile the denoiser, and the same program serves every sampler and any number of steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from osv_jax.diffusion.edm import SIGMA_MAX, SIGMA_MIN, sigma_grid
from osv_jax.diffusion.ode import Denoiser, euler_step

SAMPLERS = ("tts", "consistency", "euler")


def num_evaluations(sampler: str, steps: int, guided: bool = True) -> int:
    """Network evaluations a clip (NFE, as OSV Table 1 counts them).

    Args:
        sampler: one of `SAMPLERS`.
        steps: k.
        guided: whether Euler uses classifier-free guidance; the other samplers never do.

    Raises:
        ValueError: on an unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {SAMPLERS}, got {sampler!r}.")
    return steps * {"tts": 2, "consistency": 1, "euler": 2 if guided else 1}[sampler]


def max_steps(sampler: str, num_levels: int = 100) -> int | None:
    """The largest k of a sampler on a grid of N levels (time travel needs k + 1); Euler makes its own grid."""
    return {"tts": num_levels - 1, "consistency": num_levels, "euler": None}[sampler]


def even_levels(steps: int, num_levels: int = 100) -> Float[np.ndarray, " k"]:
    """The noise levels t_1 < ... < t_k of a k-step sampler: every N/k-th level of the training grid, up to t_N.

    Raises:
        ValueError: if k is not in 1 .. N.
    """
    if not 1 <= steps <= num_levels:
        raise ValueError(f"steps must be in 1 .. {num_levels}, got {steps}.")
    # In integers, halves upwards: what np.round does to a half depends on its neighbour.
    indices = (2 * np.arange(1, steps + 1) * num_levels + steps) // (2 * steps)
    return sigma_grid(num_levels)[indices - 1]


def euler_levels(steps: int) -> Float[np.ndarray, " k"]:
    """SVD's levels for k Euler steps: the Karras grid of k levels itself, highest first (EDM Eq. 5)."""
    return sigma_grid(steps, SIGMA_MAX, SIGMA_MIN)


def euler(
    denoiser: Denoiser, noise: Float[Array, "b f h w c"], levels: Float[np.ndarray, " k"]
) -> Float[Array, "b f h w c"]:
    """Deterministic Euler steps down to 0, as diffusers' `EulerDiscreteScheduler` takes them.

    Args:
        denoiser: with guidance if it is wanted; see `ode.guided_denoiser`.
        noise: standard normal.
        levels: descending; see `euler_levels`.
    """
    # SVD's scheduler starts with the standard deviation of noised unit-variance data.
    x = noise * np.sqrt(levels[0] ** 2 + 1)
    for sigma, lower in zip(levels, [*levels[1:], np.float32(0)], strict=True):
        x = euler_step(x, denoiser(x, _per_clip(sigma, x)), sigma, lower)
    return x


def consistency(
    denoiser: Denoiser, noise: Float[Array, "b f h w c"], levels: Float[np.ndarray, " k"], keys: Key[Array, " b"]
) -> Float[Array, "b f h w c"]:
    """Multi-step consistency sampling: predict, add FRESH noise of the next lower level, predict again.

    (Song et al. 2023, Algorithm 1, with sigma for sqrt(sigma^2 - 0.002^2).)

    Args:
        noise: standard normal, the first of the k noises.
        levels: ascending; see `even_levels`.
        keys: of the k - 1 others, one for each clip, whose noise then depends on no other.
    """
    sample = jnp.zeros_like(noise)
    for sigma, eps in zip(levels[::-1], [noise, *fresh_noises(keys, len(levels) - 1, noise)], strict=True):
        x = sample + sigma * eps
        sample = denoiser(x, _per_clip(sigma, x))
    return sample


def fresh_noises(keys: Key[Array, " b"], count: int, noise: Float[Array, "b f h w c"]) -> Float[Array, "n b f h w c"]:
    """`count` more noises like the first one; each clip's are drawn from its own key."""

    def draw(key: jax.Array) -> Array:
        return jax.random.normal(key, (count, *noise.shape[1:]), noise.dtype)

    return jax.vmap(draw, out_axes=1)(keys)


def time_travel(
    denoiser: Denoiser,
    noise: Float[Array, "b f h w c"],
    levels: Float[np.ndarray, " k"],
    finer_levels: Float[np.ndarray, " finer"],
) -> Float[Array, "b f h w c"]:
    """OSV's Time Travel Sampler (Eq. 13): 2 k evaluations.

    From x at t^k_{i+1} it predicts f, goes down to x' at t^{k+1}_{i+1} of the finer grid, predicts f' there, and goes
    on from f' at t^k_i. Both times the noise added is the mean of the INITIAL noise and the noise that the prediction
    implies. This departs from what Eq. 13 prints, twice:

    - The noise implied by f is (x - f) / sigma(t^k_{i+1}) here, as x is at that level. Printed is a division by
      sigma(t^{k+1}_{i+1}), the level of x', which is 47 times smaller for k = 1: x' would have 24 times the noise that
      its level stands for.
    - For k >= 2 it goes on at t^k_i with the mean eps_{t^k_i} = (eps_0 + (x' - f') / sigma(t^{k+1}_{i+1})) / 2, which
      Eq. 13 defines and does not use: printed is eps_0 in its place.

    Args:
        noise: eps_0, standard normal.
        levels: t^k, ascending; see `even_levels`.
        finer_levels: t^{k+1}, of which the highest is not used.

    Raises:
        ValueError: if the finer grid does not have one level more.
    """
    if len(finer_levels) != len(levels) + 1:
        raise ValueError(f"finer_levels must have {len(levels) + 1} levels, got {len(finer_levels)}.")
    # The halves of a step follow one rule: t^k_k, t^{k+1}_k, t^k_{k-1}, ..., and t^k_0 = 0 to end on a prediction.
    visited = np.stack([levels, finer_levels[:-1]], axis=1)[::-1].reshape(-1)
    x = levels[-1] * noise
    for sigma, following in zip(visited, [*visited[1:], np.float32(0)], strict=True):
        sample = denoiser(x, _per_clip(sigma, x))
        eps = (noise + (x - sample) / sigma) / 2
        x = sample + following * eps
    return x


def _per_clip(sigma: np.float32, x: Float[Array, " b *rest"]) -> Float[Array, " b"]:
    return jnp.asarray(np.full(len(x), sigma, np.float32))
