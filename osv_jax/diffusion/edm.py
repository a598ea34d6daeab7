"""Noise levels and the denoiser of SVD: EDM preconditioning with v-prediction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from osv_jax.diffusion.conditioning import Conditioning

# sample [b f h w 8], c_noise [b], image embedding [b k], added time ids [b 3] -> prediction [b f h w 4].
Network = Callable[[Array, Array, Array, Array], Array]

SIGMA_MIN = 0.002
SIGMA_MAX = 700.0
BOUNDARIES = ("svd", "exact")


def discretised_lognormal(levels: Float[np.ndarray, " n"], log_mean: float, log_std: float) -> Float[np.ndarray, " n"]:
    """How probable each noise level is, ln sigma being normal: SF-V Eq. 7.

    A level gets the probability of the interval from the level below it; the lowest gets that of everything below it,
    and what lies above the highest is shared out in proportion; it has all, if float64 has nothing for the others. (The
    paper prints log(sigma - P_mean) for log(sigma) - P_mean, and a negative P_std.)

    Args:
        levels: ascending, above 0.
        log_mean, log_std: P_mean and P_std.
    """
    # Not by 1 + erf, of which nothing is left some six deviations below the mean.
    below = [math.erfc((log_mean - math.log(level)) / (math.sqrt(2) * log_std)) for level in levels]
    mass = np.diff(below, prepend=0.0)
    if not mass.any():
        mass[-1] = 1.0
    return (mass / mass.sum()).astype(np.float32)


class Scalings(NamedTuple):
    """c_skip, c_out, c_in and c_noise, each of sigma's shape."""

    c_skip: Array
    c_out: Array
    c_in: Array
    c_noise: Array


def sigma_grid(
    num_levels: int = 100, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = 7.0
) -> Float[np.ndarray, " n"]:
    """Karras noise levels t_1 < ... < t_N, evenly spaced in sigma^(1/rho) (EDM Eq. 5; OSV section 5: N = 100)."""
    ramp = np.linspace(sigma_min ** (1 / rho), sigma_max ** (1 / rho), num_levels)
    return (ramp**rho).astype(np.float32)


def scalings(sigma: Float[Array, "*b"], boundary: str = "svd") -> Scalings:
    """SVD's preconditioning (SF-V Eq. 2).

    Args:
        sigma: noise levels, 0 or more.
        boundary: `svd` is the teacher's own: at sigma = 0.002 it meets c_skip = 1, c_out = 0 (OSV Eq. 4) to 0.2%.
            `exact` shifts sigma so that the two hold to the letter there.

    Raises:
        ValueError: on an unknown boundary.
    """
    if boundary not in BOUNDARIES:
        raise ValueError(f"boundary must be one of {BOUNDARIES}, got {boundary!r}.")
    shifted = sigma - SIGMA_MIN if boundary == "exact" else sigma
    norm = jnp.sqrt(sigma**2 + 1)
    # c_noise of sigma = 0 is never used (c_out is 0 there), but it must be finite.
    positive = jnp.where(sigma > 0, sigma, 1.0)
    return Scalings(1 / (shifted**2 + 1), -shifted / norm, 1 / norm, jnp.log(positive) / 4)


def per_clip(values: Float[Array, " b"]) -> Float[Array, "b 1 1 1 1"]:
    """One number a clip, shaped to multiply video arrays."""
    return values[:, None, None, None, None]


def network_inputs(
    x: Float[Array, "b f h w c"], sigma: Float[Array, " b"], cond: Conditioning
) -> tuple[Array, Array, Array, Array]:
    """What F is given: [c_in x, image latents], c_noise, the image's embedding, the added time ids."""
    c = scalings(sigma)
    image_latents = jnp.broadcast_to(cond.image_latents[:, None], x.shape)
    sample = jnp.concatenate([per_clip(c.c_in) * x, image_latents], axis=-1)
    return sample, c.c_noise, cond.image_embedding, cond.added_time_ids


@dataclasses.dataclass(frozen=True)
class EDMBackbone:
    """D(x; sigma, c) = c_skip x + c_out F([c_in x, image latents]; c_noise, c) (SF-V Eq. 2, OSV Eq. 4).

    A network with its condition and its parameterisation bound, so that who uses it needs to know neither: any callable
    `(x, sigma) -> x_0` that is a dataclass with a field `cond` can stand in its place. It is the teacher's denoiser and
    the student's consistency function f(x, t) alike: which one depends on the parameters in `network`.

    Attributes:
        network: F, with its parameters.
        cond: the condition; its image latents are repeated over the frames here.
        boundary: see `scalings`.
    """

    network: Network
    cond: Conditioning
    boundary: str = "svd"

    def __call__(self, x: Float[Array, "b f h w c"], sigma: Float[Array, " b"]) -> Float[Array, "b f h w c"]:
        """The denoised latents, float32.

        Args:
            x: noisy latents x_0 + sigma eps, float32.
            sigma: one noise level a clip.
        """
        c = scalings(sigma, self.boundary)
        prediction = self.network(*network_inputs(x, sigma, self.cond))
        return per_clip(c.c_skip) * x + per_clip(c.c_out) * prediction
