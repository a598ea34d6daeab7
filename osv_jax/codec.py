"""Pixels <-> scaled latents and conditions: the one place that applies VAE, image encoder and the tiny decoder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, UInt8

from osv_jax.diffusion.conditioning import Conditioning, clip_pixels, condition_on_image
from osv_jax.errors import UserError
from osv_jax.models.clip_text import CLIPText
from osv_jax.models.clip_vision import CLIPVision
from osv_jax.models.layers import apply
from osv_jax.models.svd_vae import SVDVAE, ImageVAE, VAEConfig
from osv_jax.models.tiny_decoder import Memory, TinyDecoder, TinyDecoderConfig
from osv_jax.runtime.media import to_float

Params = Mapping[str, Any]

# What makes frames of latents: the VAE's own decoder, or TAESDV.
DECODERS = ("vae", "tiny")


def parameter_dtype(network: str, dtype: Any) -> jnp.dtype:
    """What a network's parameters are held in where the networks compute in `dtype`.

    A VAE's are float32, because its encoder computes in float32: rounded before, they would change all latents.
    """
    return jnp.dtype(jnp.float32 if network in ("vae", "image_vae") else dtype)


def check_tiny_decoder(tiny: TinyDecoderConfig, vae: VAEConfig) -> None:
    """Raises UserError unless it decodes the latents of this VAE."""
    if (tiny.downscale, tiny.latent_channels) != (vae.downscale, vae.latent_channels):
        raise UserError(
            f"The tiny decoder makes {tiny.downscale} x {tiny.downscale} pixels of a latent of {tiny.latent_channels}"
            f" channels, but the VAE {vae.downscale} x {vae.downscale} of {vae.latent_channels}: decode with the VAE."
        )


@dataclasses.dataclass(frozen=True)
class LatentCodec:
    """Between pixels and scaled latents; results are float32.

    Attributes:
        vae: a module without parameters, which each method is given.
    """

    vae: SVDVAE | ImageVAE

    def encode_mode(self, vae_params: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b latent_h latent_w c"]:
        """The mode of the posterior of images in [-1, 1], NOT scaled: what SVD is conditioned on."""
        mean, _ = apply(self.vae, {"params": vae_params}, images, method="encode")
        return mean

    def encode_video(
        self, vae_params: Params, video: Float[Array, "b f h w 3"] | UInt8[Array, "b f h w 3"]
    ) -> Float[Array, "b f latent_h latent_w c"]:
        """SCALED latents (modes) of clips in [-1, 1] or of bytes.

        One frame of every clip at a time, so that no more has to fit into memory.
        """

        def encode_frame(frame: Array) -> Array:
            return self.encode_mode(vae_params, to_float(frame) if frame.dtype == jnp.uint8 else frame)

        latents = jax.lax.map(encode_frame, video.swapaxes(0, 1)).swapaxes(0, 1)
        return latents * self.vae.config.scaling_factor

    def decode_video(
        self, vae_params: Params, latents: Float[Array, "b f latent_h latent_w c"]
    ) -> Float[Array, "b f h w 3"]:
        """Frames, about in [-1, 1], of SCALED latents."""
        unscaled = latents / self.vae.config.scaling_factor
        if not self.vae.temporal:
            images = unscaled.reshape(-1, *unscaled.shape[2:])
            frames = apply(self.vae, {"params": vae_params}, images, method="decode").astype(jnp.float32)
            return frames.reshape(*latents.shape[:2], *frames.shape[1:])
        return apply(self.vae, {"params": vae_params}, unscaled, method="decode").astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Codec(LatentCodec):
    """Between pixels and what SVD's UNet sees; results are float32.

    Attributes:
        image_encoder: as `vae`.
        tiny_decoder: what decodes fast, or None.
    """

    image_encoder: CLIPVision
    tiny_decoder: TinyDecoder | None = None

    def embed_image(self, clip_params: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b c"]:
        """CLIP embeddings of images in [-1, 1] of any size."""
        return self.embed_pixels(clip_params, self.clip_pixels(images))

    def clip_pixels(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b size size 3"]:
        """What CLIP takes of images in [-1, 1]: the whole of them, at its own size; see `conditioning.clip_pixels`."""
        return clip_pixels(images, self.image_encoder.config.image_size)

    def embed_pixels(self, clip_params: Params, pixels: Float[Array, "b size size 3"]) -> Float[Array, "b c"]:
        """CLIP embeddings of what `clip_pixels` makes."""
        return apply(self.image_encoder, {"params": clip_params}, pixels).astype(jnp.float32)

    def decode_fast(
        self, tiny_params: Params, latents: Float[Array, "b f latent_h latent_w c"], memory: Memory
    ) -> tuple[Float[Array, "b f h w 3"], Memory]:
        """Frames, about in [-1, 1], of SCALED latents by the tiny decoder, and its memory for those that follow."""
        assert self.tiny_decoder is not None, "there is no tiny decoder"
        frames, memory = apply(self.tiny_decoder, {"params": tiny_params}, latents, memory)
        return frames, memory

    def condition(
        self,
        params: Params,
        image: Float[Array, "b h w 3"],
        noise: Float[Array, "b h w 3"],
        noise_aug_strength: Float[Array, " b"],
        fps: float | int | Num[Array, " b"],
        motion_bucket_id: float | int | Num[Array, " b"],
    ) -> Conditioning:
        """`condition_on_image` with these networks.

        Args:
            params: of both, under `vae` and `image_encoder`.
            image, noise, noise_aug_strength, fps, motion_bucket_id: see there.
        """
        return condition_on_image(
            functools.partial(self.embed_pixels, params["image_encoder"]),
            functools.partial(self.encode_mode, params["vae"]),
            image,
            noise,
            noise_aug_strength,
            fps,
            motion_bucket_id,
            clip_size=self.image_encoder.config.image_size,
        )


@dataclasses.dataclass(frozen=True)
class TextCodec(LatentCodec):
    """Between pixels, prompts and what AnimateDiff's UNet sees; results are float32.

    Attributes:
        text_encoder: CLIP's text tower, as `vae`.
    """

    text_encoder: CLIPText

    def embed_text(self, text_params: Params, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """What cross-attention looks at, of the tokens of `tokenizer.Tokenizer`."""
        return apply(self.text_encoder, {"params": text_params}, tokens).astype(jnp.float32)
