"""Stage 1 of OSV: latent GAN pretraining (LGP, Eq. 6 and 7). Only LoRA and the discriminator learn."""

from __future__ import annotations

import jax

from osv_jax.objectives.batches import Batch
from osv_jax.objectives.example import Example, draw_noise, noisy_example
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
        return draw_noise(key, batch, self.options.num_levels) | of_judge

    def example(self, state: TrainState, frozen: Params, batch: Batch, draws: Draws) -> Example:
        return noisy_example(batch, draws, self.options.num_levels)
