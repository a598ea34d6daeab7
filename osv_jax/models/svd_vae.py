"""The autoencoders of Stable Video Diffusion, whose decoder also looks along the frames, and of Stable Diffusion 1.5.

Reference: diffusers `AutoencoderKLTemporalDecoder` and `AutoencoderKL`. Both directions work on unscaled latents: what
diffusion sees is `latent * scaling_factor`, and multiplying or dividing is the caller's business. The encoder computes
in float32 whatever the decoder computes in, as diffusers makes it where a checkpoint's config.json has `force_upcast`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from osv_jax.errors import UserError
from osv_jax.models.attention import dot_product_attention
from osv_jax.models.layers import Conv, Dense, Dtype, rematerialise
from osv_jax.models.norms import GroupNorm
from osv_jax.models.resnet import Downsample, SpatialResBlock, SpatioTemporalResBlock, Upsample
from osv_jax.runtime.precision import matmul_precision

_EPSILON = 1e-6
_TEMPORAL_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of an autoencoder, named as in a checkpoint's `vae/config.json`.

    `norm_num_groups` is always 32 in diffusers' temporal decoder. With 32 channels that leaves one to a group, and the
    norm takes away the brightness of a picture: so narrow a network needs fewer groups.

    Raises:
        UserError: on sizes that the SVD decoder is not defined for.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    in_channels: int = 3
    out_channels: int = 3
    scaling_factor: float = 0.18215
    norm_num_groups: int = 32

    def __post_init__(self) -> None:
        if self.layers_per_block != 2:
            # The reference's middle block drops its attention with one layer and ignores all layers after the second.
            raise UserError(
                f"The VAE's layers_per_block is {self.layers_per_block}, but its decoder is only defined for 2: "
                "check that vae/config.json belongs to a checkpoint of Stable Video Diffusion or Stable Diffusion 1.5."
            )
        groups = self.norm_num_groups
        if groups < 1 or any(channels % groups for channels in self.block_out_channels):
            raise UserError(
                f"The VAE's block_out_channels are {self.block_out_channels}, but its norms have {groups} groups: "
                f"choose multiples of {groups}."
            )

    @property
    def downscale(self) -> int:
        """Pixels per latent along each side (8 for SVD and SD 1.5)."""
        return 2 ** (len(self.block_out_channels) - 1)


class _VAE(nn.Module):
    """An autoencoder with an image encoder. Parameters: `encoder`, `quant_conv`, `decoder`.

    Args (attributes):
        config: sizes.
        attention: implementation for the middle blocks, see `attention.dot_product_attention`. There, `auto` means
            `xla`: one head as wide as the block (512) is beyond what the fused kernels take.
        remat: what the backward pass computes again of residual blocks and attention, see `layers.rematerialise`; for
            losses on decoded frames.
        dtype: what the decoder computes in.
    """

    config: VAEConfig
    attention: str = "auto"
    remat: str = "none"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    temporal: ClassVar[bool]

    def setup(self) -> None:
        attention = "xla" if self.attention == "auto" else self.attention
        exact = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        self.encoder = _Encoder(self.config, attention, self.remat, **exact)
        self.quant_conv = Conv(2 * self.config.latent_channels, (1, 1), **exact)
        self.decoder = _Decoder(self.config, self.temporal, attention, self.remat, self.dtype, self.param_dtype)

    def encode(self, images: Float[Array, "n h w 3"]) -> tuple[Float[Array, "n lh lw 4"], Float[Array, "n lh lw 4"]]:
        """Mean (which is the mode) and log-variance of the unscaled latents of images in [-1, 1], in float32.

        A side that the factor 8 does not divide loses its remainder: the latent's side is `side // 8`.
        """
        # On a TPU or a GPU whose other networks are bfloat16, products of float32 would be rounded, too.
        with matmul_precision(jnp.float32):
            moments = self.quant_conv(self.encoder(images))
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, logvar.clip(-30.0, 20.0)


class SVDVAE(_VAE):
    """SVD's: it decodes whole videos."""

    temporal = True

    def __call__(self, video: Float[Array, "b f h w 3"]) -> Float[Array, "b f h2 w2 3"]:
        """Reconstructs a video in [-1, 1] through the mode of its latents."""
        mean, _ = self.encode(video.reshape(-1, *video.shape[2:]))
        return self.decode(mean.reshape(*video.shape[:2], *mean.shape[1:]))

    def decode(self, latents: Float[Array, "b f lh lw 4"]) -> Float[Array, "b f h w 3"]:
        """Frames, about in [-1, 1] (not clipped), of latents already divided by `config.scaling_factor`."""
        return self.decoder(latents)


class ImageVAE(_VAE):
    """Stable Diffusion 1.5's (diffusers `AutoencoderKL`): it decodes images, and has a `post_quant_conv`, too."""

    temporal = False

    def setup(self) -> None:
        super().setup()
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.post_quant_conv = Conv(self.config.latent_channels, (1, 1), **dtypes)

    def __call__(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n h2 w2 3"]:
        """Reconstructs images in [-1, 1] through the mode of their latents."""
        return self.decode(self.encode(images)[0])

    def decode(self, latents: Float[Array, "n lh lw 4"]) -> Float[Array, "n h w 3"]:
        """Images, about in [-1, 1] (not clipped), of latents already divided by `config.scaling_factor`."""
        return self.decoder(self.post_quant_conv(latents))


class _MidAttention(nn.Module):
    """Single-head self-attention over the pixels of each image, with a GroupNorm before it and a residual around it."""

    implementation: str
    num_groups: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        n, height, width, channels = x.shape
        tokens = GroupNorm(_EPSILON, self.num_groups, name="group_norm", **dtypes)(x).reshape(
            n, height * width, channels
        )
        q, k, v = (Dense(channels, name=name, **dtypes)(tokens)[:, :, None] for name in ("to_q", "to_k", "to_v"))
        y = dot_product_attention(q, k, v, self.implementation)
        return x + Dense(channels, name="to_out_0", **dtypes)(y.reshape(x.shape))


class _Stage(nn.Module):
    """The residual blocks of one resolution, `resnets_0` ..., and the change to the next one.

    Args (attributes):
        temporal: residual blocks that also look along the frames.
        attention: attention implementation of a middle stage (`attentions_0`, after the first block), else None.
        resample: `up` or `down`, how to change the resolution at the end, or nothing.
    """

    channels: int
    num_layers: int
    temporal: bool
    remat: str
    num_groups: int
    dtype: Dtype
    param_dtype: Dtype
    attention: str | None = None
    resample: str = ""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch h w c"]) -> Float[Array, "*batch h2 w2 channels"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        block: Any = SpatialResBlock
        options: dict[str, Any] = {"num_groups": self.num_groups}
        if self.temporal:
            block = SpatioTemporalResBlock
            options |= {"temporal_epsilon": _TEMPORAL_EPSILON, "switch_mix": True}
        block, attention = rematerialise(block, self.remat), rematerialise(_MidAttention, self.remat)
        for i in range(self.num_layers):
            x = block(self.channels, _EPSILON, name=f"resnets_{i}", **options, **dtypes)(x)
            if i == 0 and self.attention is not None:
                attend = attention(self.attention, self.num_groups, name="attentions_0", **dtypes)
                x = attend(x.reshape(-1, *x.shape[-3:])).reshape(x.shape)
        if self.resample == "up":
            return Upsample(name="upsamplers_0", **dtypes)(x)
        if self.resample == "down":
            return Downsample(padding=(0, 1), name="downsamplers_0", **dtypes)(x)
        return x


class _Encoder(nn.Module):
    """Images to the moments of their latents, before `quant_conv`."""

    config: VAEConfig
    attention: str
    remat: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n lh lw moments"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        groups = self.config.norm_num_groups
        stage = {"temporal": False, "remat": self.remat, "num_groups": groups, **dtypes}
        widths, layers = self.config.block_out_channels, self.config.layers_per_block
        x = Conv(widths[0], (3, 3), name="conv_in", **dtypes)(images)
        for i, width in enumerate(widths):
            resample = "down" if i < len(widths) - 1 else ""
            x = _Stage(width, layers, resample=resample, name=f"down_blocks_{i}", **stage)(x)
        x = _Stage(widths[-1], 2, attention=self.attention, name="mid_block", **stage)(x)
        x = nn.silu(GroupNorm(_EPSILON, groups, name="conv_norm_out", **dtypes)(x))
        return Conv(2 * self.config.latent_channels, (3, 3), name="conv_out", **dtypes)(x)


class _Decoder(nn.Module):
    """Latents to pixels.

    Args (attributes):
        temporal: of videos [b f h w c], looking along the frames in every block and at the end; else of images.
    """

    config: VAEConfig
    temporal: bool
    attention: str
    remat: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, latents: Float[Array, "*batch lh lw c"]) -> Float[Array, "*batch h w 3"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        groups = self.config.norm_num_groups
        stage = {"temporal": self.temporal, "remat": self.remat, "num_groups": groups, **dtypes}
        widths, layers = self.config.block_out_channels[::-1], self.config.layers_per_block
        x = Conv(widths[0], (3, 3), name="conv_in", **dtypes)(latents)
        x = _Stage(widths[0], layers, attention=self.attention, name="mid_block", **stage)(x)
        for i, width in enumerate(widths):
            resample = "up" if i < len(widths) - 1 else ""
            x = _Stage(width, layers + 1, resample=resample, name=f"up_blocks_{i}", **stage)(x)
        # One more norm of the spatial kind: statistics per frame.
        y = GroupNorm(_EPSILON, groups, name="conv_norm_out", **dtypes)(x.reshape(-1, *x.shape[-3:])).reshape(x.shape)
        y = Conv(self.config.out_channels, (3, 3), name="conv_out", **dtypes)(nn.silu(y))
        if not self.temporal:
            return y
        return Conv(self.config.out_channels, (3, 1, 1), name="time_conv_out", **dtypes)(y)
