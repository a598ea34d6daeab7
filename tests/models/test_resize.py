"""Bicubic and bilinear resampling against torch."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error

from osv_jax.models.resize import apply_per_axis, bilinear_matrix, resize_bicubic

SIZES = [
    ((37, 37), (23, 41)),
    ((7, 5), (13, 29)),
    ((16, 16), (5, 1)),
    ((9, 1), (3, 4)),
    ((61, 90), (7, 11)),
    ((8, 12), (8, 12)),
]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("size", "new_size"), SIZES)
def test_matches_torch(size, new_size, align_corners, antialias, rng):
    x = rng.standard_normal((2, *size, 3), dtype=np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x).movedim(-1, 1), new_size, mode="bicubic", align_corners=align_corners, antialias=antialias
    ).movedim(1, -1)
    actual = resize_bicubic(jnp.asarray(x), new_size, align_corners, antialias)
    assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("size", "new_size"), SIZES)
def test_bilinear_matches_torch(size, new_size, antialias, rng):
    x = rng.standard_normal((2, *size, 3), dtype=np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x).movedim(-1, 1), new_size, mode="bilinear", antialias=antialias
    ).movedim(1, -1)
    matrices = (bilinear_matrix(*lengths, antialias) for lengths in zip(size, new_size, strict=True))
    assert relative_error(apply_per_axis(*matrices, x), expected) <= 3e-5


def test_every_leading_axis_is_a_batch_axis_and_the_result_is_float32(rng):
    x = jnp.asarray(rng.standard_normal((2, 3, 6, 5, 4)), jnp.bfloat16)
    y = resize_bicubic(x, (4, 9))
    assert y.dtype == jnp.float32
    assert relative_error(y[1, 2], resize_bicubic(x[1, 2], (4, 9))) <= 1e-5


def test_an_empty_size_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        resize_bicubic(jnp.ones((4, 4, 1)), (0, 4))
    with pytest.raises(ValueError, match="must be positive"):
        bilinear_matrix(4, 0)
