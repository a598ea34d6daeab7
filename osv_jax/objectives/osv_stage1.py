"""Stage 1 of OSV: latent GAN pretraining (LGP, Eq. 6 and 7). Only LoRA and the discriminator learn."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from osv_jax.diffusion.edm import per_clip, sigma_grid
from osv_jax.objectives.batches import Batch
from osv_jax.objectives.consistency import Example
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Draws, register
from osv_jax.objectives.osv import OSV, OSVOptions
from osv_jax.objectives.players import TrainState


@register
class Stage1(OSV):
    """The student denoises real latents, x_t = x_0 + sigma_t eps with the INDEX of sigma uniform on the grid; the
    training target, which is also what the discriminator takes for real, are the real latents, with weight 1.
    """

    name = "stage1"
    Options = OSVOptions

    def draw(self, key: jax.Array, batch: Batch) -> Draws:
        key, of_judge = self.judge.draw(key, batch.latents.shape)
        return draw(key, batch, self.options.num_levels) | of_judge

    def example(self, state: TrainState, frozen: Params, batch: Batch, draws: Draws) -> Example:
        return example(batch, draws, self.options.num_levels)


def draw(key: jax.Array, batch: Batch, num_levels: int) -> Draws:
    """The index of each clip's noise level, counted from 0, and its noise."""
    index_key, noise_key = jax.random.split(key)
    return {
        "index": jax.random.randint(index_key, batch.latents.shape[:1], 0, num_levels),
        "noise": jax.random.normal(noise_key, batch.latents.shape),
    }


def example(batch: Batch, draws: Draws, num_levels: int) -> Example:
    """Noisy clips; the target are the clips themselves."""
    sigma = jnp.asarray(sigma_grid(num_levels))[draws["index"]]
    return Example(
        x=batch.latents + per_clip(sigma) * draws["noise"],
        sigma=sigma,
        cond=batch.cond,
        target=batch.latents,
        weight=jnp.ones_like(sigma),
    )
