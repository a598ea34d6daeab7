"""What CLIP's two towers have in common: a transformer with the norms before its attentions and MLPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from osv_jax.models.attention import Attention
from osv_jax.models.layers import Dense, Dtype, gelu
from osv_jax.models.norms import LayerNorm

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass(frozen=True)
class CLIPLayersConfig:
    """Sizes of a tower's layers, under the names of transformers' config.json; the defaults are SVD's ViT-H/14.

    Raises:
        ValueError: on an activation other than "gelu" and "quick_gelu".
    """

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {tuple(_ACTIVATIONS)}, got {self.hidden_act!r}.")


class CLIPEncoder(nn.Module):
    """The layers, one after the other: `layers_0`, ...

    Args (attributes):
        causal: whether a token sees only those up to itself, as in the text tower.
    """

    config: CLIPLayersConfig
    attention: str
    dtype: Dtype
    param_dtype: Dtype
    causal: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        for i in range(self.config.num_hidden_layers):
            layer = _Layer(self.config, self.attention, self.causal, self.dtype, self.param_dtype, name=f"layers_{i}")
            x = layer(x)
        return x


class _Layer(nn.Module):
    config: CLIPLayersConfig
    attention: str
    causal: bool
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = Attention(
            config.num_attention_heads,
            names=("q_proj", "k_proj", "v_proj", "out_proj"),
            qkv_bias=True,
            causal=self.causal,
            implementation=self.attention,
            name="self_attn",
            **dtypes,
        )
        x += attention(LayerNorm(config.layer_norm_eps, name="layer_norm1", **dtypes)(x))
        return x + _MLP(config, name="mlp", **dtypes)(LayerNorm(config.layer_norm_eps, name="layer_norm2", **dtypes)(x))


class _MLP(nn.Module):
    config: CLIPLayersConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = _ACTIVATIONS[self.config.hidden_act](Dense(self.config.intermediate_size, name="fc1", **dtypes)(x))
        return Dense(self.config.hidden_size, name="fc2", **dtypes)(x)
