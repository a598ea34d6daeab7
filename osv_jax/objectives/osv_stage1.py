"""Stage 1 of OSV: latent GAN pretraining (LGP, Eq. 6 and 7). Only LoRA and the discriminator learn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from osv_jax.diffusion.edm import per_clip, sigma_grid
from osv_jax.objectives import adversarial
from osv_jax.objectives.adversarial import AdversarialOptions, Batch, Draws, Example
from osv_jax.objectives.networks import Networks, Params
from osv_jax.objectives.players import TrainState


def make_step(
    networks: Networks,
    optimizer_student: optax.GradientTransformation,
    optimizer_disc: optax.GradientTransformation,
    options: AdversarialOptions,
    num_levels: int = 100,
) -> adversarial.Step:
    """The step of stage 1.

    The student denoises real latents, x_t = x_0 + sigma_t eps with the INDEX of sigma uniform on the grid; the
    discriminator takes the real latents for real; the distance is to them, with weight 1.

    Args:
        num_levels: N of the grid; the paper's is 100.
    """
    grid = jnp.asarray(sigma_grid(num_levels))

    def draw(key: jax.Array, batch: Batch) -> Draws:
        index_key, noise_key = jax.random.split(key)
        return {
            "index": jax.random.randint(index_key, batch.latents.shape[:1], 0, num_levels),
            "noise": jax.random.normal(noise_key, batch.latents.shape),
        }

    def pose(state: TrainState, frozen: Params, batch: Batch, draws: Draws) -> Example:
        sigma = grid[draws["index"]]
        return Example(
            x=batch.latents + per_clip(sigma) * draws["noise"],
            sigma=sigma,
            cond=batch.cond,
            target=batch.latents,
            weight=jnp.ones_like(sigma),
        )

    return adversarial.make_step(networks, optimizer_student, optimizer_disc, options, draw, pose)
