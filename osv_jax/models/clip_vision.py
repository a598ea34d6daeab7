"""The CLIP vision tower with projection, SVD's image encoder (transformers' `CLIPVisionModelWithProjection`)."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from osv_jax.models.clip_layers import CLIPEncoder, CLIPLayersConfig
from osv_jax.models.layers import Conv, Dense, Dtype, parameter
from osv_jax.models.norms import LayerNorm


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(CLIPLayersConfig):
    """Sizes, under the names of transformers' config.json; the defaults are SVD's ViT-H/14."""

    projection_dim: int = 1024
    image_size: int = 224
    patch_size: int = 14


class CLIPVision(nn.Module):
    """CLIP-normalised pixels to projected image embeddings.

    Attributes:
        config: sizes.
        dtype, param_dtype: of the computation and of the parameters.
        attention: see `attention.dot_product_attention`.
    """

    config: CLIPVisionConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    attention: str = "auto"

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b projection_dim"]:
        """Encodes images of exactly `config.image_size` squared.

        Raises:
            ValueError: on any other image size.
        """
        size = self.config.image_size
        if pixels.shape[1:] != (size, size, 3):
            raise ValueError(f"CLIP takes [b, {size}, {size}, 3] pixels, got {list(pixels.shape)}.")
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        pooled = _VisionModel(self.config, attention=self.attention, name="vision_model", **dtypes)(pixels)
        return Dense(self.config.projection_dim, use_bias=False, name="visual_projection", **dtypes)(pooled)


class _VisionModel(nn.Module):
    config: CLIPVisionConfig
    attention: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b c"]:
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = _Embeddings(config, name="embeddings", **dtypes)(pixels)
        # The misspelt name is the checkpoints'.
        x = LayerNorm(config.layer_norm_eps, name="pre_layrnorm", **dtypes)(x)
        x = CLIPEncoder(config, self.attention, name="encoder", **dtypes)(x)
        return LayerNorm(config.layer_norm_eps, name="post_layernorm", **dtypes)(x[:, 0])


class _Embeddings(nn.Module):
    config: CLIPVisionConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b t c"]:
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width, patch = config.hidden_size, config.patch_size
        patches = Conv(width, (patch, patch), patch, 0, use_bias=False, name="patch_embedding", **dtypes)(pixels)
        patches = patches.reshape(len(pixels), -1, width)
        token = parameter(self, "class_embedding", nn.initializers.normal(0.02), (width,), self.param_dtype)
        tokens = jnp.broadcast_to(token.astype(self.dtype), (len(pixels), 1, width))
        x = jnp.concatenate([tokens, patches], axis=1)
        length = x.shape[1]
        return x + nn.Embed(length, width, name="position_embedding", **dtypes)(jnp.arange(length))
