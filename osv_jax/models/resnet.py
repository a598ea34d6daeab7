"""Residual blocks and resamplers that the SVD UNet and the SVD VAE share."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from osv_jax.models.layers import Conv, Dense, Dtype
from osv_jax.models.norms import GroupNorm


class SpatialResBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU, around a shortcut; statistics per image.

    The time embedding, when given, is projected and added between the convolutions. The shortcut is a 1x1 convolution
    where the number of channels changes. Reference: diffusers `ResnetBlock2D`.
    """

    out_channels: int
    epsilon: float
    num_groups: int = 32
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], temb: Float[Array, "n t"] | None = None) -> Float[Array, "n h w o"]:
        y = _residual_branch(self, x, temb, self.out_channels, (3, 3))
        if x.shape[-1] != self.out_channels:
            x = Conv(self.out_channels, (1, 1), dtype=self.dtype, param_dtype=self.param_dtype, name="conv_shortcut")(x)
        return x + y


class TemporalResBlock(nn.Module):
    """The same block with (3, 1, 1) convolutions: along the frames, statistics over the whole clip, width unchanged.

    `temb` is one embedding a clip, added to all of its frames. Reference: diffusers `TemporalResnetBlock`.
    """

    epsilon: float
    num_groups: int = 32
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b f h w c"], temb: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b f h w c"]:
        return x + _residual_branch(self, x, temb, x.shape[-1], (3, 1, 1))


def _residual_branch(
    block: SpatialResBlock | TemporalResBlock, x: Array, temb: Array | None, features: int, window: Sequence[int]
) -> Array:
    dtypes = {"dtype": block.dtype, "param_dtype": block.param_dtype}
    y = nn.silu(GroupNorm(block.epsilon, block.num_groups, name="norm1", **dtypes)(x))
    y = Conv(features, window, name="conv1", **dtypes)(y)
    if temb is not None:
        shift = Dense(features, name="time_emb_proj", **dtypes)(nn.silu(temb))
        y += jnp.expand_dims(shift, range(1, y.ndim - 1))
    y = nn.silu(GroupNorm(block.epsilon, block.num_groups, name="norm2", **dtypes)(y))
    return Conv(features, window, name="conv2", **dtypes)(y)


class TimeMixer(nn.Module):
    """A learned blend of a spatial and a temporal path; see `SpatioTemporalResBlock`. Reference: `AlphaBlender`."""

    switch_mix: bool = False
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, spatial: Array, temporal: Array) -> Array:
        # diffusers starts the UNet's factors at 0.5 and the VAE's at 0.
        start = nn.initializers.constant(0.0 if self.switch_mix else 0.5)
        alpha = nn.sigmoid(self.param("mix_factor", start, (1,), self.param_dtype).astype(jnp.float32))
        if self.switch_mix:
            alpha = 1 - alpha
        return (alpha * spatial + (1 - alpha) * temporal).astype(spatial.dtype)


class SpatioTemporalResBlock(nn.Module):
    """A spatial block on every frame, a temporal block on its output, and a learned blend of the two.

    The blend is `a * spatial + (1 - a) * temporal` with `a = sigmoid(mix_factor)`. Reference: diffusers
    `SpatioTemporalResBlock`.

    Args (attributes):
        out_channels: width of the output.
        epsilon: of the spatial norms.
        temporal_epsilon: of the temporal norms; `epsilon` when None.
        switch_mix: `a = 1 - sigmoid(mix_factor)`, as in the VAE's decoder.
        num_groups: of all norms.
    """

    out_channels: int
    epsilon: float
    temporal_epsilon: float | None = None
    switch_mix: bool = False
    num_groups: int = 32
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b f h w c"], temb: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b f h w o"]:
        options = {"num_groups": self.num_groups, "dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, frames, height, width, channels = x.shape
        spatial = SpatialResBlock(self.out_channels, self.epsilon, name="spatial_res_block", **options)(
            x.reshape(batch * frames, height, width, channels),
            None if temb is None else jnp.repeat(temb, frames, axis=0),
        ).reshape(batch, frames, height, width, self.out_channels)
        epsilon = self.epsilon if self.temporal_epsilon is None else self.temporal_epsilon
        temporal = TemporalResBlock(epsilon, name="temporal_res_block", **options)(spatial, temb)
        return TimeMixer(self.switch_mix, self.param_dtype, name="time_mixer")(spatial, temporal)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, a crop to `size` where one is given, and a 3x3 convolution (`conv`).

    The crop undoes a `Downsample` of odd sizes: for 2 n - 1 pixels it equals torch's nearest resize from n.
    """

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w c"], size: tuple[int, int] | None = None
    ) -> Float[Array, "*batch h2 w2 c"]:
        x = x.repeat(2, axis=-3).repeat(2, axis=-2)
        if size is not None:
            x = x[..., : size[0], : size[1], :]
        return Conv(x.shape[-1], (3, 3), dtype=self.dtype, param_dtype=self.param_dtype, name="conv")(x)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 (`conv`).

    `padding` is (low, high) of both axes: (1, 1) in the UNet, (0, 1) in the VAE's encoder.
    """

    padding: tuple[int, int] = (1, 1)
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch h w c"]) -> Float[Array, "*batch h2 w2 c"]:
        return Conv(
            x.shape[-1],
            (3, 3),
            strides=2,
            padding=(self.padding, self.padding),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="conv",
        )(x)
