"""The Stable Video Diffusion UNet (diffusers' `UNetSpatioTemporalConditionModel`), channels-last."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from osv_jax.models.attention import Attention, SingleKeyAttention
from osv_jax.models.layers import (
    Conv,
    Dense,
    Dtype,
    FeedForward,
    TimestepEmbedding,
    Unused,
    rematerialise,
    timestep_embedding,
)
from osv_jax.models.norms import GroupNorm, LayerNorm
from osv_jax.models.resnet import SpatioTemporalResBlock, TimeMixer
from osv_jax.models.unet_blocks import Level, decode, encode

# What a discriminator may take from the UNet: SF-V the encoder's blocks, LADD all of them.
FEATURES = ("encoder", "unet")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Architecture, with the names and defaults of SVD's `unet/config.json`.

    Attributes:
        has_attention: whether each level, from the finest, carries transformers (in diffusers: the block types).
        num_added_time_ids: fps, motion bucket and noise strength.
        num_frames: frames the checkpoint was trained on; the network itself takes any number.
    """

    in_channels: int = 8
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    num_attention_heads: tuple[int, ...] = (5, 10, 20, 20)
    has_attention: tuple[bool, ...] = (True, True, True, False)
    transformer_layers_per_block: int = 1
    cross_attention_dim: int = 1024
    addition_time_embed_dim: int = 256
    num_added_time_ids: int = 3
    num_frames: int = 14


class _SpatialTransformerBlock(nn.Module):
    """Self-attention over the tokens of each frame, the context row, feed-forward: x [b f s c], context [b k]."""

    num_heads: int
    attention: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = x.shape[-1]
        y = LayerNorm(1e-5, name="norm1", **dtypes)(x)
        x += Attention(self.num_heads, implementation=self.attention, name="attn1", **dtypes)(y)
        # The norm of the queries, which one key makes irrelevant.
        Unused((("scale", (channels,)), ("bias", (channels,))), self.param_dtype, name="norm2")()
        x += SingleKeyAttention(channels, name="attn2", **dtypes)(context)[:, None, None, :]
        return x + FeedForward(name="ff", **dtypes)(LayerNorm(1e-5, name="norm3", **dtypes)(x))


class _TemporalTransformerBlock(nn.Module):
    """Feed-forward, then the same over the frames of each position: x [b s f c], context [b k]."""

    num_heads: int
    attention: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = x.shape[-1]
        x += FeedForward(name="ff_in", **dtypes)(LayerNorm(1e-5, name="norm_in", **dtypes)(x))
        y = LayerNorm(1e-5, name="norm1", **dtypes)(x)
        x += Attention(self.num_heads, implementation=self.attention, name="attn1", **dtypes)(y)
        Unused((("scale", (channels,)), ("bias", (channels,))), self.param_dtype, name="norm2")()
        x += SingleKeyAttention(channels, name="attn2", **dtypes)(context)[:, None, None, :]
        return x + FeedForward(name="ff", **dtypes)(LayerNorm(1e-5, name="norm3", **dtypes)(x))


class TransformerSpatioTemporal(nn.Module):
    """Spatial and temporal transformer blocks in turn, blended by one learned factor, around a shortcut."""

    num_heads: int
    depth: int
    attention: str = "auto"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"], context: Float[Array, "b k"]) -> Float[Array, "b f h w c"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, frames, height, width, channels = x.shape
        y = GroupNorm(1e-6, name="norm", **dtypes)(x.reshape(batch * frames, height, width, channels))
        y = Dense(channels, name="proj_in", **dtypes)(y.reshape(batch, frames, height * width, channels))

        frame_ids = timestep_embedding(jnp.arange(frames, dtype=jnp.float32), channels)
        frame_embedding = TimestepEmbedding(4 * channels, channels, name="time_pos_embed", **dtypes)(frame_ids)
        mixer = TimeMixer(param_dtype=self.param_dtype, name="time_mixer")
        for i in range(self.depth):
            block = (self.num_heads, self.attention, self.dtype, self.param_dtype)
            y = _SpatialTransformerBlock(*block, name=f"transformer_blocks_{i}")(y, context)
            over_time = (y + frame_embedding[None, :, None, :]).swapaxes(1, 2)
            over_time = _TemporalTransformerBlock(*block, name=f"temporal_transformer_blocks_{i}")(over_time, context)
            y = mixer(y, over_time.swapaxes(1, 2))
        return x + Dense(channels, name="proj_out", **dtypes)(y).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class _Level(Level):
    """The layers of one resolution (`unet_blocks.Level`): residual blocks with or without transformers."""

    config: UNetConfig
    epsilon: float

    def resnet(self, i: int, x: Array, temb: Array) -> Array:
        block = rematerialise(SpatioTemporalResBlock, self.remat)
        channels = self.config.block_out_channels[self.level]
        return block(channels, self.epsilon, name=f"resnets_{i}", **self.dtypes)(x, temb)

    def attend(self, i: int, x: Array, context: Array) -> Array:
        if not self.has_attention:
            return x
        block = rematerialise(TransformerSpatioTemporal, self.remat)
        heads, depth = self.config.num_attention_heads[self.level], self.config.transformer_layers_per_block
        return block(heads, depth, self.attention, name=f"attentions_{i}", **self.dtypes)(x, context)


class SVDUNet(nn.Module):
    """F([c_in x, image latents]; c_noise, c): the network inside the denoiser.

    Attributes:
        config: the architecture.
        dtype: compute dtype; statistics of norms, softmax and sinusoidal embeddings stay in float32.
        param_dtype: dtype in which parameters are created.
        attention: see `attention.dot_product_attention`.
        remat: what the backward pass computes again of residual blocks and transformers, see `layers.rematerialise`.
    """

    config: UNetConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    attention: str = "auto"
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "b f h w c"],
        timestep: Float[Array, " b"],
        image_embedding: Float[Array, "b k"],
        added_time_ids: Float[Array, "b n"],
        features: str = "",
    ) -> Float[Array, "b f h w c_out"] | tuple[Array, ...]:
        """Predicts, in float32; or gives a discriminator its features, of every block [b f h' w' c'].

        Args:
            sample: scaled noisy latents and image latents, concatenated over channels.
            timestep: c_noise = ln(sigma) / 4.
            image_embedding: CLIP embedding of the first frame, the only context token of every cross-attention.
            added_time_ids: fps - 1, motion bucket, noise augmentation strength.
            features: of `FEATURES`, instead of the prediction: `encoder`, the outputs of the down blocks, after their
                downsampling where they have one; or `unet`, those of the middle and up blocks, too.
        """
        config, channels = self.config, self.config.block_out_channels
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        options: dict[str, Any] = {"config": config, "num_layers": config.layers_per_block}
        options |= {"attention": self.attention, "remat": self.remat, **dtypes}
        last = len(channels) - 1

        time_dim = 4 * channels[0]
        ids = timestep_embedding(added_time_ids.reshape(-1), config.addition_time_embed_dim)
        temb = TimestepEmbedding(time_dim, time_dim, name="time_embedding", **dtypes)(
            timestep_embedding(timestep, channels[0])
        )
        temb += TimestepEmbedding(time_dim, time_dim, name="add_embedding", **dtypes)(ids.reshape(sample.shape[0], -1))
        context = image_embedding.astype(self.dtype)

        x = Conv(channels[0], (3, 3), name="conv_in", **dtypes)(sample)
        # diffusers gives the down blocks with transformers the smaller epsilon, whatever the config says.
        down = [
            _Level(i, has_attention=has_attention, epsilon=1e-6 if has_attention else 1e-5, **options)
            for i, has_attention in enumerate(config.has_attention)
        ]
        encoded, skips = encode(x, temb, context, down, **dtypes)
        if features == "encoder":
            return tuple(encoded)
        middle = _Level(last, has_attention=True, epsilon=1e-5, **options)
        up = [dataclasses.replace(level, epsilon=1e-6) for level in reversed(down)]
        decoded = decode(encoded[-1], skips, temb, context, middle, up, **dtypes)
        if features:
            return tuple(encoded + decoded)
        frames = decoded[-1].reshape(-1, *decoded[-1].shape[2:])
        frames = nn.silu(GroupNorm(1e-5, name="conv_norm_out", **dtypes)(frames))
        frames = Conv(config.out_channels, (3, 3), name="conv_out", **dtypes)(frames)
        return frames.reshape(*sample.shape[:-1], -1).astype(jnp.float32)
