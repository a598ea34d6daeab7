"""The five networks of a training run, as modules, and how their frozen parameters are made up for tests and demos."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from osv_jax.diffusion.edm import Network
from osv_jax.models.clip_vision import CLIPVision, CLIPVisionConfig
from osv_jax.models.dinov2 import Dinov2, Dinov2Config
from osv_jax.models.discriminator import Discriminator
from osv_jax.models.svd_unet import SVDUNet, UNetConfig
from osv_jax.models.svd_vae import SVDVAE, VAEConfig

Params = Mapping[str, Any]

# The frozen networks, in the order in which they are loaded, with their configuration classes. The names are the
# folders of a converted checkpoint and the keys of the frozen parameters.
COMPONENTS = {"unet": UNetConfig, "vae": VAEConfig, "image_encoder": CLIPVisionConfig, "dinov2": Dinov2Config}


@dataclasses.dataclass(frozen=True)
class Networks:
    """Modules without parameters.

    Attributes:
        unet: teacher, student and EMA target at once; which one depends on the parameters it is applied with.
        vae: latents from pixels and back.
        image_encoder: CLIP.
        dinov2: the discriminator's frozen features.
        discriminator: its trainable part.
    """

    unet: SVDUNet
    vae: SVDVAE
    image_encoder: CLIPVision
    dinov2: Dinov2
    discriminator: Discriminator

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
    """Modules for the architectures in `configs`, one for each of `COMPONENTS`.

    The discriminator's trainable part keeps float32 parameters whatever `param_dtype` is.

    Raises:
        ValueError: when a discriminator block does not exist.
    """
    depth = configs["dinov2"].num_hidden_layers
    if max(discriminator_blocks) >= depth:
        raise ValueError(f"discriminator blocks must lie in 0 .. {depth - 1}, got {discriminator_blocks}.")
    options = {"dtype": dtype, "param_dtype": param_dtype, "attention": attention}
    return Networks(
        unet=SVDUNet(configs["unet"], remat=remat, **options),
        vae=SVDVAE(configs["vae"], **options),
        image_encoder=CLIPVision(configs["image_encoder"], **options),
        dinov2=Dinov2(configs["dinov2"], **options),
        discriminator=Discriminator(discriminator_blocks, dtype=dtype),
    )


def init_frozen(networks: Networks, key: jax.Array) -> dict[str, Params]:
    """Random parameters of the frozen networks (for shapes, tests and the embedded demo)."""
    unet, vae, clip, dino = (getattr(networks, name).config for name in COMPONENTS)
    size = 2 ** (len(unet.block_out_channels) - 1)
    pixels = 2 ** (len(vae.block_out_channels) - 1)
    inputs = {
        "unet": (
            jnp.zeros((1, 2, size, size, unet.in_channels)),
            jnp.zeros(1),
            jnp.zeros((1, unet.cross_attention_dim)),
            jnp.zeros((1, unet.num_added_time_ids)),
        ),
        "vae": (jnp.zeros((1, 1, pixels, pixels, 3)),),
        "image_encoder": (jnp.zeros((1, clip.image_size, clip.image_size, 3)),),
        "dinov2": (jnp.zeros((1, dino.patch_size, dino.patch_size, 3)), (0,)),
    }
    keys = jax.random.split(key, len(COMPONENTS))
    return {
        name: getattr(networks, name).init(component_key, *inputs[name])["params"]
        for name, component_key in zip(COMPONENTS, keys, strict=True)
    }
