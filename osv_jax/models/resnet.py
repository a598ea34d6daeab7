"""Residual blocks and resamplers that the SVD UNet and the SVD VAE share."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from osv_jax.models.layers import Conv, Dense, Dtype
from osv_jax.models.norms import GroupNorm
from osv_jax.models.products import double, shares_images


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
        shortcut = x
        if x.shape[-1] != self.out_channels:
            dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            shortcut = Conv(self.out_channels, (1, 1), name="conv_shortcut", **dtypes)(x)
        return _add_branch(self, x, shortcut, temb, (3, 3))


class TemporalResBlock(nn.Module):
    """The same block with (3, 1, 1) convolutions: along the frames, statistics over the whole clip, width unchanged.

    `temb` is one embedding a clip, added to all of its frames. `share` multiplies what the block adds to its input.
    Reference: diffusers `TemporalResnetBlock`.
    """

    epsilon: float
    num_groups: int = 32
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b f h w c"], temb: Float[Array, "b t"] | None, share: Float[Array, "1"]
    ) -> Float[Array, "b f h w c"]:
        return _add_branch(self, x, x, temb, (3, 1, 1), share)


def _add_branch(
    block: SpatialResBlock | TemporalResBlock,
    x: Array,
    shortcut: Array,
    temb: Array | None,
    window: Sequence[int],
    scale: Array | None = None,
) -> Array:
    """`shortcut`, and the residual branch of `x` times `scale`."""
    features = shortcut.shape[-1]
    dtypes = {"dtype": block.dtype, "param_dtype": block.param_dtype}
    y = nn.silu(GroupNorm(block.epsilon, block.num_groups, name="norm1", **dtypes)(x))
    y = Conv(features, window, name="conv1", **dtypes)(y)
    if temb is not None:
        shift = Dense(features, name="time_emb_proj", **dtypes)(nn.silu(temb))
        y += jnp.expand_dims(shift, range(1, y.ndim - 1))
    y = nn.silu(GroupNorm(block.epsilon, block.num_groups, name="norm2", **dtypes)(y))
    return Conv(features, window, name="conv2", **dtypes)(y, scale, shortcut)


class TimeMixer(nn.Module):
    """A learned blend of a spatial and a temporal path; see `SpatioTemporalResBlock`. Reference: `AlphaBlender`."""

    switch_mix: bool = False
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        # diffusers starts the UNet's factors at 0.5 and the VAE's at 0.
        start = nn.initializers.constant(0.0 if self.switch_mix else 0.5)
        self.mix_factor = self.param("mix_factor", start, (1,), self.param_dtype)

    def temporal_share(self) -> Float[Array, "1"]:
        """The weight of the temporal path, in float32; that of the spatial path is the rest."""
        share = nn.sigmoid(self.mix_factor.astype(jnp.float32))
        return share if self.switch_mix else 1 - share

    def __call__(self, spatial: Array, temporal: Array) -> Array:
        share = self.temporal_share()
        return ((1 - share) * spatial + share * temporal).astype(spatial.dtype)


class SpatioTemporalResBlock(nn.Module):
    """A spatial block on every frame, a temporal block on its output, and a learned blend of the two.

    The blend is `a * spatial + (1 - a) * temporal` with `a = sigmoid(mix_factor)`. As `temporal` is `spatial` and what
    the temporal block adds to it, that sum is scaled instead, and nothing is blended. Reference: diffusers
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
        share = TimeMixer(self.switch_mix, self.param_dtype, name="time_mixer").temporal_share()
        return TemporalResBlock(epsilon, name="temporal_res_block", **options)(spatial, temb, share)


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
        height, width, channels = x.shape[-3:]
        # Where devices share an image's rows, one more row than they have would be moved about between them.
        doubled = size in (None, (2 * height, 2 * width)) and not shares_images()
        if not doubled:
            x = double(x)
            x = x if size is None else x[..., : size[0], : size[1], :]
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Conv(channels, (3, 3), doubled=doubled, name="conv", **options)(x)


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
