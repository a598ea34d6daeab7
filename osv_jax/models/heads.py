"""Heads of discriminators: a few convolutions over the features of a frozen backbone, along space or along time."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from osv_jax.errors import UserError
from osv_jax.models.layers import Conv, Dense, Dtype, apply, parameter
from osv_jax.models.norms import GroupNorm

_INITIAL_POWER_ITERATIONS = 15


class Head(nn.Module):
    """A pointwise block, a residual block, one logit (or more values) per position; 2-D or 1-D as `window` is.

    A block is a spectrally normalised convolution, GroupNorm (of one image or one track: no logit may depend on the
    rest of the batch) and LeakyReLU.
    """

    window: tuple[int, ...]
    features: int = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n *space c"], update_stats: bool) -> Float[Array, "n *space features"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        pointwise = (1,) * len(self.window)

        def block(x: Array, window: tuple[int, ...], name: str) -> Array:
            x = SpectralConv(x.shape[-1], window, name=f"{name}_conv", **dtypes)(x, update_stats)
            return nn.leaky_relu(GroupNorm(1e-5, name=f"{name}_norm", **dtypes)(x), 0.2)

        x = block(x, pointwise, "in")
        x = (x + block(x, self.window, "residual")) / 2**0.5
        return SpectralConv(self.features, pointwise, name="out_conv", **dtypes)(x, update_stats).astype(jnp.float32)


class SpectralConv(nn.Module):
    """A convolution whose kernel, as an (out, rest) matrix, is divided by its largest singular value.

    That value is u' W v with the power method's vectors, which are held constant in the gradient (Miyato et al. 2018,
    PyTorch's `spectral_norm`). Only u is stored; v follows from it and the present kernel.
    """

    features: int
    window: tuple[int, ...]
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n *space c"], update_stats: bool) -> Float[Array, "n *space features"]:
        shape = (*self.window, x.shape[-1], self.features)
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), shape, self.param_dtype).astype(jnp.float32)
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        matrix = kernel.reshape(-1, self.features)

        def start() -> Float[Array, " features"]:
            u = jax.random.normal(self.make_rng("params"), (self.features,))
            return lax.fori_loop(0, _INITIAL_POWER_ITERATIONS, lambda _, u: _power_iteration(matrix, u), u)

        stored = self.variable("spectral", "u", start)
        u = stored.value
        if update_stats:
            u = stored.value = _power_iteration(lax.stop_gradient(matrix), u)
        v = _unit(_matvec(lax.stop_gradient(matrix), u))
        kernel = kernel / jnp.dot(v, _matvec(matrix, u), precision=lax.Precision.HIGHEST)
        conv = Conv(self.features, self.window, dtype=self.dtype, parent=None)
        return apply(conv, {"params": {"kernel": kernel, "bias": bias}}, x)


def _power_iteration(matrix: Float[Array, "k o"], u: Float[Array, " o"]) -> Float[Array, " o"]:
    return _unit(_matvec(matrix.T, _unit(_matvec(matrix, u))))


def _matvec(matrix: Float[Array, "k o"], u: Float[Array, " o"]) -> Float[Array, " k"]:
    # A TPU's default precision would leave three digits of the singular value.
    return jnp.matmul(matrix, u, precision=lax.Precision.HIGHEST)


def _unit(x: Float[Array, " k"]) -> Float[Array, " k"]:
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)


class Projection(nn.Module):
    """A condition for `project` (Miyato & Koyama 2018): two linear layers with a SiLU between them; float32."""

    width: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch width"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.silu(Dense(self.width, name="linear_1", **dtypes)(x))
        return Dense(self.width, name="linear_2", **dtypes)(x).astype(jnp.float32)


def project(x: Float[Array, "b *space k"], condition: Float[Array, "b *_space k"]) -> Float[Array, "b n"]:
    """One logit per position: the inner product with the condition, over the root of the width."""
    return (x * condition).sum(axis=-1).reshape(x.shape[0], -1) / x.shape[-1] ** 0.5


def over_frames(head: Head, x: Float[Array, "b f h w c"], update_stats: bool) -> Float[Array, "b f h w k"]:
    """A 2-D head on every frame by itself.

    Raises:
        UserError: on features whose width is not a multiple of 32 (the norms' groups).
    """
    _check_width(x.shape[-1])
    return head(x.reshape(-1, *x.shape[2:]), update_stats).reshape(*x.shape[:-1], -1)


def over_tracks(head: Head, x: Float[Array, "b f h w c"], update_stats: bool) -> Float[Array, "b h w f k"]:
    """A 1-D head along time, on every position by itself.

    Raises:
        UserError: as `over_frames`.
    """
    _check_width(x.shape[-1])
    batch, frames, height, width, channels = x.shape
    tracks = x.transpose(0, 2, 3, 1, 4).reshape(batch * height * width, frames, channels)
    return head(tracks, update_stats).reshape(batch, height, width, frames, -1)


def _check_width(width: int) -> None:
    if width % 32:
        raise UserError(
            f"The discriminator's backbone has features of width {width}, but its heads need multiples of 32: choose"
            " another backbone."
        )
