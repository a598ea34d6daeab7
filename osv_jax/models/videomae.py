"""VideoMAE (Tong et al. 2022) fine-tuned to classify videos, whose pooled features content-debiased FVD compares.

Reference: transformers' `VideoMAEForVideoClassification`, and the network of the VideoMAE V2 checkpoints, which is the
same. Parameters carry the names of the latter; query, key and value are apart.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from osv_jax.models.attention import dot_product_attention
from osv_jax.models.layers import Dense, Dtype, gelu, parameter
from osv_jax.models.norms import LayerNorm


@dataclasses.dataclass(frozen=True)
class VideoMAEConfig:
    """Sizes, under the names of transformers' config.json; the defaults are ViT-g/14, which CD-FVD takes.

    Attributes:
        fc_norm_eps: of the norm after pooling (1e-5 in transformers, whatever its `layer_norm_eps`).
    """

    hidden_size: int = 1408
    num_hidden_layers: int = 40
    num_attention_heads: int = 16
    intermediate_size: int = 6144
    layer_norm_eps: float = 1e-6
    fc_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 14
    num_frames: int = 16
    tubelet_size: int = 2


class VideoMAE(nn.Module):
    """Video to one feature vector.

    Attributes:
        config: sizes.
        dtype, param_dtype: of the computation and of the parameters.
        attention: see `attention.dot_product_attention`.
    """

    config: VideoMAEConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    attention: str = "auto"

    @nn.compact
    def __call__(self, video: Float[Array, "b f h w 3"]) -> Float[Array, "b c"]:
        """The normalised mean over all tokens, which the classifier would receive.

        Raises:
            ValueError: on any other size than the one that the network was trained at.
        """
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        wanted = (config.num_frames, config.image_size, config.image_size)
        if video.shape[1:4] != wanted:
            raise ValueError(f"VideoMAE takes videos of [f, h, w] = {list(wanted)}, got {list(video.shape[1:4])}.")
        window = (config.tubelet_size, config.patch_size, config.patch_size)
        x = _PatchEmbed(config.hidden_size, window, name="patch_embed", **dtypes)(video)
        x += _sinusoids(x.shape[1], config.hidden_size).astype(self.dtype)
        for i in range(config.num_hidden_layers):
            x = _Block(config, self.attention, name=f"blocks_{i}", **dtypes)(x)
        return LayerNorm(config.fc_norm_eps, name="fc_norm", **dtypes)(x.mean(axis=1))


class _PatchEmbed(nn.Module):
    features: int
    window: tuple[int, int, int]
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, video: Float[Array, "b f h w 3"]) -> Float[Array, "b t c"]:
        return _Patches(self.features, self.window, self.dtype, self.param_dtype, name="proj")(video)


class _Patches(nn.Module):
    """A 3-D convolution whose windows do not overlap: one product."""

    features: int
    window: tuple[int, int, int]
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, video: Float[Array, "b f h w 3"]) -> Float[Array, "b t c"]:
        t, p, q = self.window
        batch, frames, height, width, channels = video.shape
        shape = (*self.window, channels, self.features)
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        patches = video.reshape(batch, frames // t, t, height // p, p, width // q, q, channels)
        patches = patches.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, -1, t * p * q * channels)
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
        return patches.astype(self.dtype) @ kernel.reshape(-1, self.features) + bias


class _Block(nn.Module):
    config: VideoMAEConfig
    attention: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = LayerNorm(config.layer_norm_eps, name="norm1", **dtypes)(x)
        x += _Attention(config.num_attention_heads, self.attention, name="attn", **dtypes)(y)
        y = LayerNorm(config.layer_norm_eps, name="norm2", **dtypes)(x)
        return x + _MLP(config.intermediate_size, name="mlp", **dtypes)(y)


class _Attention(nn.Module):
    """Queries and values have a bias; one of the keys would change nothing."""

    num_heads: int
    implementation: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = x.shape[-1]

        def bias(name: str) -> Float[Array, " c"]:
            return parameter(self, name, nn.initializers.zeros, (channels,), self.param_dtype).astype(self.dtype)

        def heads(y: Float[Array, "b t c"]) -> Float[Array, "b t n d"]:
            return y.reshape(*y.shape[:2], self.num_heads, -1)

        q, k, v = (Dense(channels, use_bias=False, name=name, **dtypes)(x) for name in ("query", "key", "value"))
        y = dot_product_attention(heads(q + bias("q_bias")), heads(k), heads(v + bias("v_bias")), self.implementation)
        return Dense(channels, name="proj", **dtypes)(y.reshape(x.shape))


class _MLP(nn.Module):
    hidden_features: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = gelu(Dense(self.hidden_features, name="fc1", **dtypes)(x))
        return Dense(x.shape[-1], name="fc2", **dtypes)(y)


def _sinusoids(positions: int, channels: int) -> Float[np.ndarray, "positions channels"]:
    """Fixed position embeddings: pairs of sine and cosine, periods from 2 pi to 20,000 pi."""
    frequencies = 10_000.0 ** (-2 * (np.arange(channels) // 2) / channels)
    angles = np.arange(positions)[:, None] * frequencies
    return np.where(np.arange(channels) % 2, np.cos(angles), np.sin(angles)).astype(np.float32)
