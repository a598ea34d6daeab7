"""The networks of a training run of a text-to-video student, as modules without parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from osv_jax.codec import TextCodec
from osv_jax.convert.text_to_video import check_motion_fits, check_text_fits
from osv_jax.diffusion.ddpm import NoiseNetwork
from osv_jax.errors import UserError
from osv_jax.models.clip_text import CLIPText
from osv_jax.models.layers import apply
from osv_jax.models.svd_vae import ImageVAE
from osv_jax.models.text_unet import TextUNet
from osv_jax.objectives.networks import Networks, Params

# The networks of a weights folder that `build_text_networks` needs.
COMPONENTS = ("unet_2d", "motion_adapter", "image_vae", "text_encoder")


@dataclasses.dataclass(frozen=True)
class TextNetworks:
    """Modules without parameters.

    Attributes:
        unet: AnimateDiff's, the video teacher and its student; which one depends on the parameters.
        unet_2d: its 2-D UNet alone, to which every frame is an image.
        vae: latents from pixels and back, image by image.
        text_encoder: texts to what the UNets look at.
    """

    unet: TextUNet
    unet_2d: TextUNet
    vae: ImageVAE
    text_encoder: CLIPText
    tiny_decoder: None = None

    def unet_with(self, variables: Params) -> NoiseNetwork:
        """The video UNet as the function that `diffusion.ddpm.DDPMBackbone` takes."""
        return functools.partial(apply, self.unet, variables)

    @property
    def architectures(self) -> dict[str, Any]:
        """Of the networks with frozen parameters, by their names in a weights folder."""
        configs = self.unet.config, self.unet.motion, self.vae.config, self.text_encoder.config
        return dict(zip(COMPONENTS, configs, strict=True))

    @property
    def codec(self) -> TextCodec:
        """Pixels to latents and back, and texts."""
        return TextCodec(self.vae, self.text_encoder)

    def embed_empty(self, params: Params, count: int) -> Float[Array, "b s d"]:
        """The text encoder's states of `count` empty prompts."""
        config = self.text_encoder.config
        # CLIP's begin is its last token but one, and its end, which fills what is left, the last.
        tokens = jnp.full((1, config.max_position_embeddings), config.vocab_size - 1, jnp.int32)
        tokens = tokens.at[0, 0].set(config.vocab_size - 2)
        return jnp.repeat(self.codec.embed_text(params, tokens), count, axis=0)


AnyNetworks = Networks | TextNetworks


def build_text_networks(
    configs: Mapping[str, Any], *, dtype: Any, param_dtype: Any, attention: str, remat: str
) -> TextNetworks:
    """Modules for the architectures in `configs`, of `COMPONENTS`.

    Raises:
        UserError: if the motion adapter or the text encoder was made for another UNet, or another decoder is asked for.
    """
    if "tiny_decoder" in configs:
        raise UserError("config.preview_decoder='tiny' is for SVD's students; set it to 'vae'.")
    check_motion_fits(configs["motion_adapter"], configs["unet_2d"], "config.weights")
    check_text_fits(configs["text_encoder"], configs["unet_2d"], "config.weights")
    options = {"dtype": dtype, "param_dtype": param_dtype, "attention": attention}
    unet = TextUNet(configs["unet_2d"], configs["motion_adapter"], remat=remat, **options)
    return TextNetworks(
        unet=unet,
        unet_2d=unet.clone(motion=None),
        vae=ImageVAE(configs["image_vae"], remat=remat, **options),
        text_encoder=CLIPText(configs["text_encoder"], **options),
    )
