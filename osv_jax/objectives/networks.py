"""The networks of a training run, as modules without parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from osv_jax.codec import Codec
from osv_jax.diffusion.edm import Network
from osv_jax.models.clip_vision import CLIPVision
from osv_jax.models.dinov2 import Dinov2
from osv_jax.models.discriminator import Discriminator
from osv_jax.models.layers import apply
from osv_jax.models.svd_unet import SVDUNet
from osv_jax.models.svd_vae import SVDVAE
from osv_jax.models.tiny_decoder import TinyDecoder

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
        tiny_decoder: what decodes pictures of the run instead of the VAE, or None.
    """

    unet: SVDUNet
    vae: SVDVAE
    image_encoder: CLIPVision
    dinov2: Dinov2 | None
    discriminator: Discriminator | None
    tiny_decoder: TinyDecoder | None = None

    def unet_with(self, variables: Params) -> Network:
        """The UNet as the function that `diffusion.edm.EDMBackbone` takes."""

        def network(sample: Array, c_noise: Array, image_embedding: Array, added_time_ids: Array) -> Array:
            return apply(self.unet, variables, sample, c_noise, image_embedding, added_time_ids)

        return network

    @property
    def architectures(self) -> dict[str, Any]:
        """Of the networks with frozen parameters, by their names in a weights folder."""
        modules = {name: getattr(self, name) for name in ("unet", "vae", "image_encoder", "dinov2")}
        return {name: module.config for name, module in modules.items() if module is not None}

    @property
    def codec(self) -> Codec:
        """Pixels to latents and conditions, and back."""
        return Codec(self.vae, self.image_encoder, self.tiny_decoder)


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

    `tiny_decoder` may be there, too.

    `remat` is the UNet's and the VAE's, through which losses on decoded frames go (`layers.rematerialise`). The
    discriminator's trainable part keeps float32 parameters whatever `param_dtype` is.
    """
    options = {"dtype": dtype, "param_dtype": param_dtype, "attention": attention}
    return Networks(
        unet=SVDUNet(configs["unet"], remat=remat, **options),
        vae=SVDVAE(configs["vae"], remat=remat, **options),
        image_encoder=CLIPVision(configs["image_encoder"], **options),
        dinov2=Dinov2(configs["dinov2"], **options) if "dinov2" in configs else None,
        discriminator=Discriminator(discriminator_blocks, dtype=dtype) if "dinov2" in configs else None,
        tiny_decoder=TinyDecoder(configs["tiny_decoder"], dtype, param_dtype) if "tiny_decoder" in configs else None,
    )
