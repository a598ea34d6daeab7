"""What a student is given in a step, and what it is held against."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from osv_jax.diffusion.conditioning import Conditioning
from osv_jax.diffusion.edm import per_clip, sigma_grid
from osv_jax.objectives.batches import Batch
from osv_jax.objectives.objective import Draws


@struct.dataclass
class Example:
    """Student input and training target of some clips.

    Attributes:
        x, sigma, cond: the student input: noisy latents, their noise level, the condition.
        target: the training target, which the output is regressed to and a discriminator takes for real.
        weight: of the distance to the target, per clip.
        judge_cond: what a judge is given for their condition: `cond`, or what has been made of it for the judge.
    """

    x: Float[Array, "b f h w c"]
    sigma: Float[Array, " b"]
    cond: Conditioning
    target: Float[Array, "b f h w c"]
    weight: Float[Array, " b"]
    judge_cond: Any


def draw_noise(key: jax.Array, batch: Batch, num_levels: int, first: int = 0) -> Draws:
    """The index of each clip's level on a grid, uniform from `first` on and counted from 0, and its noise."""
    index_key, noise_key = jax.random.split(key)
    return {
        "index": jax.random.randint(index_key, batch.latents.shape[:1], first, num_levels),
        "noise": jax.random.normal(noise_key, batch.latents.shape),
    }


def noisy_example(batch: Batch, draws: Draws, num_levels: int, weight: float = 1.0) -> Example:
    """x_t = x_0 + sigma_t eps; the target are the real latents x_0.

    Args:
        draws: of `draw_noise`.
        weight: of the distance.
    """
    sigma = jnp.asarray(sigma_grid(num_levels))[draws["index"]]
    x = batch.latents + per_clip(sigma) * draws["noise"]
    weights, cond = jnp.full_like(sigma, weight), batch.cond
    return Example(x=x, sigma=sigma, cond=cond, target=batch.latents, weight=weights, judge_cond=cond)
