"""The CLIP text tower, Stable Diffusion 1.5's text encoder, and its projection beside the images'.

References: transformers' `CLIPTextModel` and `CLIPTextModelWithProjection`.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from osv_jax.models.clip_layers import CLIPEncoder, CLIPLayersConfig
from osv_jax.models.layers import Dense, Dtype
from osv_jax.models.norms import LayerNorm


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(CLIPLayersConfig):
    """Sizes, under the names of transformers' config.json; the defaults are Stable Diffusion 1.5's (CLIP ViT-L/14).

    Attributes:
        vocab_size: the end token has the highest index that prompts are made of.
        max_position_embeddings: tokens of a prompt, with its begin and end.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    vocab_size: int = 49408
    max_position_embeddings: int = 77


@dataclasses.dataclass(frozen=True)
class CLIPTextProjectionConfig(CLIPTextConfig):
    """With the size of the embeddings that texts and images share."""

    projection_dim: int = 768


class CLIPText(nn.Module):
    """Tokens to the states that a UNet's cross-attention looks at.

    Attributes:
        config: sizes.
        dtype, param_dtype: of the computation and of the parameters.
        attention: see `attention.dot_product_attention`.
    """

    config: CLIPTextConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    attention: str = "auto"

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t c"]:
        """The last layer's states after the final norm; each token sees those before it.

        Raises:
            ValueError: on more tokens than there are positions for.
        """
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return _TextModel(self.config, self.attention, name="text_model", **dtypes)(tokens)


class CLIPTextProjection(nn.Module):
    """Tokens to text embeddings, to be compared with `CLIPVision`'s image embeddings (CLIPScore)."""

    config: CLIPTextProjectionConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    attention: str = "auto"

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b projection_dim"]:
        """The states at the end tokens, projected."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        states = _TextModel(self.config, self.attention, name="text_model", **dtypes)(tokens)
        # The first of the highest tokens: what pads a prompt may be the end token, too.
        pooled = jnp.take_along_axis(states, tokens.argmax(axis=1)[:, None, None], axis=1)[:, 0]
        return Dense(self.config.projection_dim, use_bias=False, name="text_projection", **dtypes)(pooled)


class _TextModel(nn.Module):
    config: CLIPTextConfig
    attention: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t c"]:
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = _Embeddings(config, name="embeddings", **dtypes)(tokens)
        x = CLIPEncoder(config, self.attention, causal=True, name="encoder", **dtypes)(x)
        return LayerNorm(config.layer_norm_eps, name="final_layer_norm", **dtypes)(x)


class _Embeddings(nn.Module):
    config: CLIPTextConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t c"]:
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        length, limit = tokens.shape[1], config.max_position_embeddings
        if length > limit:
            raise ValueError(f"The text encoder takes up to {limit} tokens, got {length}.")
        words = nn.Embed(config.vocab_size, config.hidden_size, name="token_embedding", **dtypes)(tokens)
        positions = nn.Embed(limit, config.hidden_size, name="position_embedding", **dtypes)
        return words + positions(jnp.arange(length))
