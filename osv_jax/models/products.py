"""Matrix products and convolutions, also those of low-rank updates, in the form that each platform computes best."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float


def compiled_for() -> str:
    """The platform of the devices that are compiled for, which need not be there (`osv_jax.plan`)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def shares_images() -> bool:
    """Whether each image's rows are shared out to several devices."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1) > 1


def at_least_float32(x: Array) -> Array:
    """The values, in float32 if their dtype is narrower."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


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
    rank = len(window)
    leading, space = x.shape[: -rank - 1], x.shape[-rank - 1 :]
    if compiled_for() == "cpu":
        image = space[:-1]
        extents = zip(image, padding, window, strict=True)
        out = [(size + sum(ends) - extent) // stride + 1 for size, ends, extent in extents]
        if min(math.prod(image), math.prod(out)) < math.prod(window):
            # XLA would take the kernel for the image, here or in the gradient, to which it knows only a slow way.
            patches = _patches(x.reshape(-1, *space), window, stride, padding)
            y = multiply(patches, kernel.reshape(-1, kernel.shape[-1]), dtype)
            return y.reshape(*leading, *y.shape[1:])
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


def _patches(x: Array, window: Sequence[int], stride: int, padding: Sequence[tuple[int, int]]) -> Array:
    """What is under the window, in the order of a kernel's axes: [n, *out, window's positions x c]."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    ends = [size - extent + 1 for size, extent in zip(x.shape[1:-1], window, strict=True)]
    starts = itertools.product(*map(range, window))
    slices = [[slice(begin, begin + end, stride) for begin, end in zip(at, ends, strict=True)] for at in starts]
    return jnp.concatenate([x[:, *places] for places in slices], axis=-1)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve_doubled(
    x: Float[Array, "*batch h w c"], kernel: Float[Array, "3 3 c o"], dtype: Any = None
) -> Float[Array, "*batch 2*h 2*w o"]:
    """The 3x3 convolution of `double(x)`, padded by zeros, in 4/9 of the operations and without that image.

    A pixel of the doubled image has 2 x 2 different pixels of `x` under its window, which are the same for its
    neighbour on one side. So each of the four kinds of pixels, of even and odd rows and columns, is a 2x2 convolution
    of `x` with sums of the kernel's weights. `dtype` as of `convolve`, and gradients as of `_wide`, in the plain way:
    convolutions with windows as large as an image, as the other's gradient has them, are slow on a CPU.
    """
    first, middle, last = jnp.split(at_least_float32(kernel), 3, axis=0)
    rows = jnp.stack([jnp.concatenate([first, middle + last]), jnp.concatenate([first + middle, last])])
    first, middle, last = jnp.split(rows, 3, axis=2)
    columns = [jnp.concatenate(pair, axis=2) for pair in ((first, middle + last), (first + middle, last))]
    # [2 kinds of rows, 2 of columns, 2, 2, c, o] -> [2, 2, c, all four kinds' o]
    kinds = jnp.stack(columns, axis=1).transpose(2, 3, 4, 0, 1, 5).reshape(2, 2, kernel.shape[2], -1)
    y = convolve(x, kinds.astype(x.dtype), 1, _ONE, dtype)
    *batch, height, width = x.shape[:-1]
    y = y.reshape(*y.shape[:-1], 2, 2, -1)
    pixels = [[y[..., p : p + height, q : q + width, p, q, :] for q in (0, 1)] for p in (0, 1)]
    y = jnp.stack([jnp.stack(row, axis=-2) for row in pixels], axis=-4)
    return y.reshape(*batch, 2 * height, 2 * width, -1)


# Padding of an image by one pixel on each side.
_ONE = ((1, 1), (1, 1))
# The kernel, and the image, where the other one has a gradient.
_Saved = tuple[Array | None, Array | None]


def double(x: Float[Array, "*batch h w c"]) -> Float[Array, "*batch 2*h 2*w c"]:
    """The image of twice the size, by nearest neighbour."""
    return x.repeat(2, axis=-3).repeat(2, axis=-2)


def _doubled_forward(x: CustomVJPPrimal, kernel: CustomVJPPrimal, dtype: Any) -> tuple[Array, _Saved]:
    # What is frozen has no gradient that a compiler would have to find unused.
    saved = kernel.value if x.perturbed else None, x.value if kernel.perturbed else None
    return convolve_doubled(x.value, kernel.value, dtype), saved


def _doubled_backward(dtype: Any, saved: _Saved, dy: Array) -> tuple[Array | None, Array | None]:
    kernel, x = saved
    dx = dkernel = None
    if kernel is not None:
        *batch, height, width, _ = dy.shape
        like = jax.ShapeDtypeStruct((*batch, height // 2, width // 2, kernel.shape[2]), kernel.dtype)
        (dx,) = jax.linear_transpose(lambda x: convolve(double(x), kernel, 1, _ONE), like)(dy.astype(kernel.dtype))
    if x is not None:
        like = jax.ShapeDtypeStruct((3, 3, x.shape[-1], dy.shape[-1]), x.dtype)
        (dkernel,) = jax.linear_transpose(lambda kernel: convolve(double(x), kernel, 1, _ONE), like)(dy.astype(x.dtype))
    return dx, dkernel


convolve_doubled.defvjp(_doubled_forward, _doubled_backward, symbolic_zeros=True)
