"""The UNets of Stable Diffusion 1.5 and of AnimateDiff, channels-last: the second is the first with motion modules.

References: diffusers `UNet2DConditionModel`, `UNetMotionModel`, `MotionAdapter`. The parameters of AnimateDiff's UNet
are those of the 2-D UNet and those of a motion adapter, side by side in one tree.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from osv_jax.models.attention import Attention
from osv_jax.models.layers import (
    Conv,
    Dense,
    Dtype,
    FeedForward,
    TimestepEmbedding,
    rematerialise,
    timestep_embedding,
)
from osv_jax.models.norms import GroupNorm, LayerNorm
from osv_jax.models.resnet import SpatialResBlock
from osv_jax.models.unet_blocks import Level, decode, encode


@dataclasses.dataclass(frozen=True)
class TextUNetConfig:
    """The 2-D UNet, with the names and defaults of Stable Diffusion 1.5's `unet/config.json`.

    Attributes:
        has_attention: whether each level, from the finest, carries transformers (in diffusers: the block types).
        num_attention_heads: of each level (in Stable Diffusion 1.5's file: `attention_head_dim`).
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    num_attention_heads: tuple[int, ...] = (8, 8, 8, 8)
    has_attention: tuple[bool, ...] = (True, True, True, False)
    transformer_layers_per_block: int = 1
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class MotionConfig:
    """A motion adapter, with the names of its config.json and the defaults of AnimateDiff v2.

    Attributes:
        block_out_channels, motion_layers_per_block: the UNet's that it was trained with.
        motion_max_seq_length: the most frames that it has positions for: 24 in v1, 32 in v2 and v3.
        use_motion_mid_block: v2 alone has a motion module in the middle block.
    """

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    motion_layers_per_block: int = 2
    motion_num_attention_heads: int = 8
    motion_norm_num_groups: int = 32
    motion_max_seq_length: int = 32
    use_motion_mid_block: bool = True


def frame_positions(num_frames: int, channels: int) -> Float[np.ndarray, "f c"]:
    """AnimateDiff's embedding of frame indices: sines at even channels, cosines at odd ones.

    Reference: diffusers `SinusoidalPositionalEmbedding`; adapters carry it as `pos_embed.pe`.
    """
    frequencies = np.exp(np.arange(0, channels, 2) * (-np.log(10_000.0) / channels))
    angles = np.arange(num_frames)[:, None] * frequencies
    positions = np.stack([np.sin(angles), np.cos(angles)], axis=-1)
    return positions.reshape(num_frames, -1)[:, :channels].astype(np.float32)


class TransformerBlock(nn.Module):
    """Attention of the tokens to each other, then to a context or once more to each other, then feed-forward.

    Reference: diffusers `BasicTransformerBlock`.
    """

    num_heads: int
    attention: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch t c"],
        context: Float[Array, "b s d"] | None = None,
        positions: Float[np.ndarray, "t c"] | None = None,
    ) -> Float[Array, "*batch t c"]:
        """`positions` are added to what either attention sees."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def attend(name: str, y: Array, context: Array | None) -> Array:
            if positions is not None:
                y += positions.astype(y.dtype)
            return Attention(self.num_heads, implementation=self.attention, name=name, **dtypes)(y, context)

        x += attend("attn1", LayerNorm(1e-5, name="norm1", **dtypes)(x), None)
        x += attend("attn2", LayerNorm(1e-5, name="norm2", **dtypes)(x), context)
        return x + FeedForward(name="ff", **dtypes)(LayerNorm(1e-5, name="norm3", **dtypes)(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of each frame, around a shortcut.

    Reference: diffusers `Transformer2DModel`.
    """

    num_heads: int
    depth: int
    num_groups: int
    attention: str = "auto"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"], context: Float[Array, "b s d"]) -> Float[Array, "b f h w c"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, frames, height, width, channels = x.shape
        y = GroupNorm(1e-6, self.num_groups, name="norm", **dtypes)(x.reshape(-1, height, width, channels))
        # A convolution on disk; Stable Diffusion 2 has linear layers.
        y = Conv(channels, (1, 1), name="proj_in", **dtypes)(y).reshape(batch, frames, height * width, channels)
        for i in range(self.depth):
            block = TransformerBlock(self.num_heads, self.attention, name=f"transformer_blocks_{i}", **dtypes)
            y = block(y, context)
        y = Conv(channels, (1, 1), name="proj_out", **dtypes)(y.reshape(x.shape))
        return x + y


class MotionModule(nn.Module):
    """A transformer block over the frames at each position, around a shortcut.

    Reference: diffusers `AnimateDiffTransformer3D`.
    """

    config: MotionConfig
    attention: str = "auto"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
        """Raises ValueError on more frames than there are positions for."""
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, frames, height, width, channels = x.shape
        if frames > config.motion_max_seq_length:
            raise ValueError(f"The motion adapter takes up to {config.motion_max_seq_length} frames, got {frames}.")
        # Statistics over the whole clip.
        y = GroupNorm(1e-6, config.motion_norm_num_groups, name="norm", **dtypes)(x)
        y = Dense(channels, name="proj_in", **dtypes)(y).reshape(batch, frames, height * width, channels)
        heads = config.motion_num_attention_heads
        block = TransformerBlock(heads, self.attention, name="transformer_blocks_0", **dtypes)
        y = block(y.swapaxes(1, 2), positions=frame_positions(frames, channels)).swapaxes(1, 2)
        return x + Dense(channels, name="proj_out", **dtypes)(y).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class _Level(Level):
    """The layers of one resolution (`unet_blocks.Level`): the 2-D UNet's on every frame, then motion modules."""

    config: TextUNetConfig
    motion: MotionConfig | None

    def resnet(self, i: int, x: Array, temb: Array) -> Array:
        config, frames = self.config, x.reshape(-1, *x.shape[2:])
        block = rematerialise(SpatialResBlock, self.remat)(
            config.block_out_channels[self.level],
            config.norm_eps,
            config.norm_num_groups,
            name=f"resnets_{i}",
            **self.dtypes,
        )
        y = block(frames, jnp.repeat(temb, x.shape[1], axis=0))
        return y.reshape(*x.shape[:-1], -1)

    def attend(self, i: int, x: Array, context: Array) -> Array:
        config = self.config
        if self.has_attention:
            transformer = rematerialise(SpatialTransformer, self.remat)
            sizes = config.num_attention_heads[self.level], config.transformer_layers_per_block, config.norm_num_groups
            x = transformer(*sizes, self.attention, name=f"attentions_{i}", **self.dtypes)(x, context)
        if self.motion is not None:
            module = rematerialise(MotionModule, self.remat)
            x = module(self.motion, self.attention, name=f"motion_modules_{i}", **self.dtypes)(x)
        return x


class TextUNet(nn.Module):
    """eps(x_t, t, text): predicts the noise in latents, of images or of videos.

    Attributes:
        config: the 2-D UNet.
        motion: the motion modules of a video model; without them every frame is an image of its own.
        dtype: compute dtype; statistics of norms, softmax and sinusoidal embeddings stay in float32.
        param_dtype: dtype in which parameters are created.
        attention: see `attention.dot_product_attention`.
        remat: what the backward pass computes again of residual blocks, transformers and motion modules, see
            `layers.rematerialise`.
    """

    config: TextUNetConfig
    motion: MotionConfig | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    attention: str = "auto"
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "b f h w c"],
        timestep: Float[Array, " b"],
        context: Float[Array, "b s d"],
        features: bool = False,
    ) -> Float[Array, "b f h w c_out"] | tuple[Array, ...]:
        """The noise, in float32; or gives a discriminator its features, [b f h' w' c'] at each scale.

        Args:
            sample: noisy latents x_t; all frames of a clip share its time and its text.
            timestep: t, in 0 .. T - 1.
            context: the text encoder's output, a row for each token.
            features: instead of the noise, what the down blocks give, after their downsampling where they have one, and
                of blocks at the same resolution the last alone. The four blocks of Stable Diffusion 1.5 end at three
                scales, a half, a quarter and an eighth of the latents' size, which are AVDM2's (section 4.1).

        Raises:
            ValueError: a motion adapter made for another UNet, or too many frames for it.
        """
        config, motion = self.config, self.motion
        if motion is not None and (motion.block_out_channels, motion.motion_layers_per_block) != (
            config.block_out_channels,
            config.layers_per_block,
        ):
            raise ValueError(f"The motion adapter {motion} is not made for the UNet {config}.")
        channels, last = config.block_out_channels, len(config.block_out_channels) - 1
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        options: dict[str, Any] = {"config": config, "num_layers": config.layers_per_block}
        options |= {"attention": self.attention, "remat": self.remat, **dtypes}

        time_dim = 4 * channels[0]
        temb = TimestepEmbedding(time_dim, time_dim, name="time_embedding", **dtypes)(
            timestep_embedding(timestep, channels[0])
        )
        context = context.astype(self.dtype)
        x = Conv(channels[0], (3, 3), name="conv_in", **dtypes)(sample)
        down = [_Level(i, has_attention=has, motion=motion, **options) for i, has in enumerate(config.has_attention)]
        middle_motion = motion if motion is not None and motion.use_motion_mid_block else None
        middle = _Level(last, has_attention=True, motion=middle_motion, **options)
        encoded, skips = encode(x, temb, context, down, **dtypes)
        if features:
            return tuple({block.shape[2:4]: block for block in encoded}.values())
        x = decode(encoded[-1], skips, temb, context, middle, down[::-1], **dtypes)[-1]
        frames = x.reshape(-1, *x.shape[2:])
        frames = nn.silu(GroupNorm(config.norm_eps, config.norm_num_groups, name="conv_norm_out", **dtypes)(frames))
        frames = Conv(config.out_channels, (3, 3), name="conv_out", **dtypes)(frames)
        return frames.reshape(*sample.shape[:-1], -1).astype(jnp.float32)


class MotionAdapter(nn.Module):
    """The motion modules by themselves, as diffusers stores them: for their parameters' names and shapes."""

    config: MotionConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, *levels: Float[Array, "b f h w _c"]) -> None:
        """Applies every module to what its level looks like: [b f h w c] for each of `block_out_channels`."""
        layers = self.config.motion_layers_per_block
        blocks = [(f"down_blocks_{i}", x, layers) for i, x in enumerate(levels)]
        if self.config.use_motion_mid_block:
            blocks.append(("mid_block", levels[-1], 1))
        blocks += [(f"up_blocks_{i}", x, layers + 1) for i, x in enumerate(reversed(levels))]
        for name, x, count in blocks:
            _MotionModules(self.config, count, self.dtype, self.param_dtype, name=name)(x)


class _MotionModules(nn.Module):
    config: MotionConfig
    count: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> None:
        for i in range(self.count):
            dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            MotionModule(self.config, name=f"motion_modules_{i}", **dtypes)(x)
