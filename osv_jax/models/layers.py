"""Building blocks shared by the networks.

Everything is channels-last. `Dense` and `Conv` add a low-rank path when, and only when, the variable collection `lora`
holds `a` and `b` for them, so the same module is the teacher (without the collection) and the student (with it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from osv_jax.models.products import (
    add_lora,
    at_least_float32,
    convolve,
    convolve_doubled,
    convolve_widely,
    multiply,
    multiply_widely,
)

Dtype = Any

REMAT_POLICIES = ("none", "dots", "full")

_Module = TypeVar("_Module", bound=nn.Module)


def parameter(
    module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...], dtype: Dtype
) -> Array:
    """`module.param`, but the initialiser is only traced where there is no value yet.

    Flax traces it whenever the module is applied, to compare shapes, which is a third of what tracing a step costs.

    Raises:
        ValueError: when the value has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape, dtype)
    value: Array = module.get_variable("params", name)
    if value.shape != shape:
        raise ValueError(f"{'/'.join(module.path)}/{name} has shape {value.shape}, expected {shape}.")
    return value


def apply(module: nn.Module, variables: Mapping[str, Any], *inputs: Any, **options: Any) -> Any:
    """`module.apply`, whose declared type says that it may be the tuple which only `mutable` makes of it."""
    return module.apply(variables, *inputs, **options)


def rematerialise(module: type[_Module], policy: str) -> type[_Module]:
    """The module, with what the backward pass computes again instead of keeping it.

    Args:
        policy: `none`: nothing; `dots`: everything but the results of linear layers; `full`: everything in the module.

    Raises:
        ValueError: on an unknown policy.
    """
    if policy not in REMAT_POLICIES:
        raise ValueError(f"remat must be one of {REMAT_POLICIES}, got {policy!r}.")
    if policy == "none":
        return module
    saved = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}[policy]
    return nn.remat(module, policy=saved)


class Dense(nn.Module):
    """A linear layer over the last axis, with an optional LoRA path `x @ a @ b`.

    Parameters: `kernel` [in, features], `bias` [features]. LoRA: `a` [in, rank], `b` [rank, features]; see
    `products.add_lora`.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch features"]:
        kernel = parameter(
            self, "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), self.param_dtype
        )
        x = x.astype(self.dtype)
        y = multiply(x, kernel.astype(self.dtype))
        if self.has_variable("lora", "a"):
            a: Array = self.get_variable("lora", "a")
            b: Array = self.get_variable("lora", "b")
            y = add_lora(y, multiply_widely(x, a.astype(self.dtype)), b)
        if self.use_bias:
            y += parameter(self, "bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(self.dtype)
        return y


class Conv(nn.Module):
    """A 1-D, 2-D or temporal (k, 1, 1) convolution with PyTorch's explicit padding and an optional LoRA path.

    `window` has one entry per convolved axis; these are the axes just before the channels, and every axis ahead of
    them is a batch axis. Parameters: `kernel` [*window, in, features], `bias` [features]. LoRA follows PEFT: `a`
    [*window, in, rank] is convolved like the kernel, `b` [rank, features] is pointwise.

    `padding` is one number for both ends of every axis, or a (low, high) pair per axis; by default it keeps the size.

    `scale` multiplies the output; it is multiplied into the parameters instead, which are much smaller. `residual`, of
    the output's shape, is added to it: here, for a GPU's kernel adds both it and the bias before it writes the output.

    With `doubled` the image is that of twice the size, by nearest neighbour.
    """

    features: int
    window: Sequence[int]
    strides: int = 1
    padding: int | Sequence[tuple[int, int]] | None = None
    use_bias: bool = True
    doubled: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch c"], scale: Float[Array, "1"] | None = None, residual: Array | None = None
    ) -> Float[Array, "*out features"]:
        def scaled(value: Array) -> Array:
            return (value if scale is None else at_least_float32(value) * scale).astype(self.dtype)

        window = tuple(self.window)
        if self.padding is None:
            padding = tuple((size // 2, size // 2) for size in window)
        elif isinstance(self.padding, int):
            padding = ((self.padding, self.padding),) * len(window)
        else:
            padding = tuple(self.padding)
        kernel = parameter(
            self, "kernel", nn.initializers.lecun_normal(), (*window, x.shape[-1], self.features), self.param_dtype
        )
        x, pixels = x.astype(self.dtype), x.shape[-3:-1]
        if len(window) == 3:
            # Only (k, 1, 1) occurs in SVD: fold the two pointwise axes into one and stay with a 2-D convolution, which
            # every backend has a fast kernel for.
            if window[1:] != (1, 1) or self.strides != 1:
                raise ValueError(
                    f"3-D convolutions must have window (k, 1, 1) and stride 1, got {window}, {self.strides}."
                )
            x, residual = _fold(x), None if residual is None else _fold(residual)
            kernel, padding = kernel.squeeze(-3), padding[:2]
        y = convolve_doubled(x, scaled(kernel)) if self.doubled else convolve(x, scaled(kernel), self.strides, padding)
        if self.has_variable("lora", "a"):
            a: Array = self.get_variable("lora", "a").astype(self.dtype)
            b: Array = self.get_variable("lora", "b")
            a = a.squeeze(-3) if len(window) == 3 else a
            if self.doubled:
                low_rank = convolve_doubled(x, a, jnp.float32)
            else:
                low_rank = convolve_widely(x, a, self.strides, padding)
            y = add_lora(y, low_rank, scaled(b))
        if self.use_bias:
            y += scaled(parameter(self, "bias", nn.initializers.zeros, (self.features,), self.param_dtype))
        if residual is not None:
            y += residual
        return y.reshape(*y.shape[:-2], *pixels, self.features) if len(window) == 3 else y


def _fold(x: Float[Array, "*batch h w c"]) -> Float[Array, "*batch hw c"]:
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def timestep_embedding(timesteps: Float[Array, " n"], dim: int) -> Float[Array, "n dim"]:
    """Sinusoidal embedding, cosines first, of (fractional) timesteps; float32, maximum period 10,000."""
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between them: `linear_1`, `linear_2`."""

    hidden_dim: int
    out_dim: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n c"]) -> Float[Array, "n out"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.silu(Dense(self.hidden_dim, name="linear_1", **dtypes)(x))
        return Dense(self.out_dim, name="linear_2", **dtypes)(x)


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x Phi(x), with the normal distribution's Phi by `erf` and in float32, as in PyTorch; what is kept is x alone.

    `jax.nn.gelu` takes `erfc`, for which XLA computes three series and selects from them.
    """
    return (at_least_float32(x) * _normal_distribution(at_least_float32(x))).astype(x.dtype)


def _gelu_gradient(x: Array, dy: Array) -> tuple[Array]:
    wide = at_least_float32(x)
    density = jnp.exp(-0.5 * jnp.square(wide)) / math.sqrt(2 * math.pi)
    return (((_normal_distribution(wide) + wide * density) * dy).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_gradient)


def _normal_distribution(x: Array) -> Array:
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))


class _GEGLU(nn.Module):
    features: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Dense(2 * self.features, name="proj", dtype=self.dtype, param_dtype=self.param_dtype)(x)
        x, gate = jnp.split(x, 2, axis=-1)
        return x * gelu(gate)


class FeedForward(nn.Module):
    """GEGLU feed-forward of the SVD transformers: `net_0/proj` to 2 x 4 c, gate, `net_2` back to c."""

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        channels = x.shape[-1]
        x = _GEGLU(4 * channels, name="net_0", dtype=self.dtype, param_dtype=self.param_dtype)(x)
        return Dense(channels, name="net_2", dtype=self.dtype, param_dtype=self.param_dtype)(x)


class Unused(nn.Module):
    """Parameters that checkpoints carry and the computation does not need: declared, never read."""

    leaves: tuple[tuple[str, tuple[int, ...]], ...]
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> None:
        for leaf, shape in self.leaves:
            parameter(self, leaf, nn.initializers.normal(0.02), shape, self.param_dtype)
