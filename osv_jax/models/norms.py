"""Normalisations: statistics in float32, and a backward pass written down instead of derived."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from osv_jax.models.layers import Dtype, parameter
from osv_jax.models.products import at_least_float32


class GroupNorm(nn.Module):
    """Group normalisation in float32 over every axis but the first and the groups of the last.

    Raises:
        ValueError: when the groups do not divide the channels.
    """

    epsilon: float
    num_groups: int = 32
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        channels = x.shape[-1]
        if channels % self.num_groups:
            raise ValueError(f"{self.num_groups} groups do not divide {channels} channels.")
        scale = parameter(self, "scale", nn.initializers.ones, (channels,), self.param_dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, (channels,), self.param_dtype)
        return _group_norm_once(x, scale, bias, self.num_groups, self.epsilon, self.dtype)


class LayerNorm(nn.Module):
    """Normalisation in float32 over the last axis."""

    epsilon: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        scale = parameter(self, "scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        return _layer_norm_once(x, scale, bias, self.epsilon, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def group_norm(x: Array, scale: Array, bias: Array, num_groups: int, epsilon: float, dtype: Dtype) -> Array:
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias`, of each item of the first axis and each group.

    Deriving the gradient by JAX's rules gives twice as many passes over the activations.

    Args:
        x: [b, *space, c].
        scale, bias: [c].
        dtype: of the result.
    """
    return _group_norm(x, scale, bias, num_groups, epsilon, dtype)[0]


# A UNet has many norms of the same shape.
_group_norm_once = jax.jit(group_norm, static_argnums=(3, 4, 5))

_Residuals = tuple[Array, Array, Array, Array]


def _group_norm(
    x: Array, scale: Array, bias: Array, num_groups: int, epsilon: float, dtype: Dtype
) -> tuple[Array, _Residuals]:
    mean, inverse = (_beside(statistic, x) for statistic in _statistics(x, num_groups, epsilon))
    y = (at_least_float32(x) - mean) * (inverse * scale) + bias
    return y.astype(dtype), (x, scale, mean, inverse)


def _group_norm_gradients(
    num_groups: int, epsilon: float, dtype: Dtype, residuals: _Residuals, dy: Array
) -> tuple[Array, Array, Array]:
    """Of x, scale and bias; with x^ the normalised x and <> a group's mean:
    dx = (dy scale - <dy scale> - x^ <dy scale x^>) / sqrt(variance + epsilon)."""
    x, scale, mean, inverse = residuals
    normalised, dy = (at_least_float32(x) - mean) * inverse, at_least_float32(dy)
    d_bias, d_scale = _sum_over_space(dy), _sum_over_space(dy * normalised)
    count = math.prod(x.shape[1:-1])

    def of_group(sums: Float[Array, "b c"]) -> Array:
        groups = (sums * scale / count).reshape(len(sums), num_groups, -1)
        return _beside(jnp.broadcast_to(groups.mean(-1, keepdims=True), groups.shape), x)

    dx = inverse * (dy * scale - of_group(d_bias) - normalised * of_group(d_scale))
    return dx.astype(x.dtype), d_scale.sum(0).astype(scale.dtype), d_bias.sum(0).astype(scale.dtype)


group_norm.defvjp(_group_norm, _group_norm_gradients)


def _statistics(x: Array, num_groups: int, epsilon: float) -> tuple[Float[Array, "b g n"], Float[Array, "b g n"]]:
    """The mean of each channel's group and 1 / sqrt(variance + epsilon), in one pass over the activations.

    E[x^2] - E[x]^2 cancels on SVD's activations, whose means are far from zero, but not once a value of the channel's
    own is taken off; and from the channels' variances the group's follows (Chan et al., 1979).
    """
    shift = at_least_float32(x[(slice(None), *(slice(1),) * (x.ndim - 2))])
    count = math.prod(x.shape[1:-1])
    shifted = at_least_float32(x) - shift
    first, second = _sum_over_space(shifted) / count, _sum_over_space(jnp.square(shifted)) / count
    variances = (second - jnp.square(first)).reshape(len(x), num_groups, -1)
    means = (first + shift.reshape(first.shape)).reshape(variances.shape)
    mean = means.mean(-1, keepdims=True)
    variance = (variances + jnp.square(means - mean)).mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.maximum(variance, 0) + epsilon)
    return jnp.broadcast_to(mean, means.shape), jnp.broadcast_to(inverse, means.shape)


def _sum_over_space(x: Float[Array, "b *space c"]) -> Float[Array, "b c"]:
    return x.sum(tuple(range(1, x.ndim - 1)))


def _beside(statistic: Float[Array, "b g n"], x: Array) -> Float[Array, "b *ones c"]:
    return statistic.reshape(len(x), *(1,) * (x.ndim - 2), -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float, dtype: Dtype) -> Array:
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias`, of each vector of the last axis; see `group_norm`."""
    return _layer_norm(x, scale, bias, epsilon, dtype)[0]


_layer_norm_once = jax.jit(layer_norm, static_argnums=(3, 4))


def _layer_norm(x: Array, scale: Array, bias: Array, epsilon: float, dtype: Dtype) -> tuple[Array, _Residuals]:
    wide = at_least_float32(x)
    mean = wide.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + epsilon)
    y = (wide - mean) * inverse * scale + bias
    return y.astype(dtype), (x, scale, mean, inverse)


def _layer_norm_gradients(epsilon: float, dtype: Dtype, residuals: _Residuals, dy: Array) -> tuple[Array, Array, Array]:
    x, scale, mean, inverse = residuals
    normalised, dy = (at_least_float32(x) - mean) * inverse, at_least_float32(dy)
    scaled = dy * scale
    of_vector = normalised * (scaled * normalised).mean(-1, keepdims=True)
    dx = inverse * (scaled - scaled.mean(-1, keepdims=True) - of_vector)
    leading = tuple(range(x.ndim - 1))
    d_scale, d_bias = (dy * normalised).sum(leading), dy.sum(leading)
    return dx.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(scale.dtype)


layer_norm.defvjp(_layer_norm, _layer_norm_gradients)
