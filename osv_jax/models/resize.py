"""Bicubic and bilinear resampling with PyTorch's conventions.

`jax.image.resize` uses another cubic (a = -0.5) and renormalises at the borders, so it differs from
`torch.nn.functional.interpolate(mode="bicubic")` by up to 0.35 on unit noise. Checkpoints were trained with PyTorch's.
Resampling is linear and separable: one [out, in] matrix per axis, built in numpy while tracing.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


def resize_bicubic(
    x: Float[Array, "*batch h w c"],
    size: tuple[int, int],
    align_corners: bool = False,
    antialias: bool = False,
) -> Float[Array, "*batch out_h out_w c"]:
    """Resizes the two spatial axes to `size`, in float32.

    Equals `torch.nn.functional.interpolate(mode="bicubic")` called with the same `size` and flags.

    Args:
        x: images, or any other grids, channels last.
        size: new height and width.
        align_corners: whether the outermost pixel centres coincide, rather than the outer edges.
        antialias: whether the filter is widened when shrinking.

    Raises:
        ValueError: if a new size is not positive.
    """
    rows = bicubic_matrix(x.shape[-3], size[0], align_corners, antialias)
    columns = bicubic_matrix(x.shape[-2], size[1], align_corners, antialias)
    return apply_per_axis(rows, columns, x)


def apply_per_axis(
    rows: Float[np.ndarray, "out_h h"], columns: Float[np.ndarray, "out_w w"], x: Float[Array, "*batch h w c"]
) -> Float[Array, "*batch out_h out_w c"]:
    """Multiplies height by `rows` and width by `columns`, in float32."""
    # The default precision of a TPU or of TF32 would round the pixels to 8 or 11 bits.
    exact = lax.Precision.HIGHEST
    x = jnp.einsum("ph,...hwc->...pwc", rows.astype(np.float32), x.astype(jnp.float32), precision=exact)
    return jnp.einsum("qw,...hwc->...hqc", columns.astype(np.float32), x, precision=exact)


def bicubic_matrix(
    length: int, new_length: int, align_corners: bool = False, antialias: bool = False
) -> Float[np.ndarray, "new_length length"]:
    """The float64 matrix that resamples an axis of `length` points to `new_length`.

    Raises:
        ValueError: if `new_length` is not positive.
    """
    if new_length < 1:
        raise ValueError(f"cannot resize {length} points to {new_length}: the new size must be positive.")
    # Positions are rounded to float32 because PyTorch's are: at 1000 pixels that moves a tap by 3e-5 of a pixel.
    new_index = np.arange(new_length, dtype=np.float32)[:, None]
    aligned_scale = (length - 1) / (new_length - 1) if new_length > 1 else 0.0
    scale = np.float32(aligned_scale if align_corners else length / new_length)
    if antialias:
        # PyTorch's antialiased filter follows Pillow: a = -0.5, taps beyond the border dropped and the rest
        # renormalised. `align_corners` changes its scale only, never where the first pixel is.
        centre = scale * (new_index + 0.5)
        weights = _cubic((np.arange(length) + 0.5 - centre) / max(scale, 1), a=-0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    position = scale * new_index if align_corners else scale * (new_index + 0.5) - 0.5
    taps = np.floor(position) + np.arange(-1, 3)
    matrix = np.zeros((new_length, length))
    # Taps beyond the border read the border pixel, so several can fall on the same column.
    columns = np.clip(taps, 0, length - 1).astype(int)
    np.add.at(matrix, (np.arange(new_length)[:, None], columns), _cubic(taps - position, a=-0.75))
    return matrix


def bilinear_matrix(
    length: int, new_length: int, antialias: bool = False, rows: slice = slice(None)
) -> Float[np.ndarray, "rows length"]:
    """The float64 matrix of `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)` along an axis.

    Args:
        rows: which of its `new_length` rows are wanted; by default all.

    Raises:
        ValueError: if `new_length` is not positive.
    """
    if new_length < 1:
        raise ValueError(f"cannot resize {length} points to {new_length}: the new size must be positive.")
    scale = length / new_length
    centre = scale * (np.arange(new_length)[rows, None] + 0.5) - 0.5
    if not antialias:
        # Beyond the border is the border pixel.
        centre, scale = centre.clip(0, length - 1), 1.0
    weights = np.maximum(0, 1 - np.abs(np.arange(length) - centre) / max(scale, 1))
    return weights / weights.sum(axis=1, keepdims=True)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel; zero at a distance of 2 or more."""
    t = np.abs(distance)
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * (t**3 - 5 * t**2 + 8 * t - 4)
    return np.where(t < 1, near, np.where(t < 2, far, 0.0))
