"""An objective of one's own: everything that has to be written for one is this file, and a configuration."""

import dataclasses

import jax
import jax.numpy as jnp

from osv_jax.diffusion.edm import EDMBackbone
from osv_jax.objectives import losses
from osv_jax.objectives.objective import StudentObjective, register
from osv_jax.objectives.options import StudentOptions, setting
from osv_jax.objectives.players import TrainState, norms
from osv_jax.runtime.ranges import POSITIVE


@dataclasses.dataclass(frozen=True)
class RegressionOptions(StudentOptions):
    sigma: float = setting(1.0, POSITIVE)


@register
class Regression(StudentObjective):
    """Denoising at one level."""

    name, Options, curves = "regression", RegressionOptions, ("loss",)

    def step(self, state, frozen, batch, key):
        student = state.players["student"]

        def loss_fn(params):
            network = self.networks.unet_with(params.variables(frozen["unet"], self.options.lora.scale))
            x = batch.latents + self.options.sigma * jax.random.normal(key, batch.latents.shape)
            denoised = EDMBackbone(network, batch.cond)(x, jnp.full(len(x), self.options.sigma))
            return losses.squared_error(denoised, batch.latents).mean()

        loss, gradient = jax.value_and_grad(loss_fn)(student.params)
        players = {"student": student.update(gradient, self.optimizers["student"], self.options.ema_decay)}
        return TrainState(state.step + 1, players), {"loss": loss} | norms({"student": gradient}, players)
