"""A stand-in for the UNets of AnimateDiff, for tests in which only what is done with them matters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import quick_jit
from flax import linen as nn
from students import perturbed

from osv_jax.diffusion.ddpm import TextConditioning
from osv_jax.models.clip_text import CLIPText, CLIPTextConfig
from osv_jax.models.layers import Dense, FeedForward
from osv_jax.models.svd_vae import ImageVAE, VAEConfig
from osv_jax.models.text_unet import MotionConfig, TextUNet, TextUNetConfig
from osv_jax.objectives.avdm2 import AVDM2
from osv_jax.objectives.avdm2_options import AVDM2Options
from osv_jax.objectives.batches import TextBatch
from osv_jax.objectives.players import first_state
from osv_jax.objectives.random_networks import random_params
from osv_jax.objectives.text_networks import TextNetworks

CONTEXT = 6
RATES = {"student": 0.5, "disc": 0.25, "fake_score": 0.1}
SGD = {name: optax.sgd(rate) for name, rate in RATES.items()}
# Weights with which no part of the loss hides another.
OPTIONS = {"discriminator_width": 8, "sdm_frames": 2, "adm_weight": 0.5, "sdm_weight": 2.0}
UNET = TextUNetConfig(
    block_out_channels=(16,), layers_per_block=1, num_attention_heads=(1,), has_attention=(True,), cross_attention_dim=8
)
MOTION = MotionConfig(block_out_channels=(16,), motion_layers_per_block=1)


class _Motion(nn.Module):
    dtype: object
    param_dtype: object

    @nn.compact
    def __call__(self, x):
        # Frames differ from those before them.
        change = x - jnp.roll(x, 1, axis=1)
        return x + Dense(x.shape[-1], name="proj_out", dtype=self.dtype, param_dtype=self.param_dtype)(change)


class ToyTextUNet(TextUNet):
    """Depends on all its inputs, has features at two scales and a motion module, and compiles at once."""

    @nn.compact
    def __call__(self, sample, timestep, context, features=False):
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        text = Dense(16, name="text", **dtypes)(context.mean(axis=1))
        shift = text + jnp.sin(timestep / 200)[:, None].astype(self.dtype)
        x = nn.silu(Dense(16, name="conv_in", **dtypes)(sample) + shift[:, None, None, None])
        x += FeedForward(name="ff", **dtypes)(x)
        if self.motion is not None:
            x = _Motion(name="motion_modules_0", **dtypes)(x)
        if features:
            return x, x[:, :, ::2, ::2]
        return Dense(4, name="conv_out", **dtypes)(x).astype(jnp.float32)


def toy_text_networks(dtype=jnp.float32):
    """Networks, and their frozen parameters."""
    unet = ToyTextUNet(UNET, MOTION, dtype, dtype)
    unet_2d = unet.clone(motion=None)
    vae, text = ImageVAE(VAEConfig(block_out_channels=(32,))), CLIPText(CLIPTextConfig())
    shapes = jax.eval_shape(
        unet.init, jax.random.key(0), jnp.zeros((1, 2, 4, 4, 4)), jnp.zeros(1), jnp.zeros((1, 3, 8))
    )
    params = jax.tree.map(jnp.asarray, random_params(shapes["params"], 0, dtype))
    frozen = {
        "unet_2d": {name: tree for name, tree in params.items() if name != "motion_modules_0"},
        "motion_adapter": {"motion_modules_0": params["motion_modules_0"]},
    }
    return TextNetworks(unet, unet_2d, vae, text), frozen


def toy_text_batch(batch=2, frames=3, height=4, width=6, seed=1):
    """Random latents and texts."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    cond = TextConditioning(normal(batch, CONTEXT, 8), normal(batch, CONTEXT, 8))
    return TextBatch(normal(batch, frames, height, width, 4), cond)


def make(networks, optimizers=SGD, **options):
    return AVDM2(networks, AVDM2Options(**(OPTIONS | options)), optimizers)


def started(objective, frozen, step=1):
    """A state in which all players have moved, before the step of a number (odd ones are the student's)."""
    players = quick_jit(objective.init)(jax.random.key(0), frozen)
    moved = {
        name: dataclasses.replace(player, params=perturbed(player.params, i))
        for i, (name, player) in enumerate(sorted(players.items()))
    }
    return dataclasses.replace(first_state(moved), step=jnp.asarray(step, jnp.int32))
