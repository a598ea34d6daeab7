"""I3D (Carreira and Zisserman 2017) trained on Kinetics-400, whose logits FVD compares.

Reference: the TensorFlow network of DeepMind's `kinetics-i3d`. Parameters carry the names of its PyTorch port
`pytorch-i3d`; batch normalisation is that of a trained network, so its statistics are parameters like the others.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from osv_jax.models.layers import Dtype, parameter

# Of the released network; the statistics were collected with it.
_EPSILON = 1e-3
# Of the stem, by which the channels below scale.
_STEM = 64
# Output channels of each mixed block: branch 0; reduction and convolution of branches 1 and 2; branch 3.
_MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# Window and stride of the max pooling ahead of a block.
_POOLED = {"Mixed_3b": ((1, 3, 3), (1, 2, 2)), "Mixed_4b": ((3, 3, 3), (2, 2, 2)), "Mixed_5b": ((2, 2, 2), (2, 2, 2))}
# Of the average pooling at the end, after strides of 8 frames and 32 pixels.
_LAST_WINDOW = (2, 7, 7)
# Sizes that leave exactly that window's height and width, and at least its frames.
MIN_FRAMES = 9
SIDES = range(193, 225)


@dataclasses.dataclass(frozen=True)
class I3DConfig:
    """Sizes; the defaults are the released network's.

    Attributes:
        num_classes: logits.
        stem_channels: of the first convolution, a multiple of 8; all others are in proportion.
    """

    num_classes: int = 400
    stem_channels: int = _STEM


class I3D(nn.Module):
    """Video to logits.

    Attributes:
        config: sizes.
        dtype, param_dtype: of the computation and of the parameters.
    """

    config: I3DConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, video: Float[Array, "b f h w 3"]) -> Float[Array, "b classes"]:
        """Logits of videos in [-1, 1]: the mean over all positions in time.

        Raises:
            ValueError: fewer than `MIN_FRAMES` frames, or a height or width outside `SIDES`.
        """
        _, frames, height, width, _ = video.shape
        if frames < MIN_FRAMES or height not in SIDES or width not in SIDES:
            raise ValueError(
                f"I3D takes at least {MIN_FRAMES} frames of {SIDES[0]} to {SIDES[-1]} px a side, got {frames} of"
                f" {height} x {width}."
            )
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        scale = self.config.stem_channels / _STEM
        x = _Unit(self.config.stem_channels, 7, 2, name="Conv3d_1a_7x7", **dtypes)(video.astype(self.dtype))
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))
        x = _Unit(int(64 * scale), 1, name="Conv3d_2b_1x1", **dtypes)(x)
        x = _Unit(int(192 * scale), 3, name="Conv3d_2c_3x3", **dtypes)(x)
        for name, channels in _MIXED.items():
            if name in _POOLED:
                x = _max_pool(x, *_POOLED[name])
            x = _Mixed(tuple(int(scale * count) for count in channels), name=name, **dtypes)(x)
        x = nn.avg_pool(x, _LAST_WINDOW)
        x = _Unit(self.config.num_classes, 1, is_last=True, name="logits", **dtypes)(x)
        return x.mean(axis=(1, 2, 3))


class _Mixed(nn.Module):
    """Four branches side by side."""

    channels: tuple[int, ...]
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w out"]:
        def unit(name: str, channels: int, window: int) -> _Unit:
            return _Unit(channels, window, name=name, dtype=self.dtype, param_dtype=self.param_dtype)

        b0, b1a, b1b, b2a, b2b, b3b = self.channels
        branches = (
            unit("b0", b0, 1)(x),
            unit("b1b", b1b, 3)(unit("b1a", b1a, 1)(x)),
            unit("b2b", b2b, 3)(unit("b2a", b2a, 1)(x)),
            unit("b3b", b3b, 1)(_max_pool(x, (3, 3, 3), (1, 1, 1))),
        )
        return jnp.concatenate(branches, axis=-1)


class _Unit(nn.Module):
    """Convolution with a cubic window, batch normalisation, ReLU; the last of the network is only a convolution."""

    features: int
    window: int
    stride: int = 1
    is_last: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f2 h2 w2 features"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = _Conv3D(self.features, self.window, self.stride, self.is_last, name="conv3d", **dtypes)(x)
        return x if self.is_last else nn.relu(_BatchNorm(name="bn", **dtypes)(x))


class _Conv3D(nn.Module):
    """With TensorFlow's padding `SAME`: as many outputs as strides fit, the odd zero at the far end.

    Computed as a 2-D convolution of the frames under the window, stacked as channels: on a CPU XLA's 3-D convolutions
    take 2 to 7 times as long.
    """

    features: int
    window: int
    stride: int
    use_bias: bool
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f2 h2 w2 features"]:
        window, stride, channels = self.window, self.stride, x.shape[-1]
        shape = (window, window, window, channels, self.features)
        kernel = parameter(self, "kernel", nn.initializers.he_normal(), shape, self.param_dtype).astype(self.dtype)
        if window == 1:
            x = x @ kernel[0, 0, 0]
        else:
            x = _stack_frames(x, window, stride)
            kernel = kernel.transpose(1, 2, 0, 3, 4).reshape(window, window, window * channels, self.features)
            layout = ("NHWC", "HWIO", "NHWC")
            frames = x.reshape(-1, *x.shape[2:])
            frames = lax.conv_general_dilated(frames, kernel, (stride, stride), "SAME", dimension_numbers=layout)
            x = frames.reshape(*x.shape[:2], *frames.shape[1:])
        if self.use_bias:
            x += parameter(self, "bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(self.dtype)
        return x


def _stack_frames(x: Float[Array, "b f h w c"], window: int, stride: int) -> Float[Array, "b f2 h w stacked"]:
    """Every `stride`-th frame with those that share its window, the earliest in the first channels."""
    frames = x.shape[1]
    count = -(-frames // stride)
    padding = max((count - 1) * stride + window - frames, 0)
    x = jnp.pad(x, ((0, 0), (padding // 2, padding - padding // 2), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([x[:, i : i + (count - 1) * stride + 1 : stride] for i in range(window)], axis=-1)


class _BatchNorm(nn.Module):
    """Of a trained network: an affine map whose scale is 1 / sqrt(variance + epsilon)."""

    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        def leaf(name: str, init: nn.initializers.Initializer) -> Float[Array, " c"]:
            return parameter(self, name, init, x.shape[-1:], self.param_dtype).astype(jnp.float32)

        bias = leaf("bias", nn.initializers.zeros)
        mean, variance = leaf("running_mean", nn.initializers.zeros), leaf("running_var", nn.initializers.ones)
        return ((x.astype(jnp.float32) - mean) * lax.rsqrt(variance + _EPSILON) + bias).astype(self.dtype)


def _max_pool(
    x: Float[Array, "b f h w c"], window: tuple[int, int, int], strides: tuple[int, int, int]
) -> Float[Array, "b f2 h2 w2 c"]:
    """Padded as `_Conv3D`. (What is padded never is the maximum; ports pad with zeros, the same after a ReLU.)"""
    # Axis after axis is a third of the comparisons.
    for axis, (size, stride) in enumerate(zip(window, strides, strict=True)):
        if size > 1:
            windows, steps = [1, 1, 1], [1, 1, 1]
            windows[axis], steps[axis] = size, stride
            x = nn.max_pool(x, tuple(windows), tuple(steps), "SAME")
    return x
