"""A small decoder of Stable Diffusion's latents that looks back in time, for previews and where decoding must be cheap.

Reference: TAESDV, https://github.com/madebyollin/taesdv. Every residual block with memory also sees what it was given
for the frame before, so a film can be decoded in any parts, one after the other, and is always the same.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from osv_jax.models.layers import Conv, Dtype

# Of each size, before the doubling; after the last one there is one.
BLOCKS = 3

Memory = tuple[Float[Array, "b 1 _h _w channels"], ...]


@dataclasses.dataclass(frozen=True)
class TinyDecoderConfig:
    """Sizes; the defaults are the released network's.

    Attributes:
        channels: of all layers but the first and the last.
        num_upsamples: how often the size doubles.
    """

    channels: int = 64
    latent_channels: int = 4
    num_upsamples: int = 3

    @property
    def downscale(self) -> int:
        """Pixels per latent along each side (8 for SVD)."""
        return 2**self.num_upsamples

    @property
    def memory_blocks(self) -> tuple[int, ...]:
        """The number of doublings before each block with memory."""
        return (*(level for level in range(self.num_upsamples) for _ in range(BLOCKS)), self.num_upsamples)


class TinyDecoder(nn.Module):
    """Scaled latents to frames.

    The original is one sequence of layers, whose numbers its file has, those without parameters included.

    Attributes:
        config: sizes.
        dtype, param_dtype: of the computation and of the parameters.
    """

    config: TinyDecoderConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def memory(self, latents: Float[Array, "b f lh lw c"]) -> Memory:
        """What is remembered before the first frame of such latents: zeros."""
        batch, _, height, width, _ = latents.shape
        return tuple(
            jnp.zeros((batch, 1, height << level, width << level, self.config.channels), self.dtype)
            for level in self.config.memory_blocks
        )

    @nn.compact
    def __call__(
        self, latents: Float[Array, "b f lh lw c"], memory: Memory | None = None
    ) -> tuple[Float[Array, "b f h w 3"], Memory]:
        """Frames, about in [-1, 1] (not clipped), and what the next ones need.

        Args:
            latents: as diffusion sees them, that is scaled.
            memory: what was returned for the frames before; None: these are the first.
        """
        channels, dtypes = self.config.channels, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        before = list(self.memory(latents) if memory is None else memory)
        remembered = []
        # Latents far from the usual ones are drawn in, not cut.
        x = 3 * jnp.tanh(latents.astype(self.dtype) / 3)
        x = nn.relu(Conv(channels, (3, 3), name="decoder_1", **dtypes)(x))
        number = 3
        for level in range(self.config.num_upsamples + 1):
            last = level == self.config.num_upsamples
            for _ in range(1 if last else BLOCKS):
                remembered.append(x[:, -1:])
                x = _MemoryBlock(name=f"decoder_{number}", **dtypes)(x, before.pop(0))
                number += 1
            if not last:
                x = x.repeat(2, axis=-3).repeat(2, axis=-2)
                x = Conv(channels, (3, 3), use_bias=False, name=f"decoder_{number + 1}", **dtypes)(x)
                number += 2
        x = Conv(3, (3, 3), name=f"decoder_{number}", **dtypes)(x)
        return 2 * x.astype(jnp.float32) - 1, tuple(remembered)


class _MemoryBlock(nn.Module):
    """Three convolutions of every frame and the one before, and a residual around them."""

    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"], before: Float[Array, "b 1 h w c"]) -> Float[Array, "b f h w c"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        earlier = jnp.concatenate([before.astype(x.dtype), x[:, :-1]], axis=1)
        y = jnp.concatenate([x, earlier], axis=-1)
        y = nn.relu(Conv(x.shape[-1], (3, 3), name="conv_0", **dtypes)(y))
        y = nn.relu(Conv(x.shape[-1], (3, 3), name="conv_2", **dtypes)(y))
        return nn.relu(Conv(x.shape[-1], (3, 3), name="conv_4", **dtypes)(y) + x)
