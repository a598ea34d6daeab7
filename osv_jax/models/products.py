"""Matrix products and convolutions, also those of low-rank updates, in the form that each platform computes best."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def compiled_for() -> str:
    """The platform of the devices that are compiled for, which need not be there (`osv_jax.plan`)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def shares_images() -> bool:
    """Whether each image's rows are shared out to several devices."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1) > 1


def add_lora(y: Array, low_rank: Float[Array, "*batch rank"], b: Float[Array, "rank features"]) -> Array:
    """`y + low_rank @ b`, summed in float32 and rounded once: what a LoRA adds is small beside `y`."""
    update = multiply_widely(low_rank.astype(y.dtype), b.astype(y.dtype))
    return (y.astype(jnp.float32) + update).astype(y.dtype)


def multiply(x: Array, kernel: Float[Array, "c features"], dtype: Any = None) -> Array:
    """`x @ kernel`; `dtype` is that of the sums and the result, by default x's."""
    if compiled_for() != "cpu" or shares_images():
        return jnp.matmul(x, kernel, preferred_element_type=dtype)
    # Of more axes than two, XLA copies whole activations in the backward pass, to transpose them.
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def convolve(x: Array, kernel: Array, stride: int, padding: Sequence[tuple[int, int]], dtype: Any = None) -> Array:
    """The convolution; `dtype` is that of the sums and the result, by default x's."""
    window = kernel.shape[:-2]
    if stride == 1 and all(size == 1 for size in window) and not any(map(any, padding)):
        return multiply(x, kernel.reshape(kernel.shape[-2:]), dtype)
    if len(window) == 3:
        # Only (k, 1, 1) occurs in SVD: fold the two pointwise axes into one and stay with a 2-D convolution, which
        # every backend has a fast kernel for.
        if window[1:] != (1, 1) or stride != 1:
            raise ValueError(f"3-D convolutions must have window (k, 1, 1) and stride 1, got {window}, {stride}.")
        *batch, frames, height, width, channels = x.shape
        folded = x.reshape(-1, frames, height * width, channels)
        y = convolve(folded, kernel.reshape(window[0], 1, *kernel.shape[-2:]), 1, (padding[0], (0, 0)), dtype)
        return y.reshape(*batch, y.shape[1], height, width, kernel.shape[-1])
    rank = len(window)
    leading, space = x.shape[: -rank - 1], x.shape[-rank - 1 :]
    letters = "HW"[-rank:]
    y = lax.conv_general_dilated(
        x.reshape(-1, *space),
        kernel,
        (stride,) * rank,
        padding,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        preferred_element_type=dtype,
    )
    return y.reshape(*leading, *y.shape[1:])


def multiply_widely(x: Array, kernel: Float[Array, "c features"]) -> Float[Array, "*batch features"]:
    """`multiply` with a float32 result; see `_wide`."""
    return _wide(multiply, x, kernel)


def convolve_widely(x: Array, kernel: Array, stride: int, padding: Sequence[tuple[int, int]]) -> Float[Array, "*out"]:
    """`convolve` with a float32 result; see `_wide`."""

    def product(x: Array, kernel: Array, dtype: Any = None) -> Array:
        return convolve(x, kernel, stride, padding, dtype)

    return _wide(product, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide(product: Callable[..., Array], x: Array, kernel: Array) -> Array:
    """`product(x, kernel)` with its result in float32, but gradients from factors of x's dtype.

    JAX's own rule would multiply the result's gradient in float32, at half the speed and with twice the traffic. In
    the sum of a LoRA it loses nothing to be rounded: all that is added to it is rounded next, and so its gradient has
    been.
    """
    return product(x, kernel, jnp.float32)


def _wide_forward(product: Callable[..., Array], x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _wide(product, x, kernel), (x, kernel)


def _wide_backward(product: Callable[..., Array], saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    dy = dy.astype(x.dtype)
    (dx,) = jax.linear_transpose(lambda x: product(x, kernel), x)(dy)
    (dkernel,) = jax.linear_transpose(lambda kernel: product(x, kernel), kernel)(dy)
    return dx, dkernel


_wide.defvjp(_wide_forward, _wide_backward)
