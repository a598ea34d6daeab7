"""The smallest networks that have every part, for tests in which only shapes and gradients matter."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import AxisType, Mesh

from osv_jax.convert.architectures import ARCHITECTURES, expected_params
from osv_jax.diffusion.conditioning import Conditioning
from osv_jax.models.clip_vision import CLIPVisionConfig
from osv_jax.models.dinov2 import Dinov2Config
from osv_jax.models.svd_unet import UNetConfig
from osv_jax.models.svd_vae import VAEConfig
from osv_jax.objectives.adversarial import Batch
from osv_jax.objectives.networks import Networks, build_networks
from osv_jax.objectives.random_networks import random_params

CONFIGS = {
    "unet": UNetConfig(
        block_out_channels=(32, 32),
        layers_per_block=1,
        num_attention_heads=(1, 2),
        has_attention=(True, False),
        cross_attention_dim=8,
        addition_time_embed_dim=8,
    ),
    "vae": VAEConfig(block_out_channels=(32, 32)),
    "image_encoder": CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
    ),
    "dinov2": Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28),
}

# One level, and one transformer, in the middle. Two channels for each group of a norm: with one, the norm takes away
# again what the time embedding adds.
ONE_LEVEL_UNET = dataclasses.replace(
    CONFIGS["unet"], block_out_channels=(64,), num_attention_heads=(2,), has_attention=(False,)
)


def tiny_networks(dtype=jnp.float32, **options) -> Networks:
    """Networks of `CONFIGS`, judged at both DINOv2 blocks."""
    return build_networks(CONFIGS, discriminator_blocks=(0, 1), dtype=dtype, param_dtype=dtype, **options)


def tiny_frozen(dtype=jnp.float32, seed: int = 0) -> dict:
    """Random parameters of the four frozen networks."""
    shapes = {name: unflatten_dict(expected_params(name, CONFIGS[name])) for name in ARCHITECTURES}
    return jax.tree.map(jnp.asarray, random_params(shapes, seed, dtype))


def one_device_mesh() -> Mesh:
    """The mesh of a machine with one device."""
    return jax.make_mesh(
        (1, 1, 1), ("data", "fsdp", "context"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


def tiny_batch(batch: int = 2, frames: int = 3, height: int = 6, width: int = 10, seed: int = 1) -> Batch:
    """Random latents and conditions."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    ids = jnp.broadcast_to(jnp.array([6.0, 127.0, 0.05]), (batch, 3))
    cond = Conditioning(normal(batch, 8), normal(batch, height, width, 4), ids)
    return Batch(latents=normal(batch, frames, height, width, 4), cond=cond)
