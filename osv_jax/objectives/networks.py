"""The networks of a training run, as modules, and random parameters for the frozen ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from osv_jax.diffusion.edm import Network
from osv_jax.models.clip_vision import CLIPVision
from osv_jax.models.dinov2 import Dinov2
from osv_jax.models.discriminator import Discriminator
from osv_jax.models.svd_unet import SVDUNet
from osv_jax.models.svd_vae import SVDVAE

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Networks:
    """Modules without parameters.

    Attributes:
        unet: teacher, student and EMA target at once; which one depends on the parameters it is applied with.
        vae: latents from pixels and back.
        image_encoder: CLIP.
        dinov2: the discriminator's frozen features; None for an objective without a discriminator.
        discriminator: its trainable part, or None.
    """

    unet: SVDUNet
    vae: SVDVAE
    image_encoder: CLIPVision
    dinov2: Dinov2 | None
    discriminator: Discriminator | None

    def unet_with(self, variables: Params) -> Network:
        """The UNet as the function that `diffusion.edm.denoise` takes."""

        def network(sample: Array, c_noise: Array, image_embedding: Array, added_time_ids: Array) -> Array:
            return self.unet.apply(variables, sample, c_noise, image_embedding, added_time_ids)

        return network

    def encode_video(
        self, vae_params: Params, video: Float[Array, "b f h w 3"]
    ) -> Float[Array, "b f latent_h latent_w c"]:
        """Pixels in [-1, 1] to SCALED latents (the posterior's mode), one frame of every clip at a time."""

        def encode_frame(frame: Array) -> Array:
            mean, _ = self.vae.apply({"params": vae_params}, frame, method="encode")
            return mean.astype(jnp.float32)

        latents = jax.lax.map(encode_frame, video.swapaxes(0, 1)).swapaxes(0, 1)
        return latents * self.vae.config.scaling_factor

    def decode_video(
        self, vae_params: Params, latents: Float[Array, "b f latent_h latent_w c"]
    ) -> Float[Array, "b f h w 3"]:
        """SCALED latents to pixels, about [-1, 1]."""
        unscaled = latents / self.vae.config.scaling_factor
        return self.vae.apply({"params": vae_params}, unscaled, method="decode").astype(jnp.float32)


def build_networks(
    configs: Mapping[str, Any],
    *,
    discriminator_blocks: tuple[int, ...] = (2, 5, 8, 11),
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    attention: str = "auto",
    remat: str = "none",
) -> Networks:
    """Modules for the architectures in `configs`: `unet`, `vae`, `image_encoder`, and `dinov2` for a discriminator.

    The discriminator's trainable part keeps float32 parameters whatever `param_dtype` is.
    """
    options = {"dtype": dtype, "param_dtype": param_dtype, "attention": attention}
    return Networks(
        unet=SVDUNet(configs["unet"], remat=remat, **options),
        vae=SVDVAE(configs["vae"], **options),
        image_encoder=CLIPVision(configs["image_encoder"], **options),
        dinov2=Dinov2(configs["dinov2"], **options) if "dinov2" in configs else None,
        discriminator=Discriminator(discriminator_blocks, dtype=dtype) if "dinov2" in configs else None,
    )


def random_params(shapes: Mapping[str, Any], seed: int, dtype: Any) -> dict[str, Any]:
    """Random parameters for a tree of shapes, as NumPy arrays: for tests, benchmarks and the embedded demo.

    Kernels are normal with variance 1 / fan in, norms start as the identity, everything else is small. They are made
    on the host: a compiled program that fills hundreds of arrays takes XLA half a minute to build.
    """
    rng = np.random.default_rng(seed)

    def fill(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        name = path[-1].key
        if name in ("scale", "lambda1"):
            return np.ones(leaf.shape, dtype)
        std = math.prod(leaf.shape[:-1]) ** -0.5 if name == "kernel" else 0.02
        return (std * rng.standard_normal(leaf.shape, np.float32)).astype(dtype)

    return jax.tree.map_with_path(fill, shapes)
