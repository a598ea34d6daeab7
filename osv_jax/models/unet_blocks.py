"""What the UNets have in common: blocks of layers, resampling between them, skips from one half to the other.

A UNet says what a layer of each of its levels is (`Level`); the blocks say in which order layers come, and what they
are called: `resnets_0`, `downsamplers_0`, ... under `down_blocks_0`, `mid_block`, `up_blocks_0`, as in diffusers.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from osv_jax.models.layers import Dtype
from osv_jax.models.resnet import Downsample, Upsample


@dataclasses.dataclass(frozen=True)
class Level(abc.ABC):
    """The layers of one resolution, on x [b f h w c]; they become submodules of the block that calls them.

    Attributes:
        level: its number, from the finest, 0.
        num_layers: in the first half; the second has one more.
        has_attention: whether there are transformers.
        attention, remat, dtype, param_dtype: the UNet's.
    """

    level: int
    num_layers: int
    has_attention: bool
    attention: str
    remat: str
    dtype: Dtype
    param_dtype: Dtype

    @property
    def dtypes(self) -> dict[str, Any]:
        """Those of a layer's options."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @abc.abstractmethod
    def resnet(self, i: int, x: Array, temb: Array) -> Array:
        """The i-th residual block, `resnets_<i>`; temb [b t] is one embedding a clip."""

    @abc.abstractmethod
    def attend(self, i: int, x: Array, context: Array) -> Array:
        """The transformers after it, if this level has any; `context` is what they look at, by clip."""


class DownBlock(nn.Module):
    """Layers, and halving the resolution where `resample` is set."""

    layers: Level
    resample: bool
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, temb: Array, context: Array) -> tuple[Array, list[Array]]:
        """The block's output, and what the other half will need: after each layer, and the output."""
        skips = []
        for i in range(self.layers.num_layers):
            x = self.layers.attend(i, self.layers.resnet(i, x, temb), context)
            skips.append(x)
        if self.resample:
            x = Downsample(name="downsamplers_0", dtype=self.dtype, param_dtype=self.param_dtype)(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """A residual block, transformers, a residual block."""

    layers: Level

    @nn.compact
    def __call__(self, x: Array, temb: Array, context: Array) -> Array:
        x = self.layers.attend(0, self.layers.resnet(0, x, temb), context)
        return self.layers.resnet(1, x, temb)


class UpBlock(nn.Module):
    """Layers, each with a skip beside its input, and doubling the resolution where `resample` is set."""

    layers: Level
    resample: bool
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, skips: list[Array], temb: Array, context: Array) -> Array:
        """Consumes its skips from the end of the list."""
        for i in range(self.layers.num_layers + 1):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = self.layers.attend(i, self.layers.resnet(i, x, temb), context)
        if self.resample:
            height, width = skips[-1].shape[-3:-1]
            x = Upsample(name="upsamplers_0", dtype=self.dtype, param_dtype=self.param_dtype)(x, (height, width))
        return x


def encode(
    x: Array, temb: Array, context: Array, levels: Sequence[Level], dtype: Dtype, param_dtype: Dtype
) -> tuple[list[Array], list[Array]]:
    """The outputs of the down blocks of a UNet that calls this in its compact method, and the skips for `decode`."""
    blocks, skips = [], [x]
    for i, level in enumerate(levels):
        block = DownBlock(level, i < len(levels) - 1, dtype, param_dtype, name=f"down_blocks_{i}")
        x, outputs = block(x, temb, context)
        blocks.append(x)
        skips += outputs
    return blocks, skips


def decode(
    x: Array,
    skips: list[Array],
    temb: Array,
    context: Array,
    middle: Level,
    levels: Sequence[Level],
    dtype: Dtype,
    param_dtype: Dtype,
) -> list[Array]:
    """The outputs of the middle and the up blocks; `levels` are from the coarsest."""
    blocks = [MidBlock(middle, name="mid_block")(x, temb, context)]
    for i, level in enumerate(levels):
        block = UpBlock(level, i < len(levels) - 1, dtype, param_dtype, name=f"up_blocks_{i}")
        blocks.append(block(blocks[-1], skips, temb, context))
    return blocks
