"""The teacher's guided solution of the probability flow ODE (OSV Eq. 8)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from osv_jax.diffusion.edm import per_clip

# x [b f h w c] at noise levels sigma [b] -> the clean x_0 it is taken for, [b f h w c].
Denoiser = Callable[[Array, Array], Array]


@runtime_checkable
class Backbone(Protocol):
    """A dataclass that is a denoiser, with its condition bound: `EDMBackbone`, `DDPMBackbone`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def cond(self) -> Any:
        """Arrays that begin with the batch, and what guidance leads away from as `cond.unconditional()`."""

    def __call__(self, x: Array, level: Array, /) -> Array:
        """The clean x_0 of x."""


def guided_denoiser(backbone: Backbone, guidance: Float[Array, "#b f"] | Float[Array, " f"]) -> Denoiser:
    """Classifier-free guidance D_0 + w (D - D_0), both evaluations in one batch of 2 b (OSV, below Eq. 8).

    Guiding denoised values is guiding the network's outputs, because D is affine in F, or in epsilon, with factors that
    do not depend on the condition.

    Args:
        backbone: a network with its condition.
        guidance: w for every frame, and if need be for every clip; SVD's is `linspace(1, 3, num_frames)`,
            AnimateDiff's 7.5 for all.
    """
    # Side by side for each clip, so that a sharded batch stays where it is.
    both = jax.tree.map(
        lambda *pair: jnp.stack(pair, axis=1).reshape(-1, *pair[0].shape[1:]),
        backbone.cond.unconditional(),
        backbone.cond,
    )
    with_both = dataclasses.replace(backbone, cond=both)
    weight = jnp.atleast_2d(guidance)[:, :, None, None, None]

    def denoiser(x: Array, sigma: Array) -> Array:
        x0 = with_both(jnp.repeat(x, 2, axis=0), jnp.repeat(sigma, 2))
        x0 = x0.reshape(-1, 2, *x0.shape[1:])
        unconditional, conditional = x0[:, 0], x0[:, 1]
        return unconditional + weight * (conditional - unconditional)

    return denoiser


def euler_solve(
    denoiser: Denoiser, x: Float[Array, "b f h w c"], levels: Float[Array, "m_plus_1 b"]
) -> Float[Array, "b f h w c"]:
    """m Euler steps of dx/dsigma = (x - D(x; sigma)) / sigma (OSV Eq. 8), compiled once whatever m is.

    Args:
        x: at levels[0].
        levels: the noise levels of each clip, descending; the result is at the last, which may be 0.
    """

    def step(x: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        sigma, lower = pair
        return euler_step(x, denoiser(x, sigma), per_clip(sigma), per_clip(lower)), None

    return jax.lax.scan(step, x, (levels[:-1], levels[1:]))[0]


def euler_step(x: Array, x0: Array, sigma: Array | np.floating, lower: Array | np.floating) -> Array:
    """x at sigma, taken for the clean x0, goes down to the level `lower` along dx/dsigma = (x - x0) / sigma."""
    return x + (lower - sigma) * ((x - x0) / sigma)
