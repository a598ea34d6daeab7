"""DINOv2, the frozen feature extractor of the discriminator (transformers' `Dinov2Model`, with or without registers).

Parameters carry the names of the released checkpoint files, which differ from those of transformers' modules.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from osv_jax.models.attention import dot_product_attention
from osv_jax.models.layers import Conv, Dense, Dtype, gelu, parameter
from osv_jax.models.norms import LayerNorm
from osv_jax.models.resize import resize_bicubic

# In the place of a block's number: the embedded patches, before all blocks.
EMBEDDING = -1
READS = ("patches", "class", "sum")


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """Sizes, under the names of transformers' config.json; the defaults are ViT-S/14.

    `image_size` is the one the position embeddings were trained at; images of any multiple of `patch_size` are taken.
    """

    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    mlp_ratio: float | int = 4
    layer_norm_eps: float = 1e-6
    image_size: int = 518
    patch_size: int = 14
    use_swiglu_ffn: bool = False
    num_register_tokens: int = 0


class Dinov2(nn.Module):
    """ImageNet-normalised pixels to patch features.

    Attributes:
        config: sizes.
        dtype, param_dtype: of the computation and of the parameters.
        attention: see `attention.dot_product_attention`.
    """

    config: Dinov2Config
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    attention: str = "auto"

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "n h w 3"], blocks: tuple[int, ...], read: str = "patches"
    ) -> tuple[Float[Array, "n grid_h grid_w c"], ...] | tuple[Float[Array, "n c"], ...]:
        """Tokens after the given blocks, before the final norm.

        Args:
            pixels: images whose sides are multiples of `config.patch_size`.
            blocks: transformer blocks, counted from 0; `EMBEDDING` is what enters the first. The features come back in
                this order. Under `jit`, blocks after the last one asked for cost nothing.
            read: which tokens, of `READS`: the `patches`; the `class` token, one an image; or the `sum` of each patch
                and the class token (the readout of Projected GAN and StyleGAN-T).

        Raises:
            ValueError: on an image size that is not whole patches, a block that does not exist, or an unknown `read`.
        """
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        depth = config.num_hidden_layers
        if not all(EMBEDDING <= block < depth for block in blocks):
            raise ValueError(f"blocks must lie in {EMBEDDING} .. {depth - 1}, got {blocks}.")
        if read not in READS:
            raise ValueError(f"read must be one of {READS}, got {read!r}.")
        n, height, width, _ = pixels.shape
        if height % config.patch_size or width % config.patch_size:
            raise ValueError(f"DINOv2 takes sides that are multiples of {config.patch_size}, got {height} x {width}.")
        x = _Embeddings(config, name="embeddings", **dtypes)(pixels)
        hidden = _Encoder(config, self.attention, name="encoder", **dtypes)(x)
        # The checkpoint's final norm: it has parameters, and no feature passes it.
        LayerNorm(config.layer_norm_eps, name="layernorm", **dtypes)(hidden[-1])
        grid = (height // config.patch_size, width // config.patch_size)
        chosen = [x if block == EMBEDDING else hidden[block] for block in blocks]
        if read == "class":
            return tuple(tokens[:, 0] for tokens in chosen)
        patches = [tokens[:, 1 + config.num_register_tokens :] for tokens in chosen]
        if read == "sum":
            patches = [patch + tokens[:, :1] for patch, tokens in zip(patches, chosen, strict=True)]
        return tuple(patch.reshape(n, *grid, -1) for patch in patches)


class _Embeddings(nn.Module):
    config: Dinov2Config
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, pixels: Float[Array, "n h w 3"]) -> Float[Array, "n t c"]:
        config = self.config
        channels, trained = config.hidden_size, config.image_size // config.patch_size

        def tokens(name: str, length: int) -> Float[Array, "1 length c"]:
            return parameter(self, name, nn.initializers.normal(0.02), (1, length, channels), self.param_dtype)

        patches = _PatchEmbeddings(config, self.dtype, self.param_dtype, name="patch_embeddings")(pixels)
        n, rows, columns, _ = patches.shape
        class_token = tokens("cls_token", 1)
        positions = tokens("position_embeddings", 1 + trained**2)
        class_position, positions = positions[:, :1], positions[:, 1:]
        if (rows, columns) != (trained, trained):
            # The two families were trained with different resampling. (The torch hub code also shifts the grid by
            # 0.1 of a cell for the models without registers; transformers, our reference, does not.)
            positions = positions.reshape(1, trained, trained, channels)
            positions = resize_bicubic(positions, (rows, columns), antialias=config.num_register_tokens > 0)
            positions = positions.reshape(1, -1, channels)
        parts = [class_token + class_position, patches.reshape(n, -1, channels) + positions.astype(self.dtype)]
        if config.num_register_tokens:
            # Registers have no position.
            parts.insert(1, tokens("register_tokens", config.num_register_tokens))
        parts = [jnp.broadcast_to(part.astype(self.dtype), (n, *part.shape[1:])) for part in parts]
        return jnp.concatenate(parts, axis=1)


class _PatchEmbeddings(nn.Module):
    config: Dinov2Config
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, pixels: Float[Array, "n h w 3"]) -> Float[Array, "n grid_h grid_w c"]:
        patch, dtypes = self.config.patch_size, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Conv(self.config.hidden_size, (patch, patch), patch, 0, name="projection", **dtypes)(pixels)


class _Encoder(nn.Module):
    config: Dinov2Config
    attention: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n t c"]) -> list[Float[Array, "n t c"]]:
        hidden = []
        for i in range(self.config.num_hidden_layers):
            x = _Block(self.config, self.attention, self.dtype, self.param_dtype, name=f"layer_{i}")(x)
            hidden.append(x)
        return hidden


class _Block(nn.Module):
    config: Dinov2Config
    attention: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n t c"]) -> Float[Array, "n t c"]:
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        ffn = _SwiGLU if config.use_swiglu_ffn else _MLP
        y = LayerNorm(config.layer_norm_eps, name="norm1", **dtypes)(x)
        y = _Attention(config.num_attention_heads, self.attention, name="attention", **dtypes)(y)
        x += _LayerScale(name="layer_scale1", **dtypes)(y)
        y = LayerNorm(config.layer_norm_eps, name="norm2", **dtypes)(x)
        y = ffn(int(config.hidden_size * config.mlp_ratio), name="mlp", **dtypes)(y)
        return x + _LayerScale(name="layer_scale2", **dtypes)(y)


class _Attention(nn.Module):
    num_heads: int
    implementation: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n t c"]) -> Float[Array, "n t c"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = _Heads(self.num_heads, self.implementation, name="attention", **dtypes)(x)
        return _Output(name="output", **dtypes)(x)


class _Heads(nn.Module):
    num_heads: int
    implementation: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n t c"]) -> Float[Array, "n t c"]:
        n, length, channels = x.shape
        q, k, v = (
            Dense(channels, name=name, dtype=self.dtype, param_dtype=self.param_dtype)(x).reshape(
                n, length, self.num_heads, channels // self.num_heads
            )
            for name in ("query", "key", "value")
        )
        return dot_product_attention(q, k, v, self.implementation).reshape(x.shape)


class _Output(nn.Module):
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n t c"]) -> Float[Array, "n t c"]:
        return Dense(x.shape[-1], name="dense", dtype=self.dtype, param_dtype=self.param_dtype)(x)


class _LayerScale(nn.Module):
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n t c"]) -> Float[Array, "n t c"]:
        return x * parameter(self, "lambda1", nn.initializers.ones, x.shape[-1:], self.param_dtype).astype(self.dtype)


class _MLP(nn.Module):
    hidden_features: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n t c"]) -> Float[Array, "n t c"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = gelu(Dense(self.hidden_features, name="fc1", **dtypes)(x))
        return Dense(x.shape[-1], name="fc2", **dtypes)(y)


class _SwiGLU(nn.Module):
    """Gate and value in one projection, gate first; `hidden_features` is that of the MLP it replaces."""

    hidden_features: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n t c"]) -> Float[Array, "n t c"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # Two thirds, for as many weights as the MLP has, rounded up to a multiple of 8.
        features = -(-int(self.hidden_features * 2 / 3) // 8) * 8
        gate, value = jnp.split(Dense(2 * features, name="weights_in", **dtypes)(x), 2, axis=-1)
        return Dense(x.shape[-1], name="weights_out", **dtypes)(nn.silu(gate) * value)
