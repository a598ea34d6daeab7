"""What is not finite is found and named, and JSON stays JSON."""

import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from osv_jax.errors import UserError
from osv_jax.runtime import finite, mesh
from osv_jax.runtime.finite import NotFinite


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_is_found_in_every_type(dtype, value):
    array = np.ones((3, 5), dtype)
    finite.check_finite(array, "x")
    array[2, 4] = value
    with pytest.raises(UserError, match="x has values that are NaN or infinite"):
        finite.check_finite(array, "x")


def test_the_first_leaf_is_named_wherever_it_lies():
    devices = mesh.replicated(mesh.make_mesh(8, 1))
    good, bad = jax.device_put(jnp.ones(8), devices), jax.device_put(jnp.ones(8).at[7].set(jnp.nan), devices)
    assert finite.first_not_finite({"unet": {"a": good, "b": np.arange(3)}}) is None
    assert finite.first_not_finite({"unet": {"a": good, "b": bad}, "vae": bad}) == "unet/b"


def test_weights_are_blamed_only_if_they_are_to_blame():
    with (
        pytest.raises(UserError, match="The weights are damaged: vae/bias has values"),
        finite.blame_weights({"vae": {"bias": np.array([math.inf])}}),
    ):
        raise NotFinite("Black.")
    for error in (NotFinite("Black."), UserError("Other.")):
        with pytest.raises(UserError, match=str(error)), finite.blame_weights({"vae": {"bias": np.ones(1)}}):
            raise error


def test_json_has_no_nan():
    measured = {"mse": math.nan, "each": [1.5, math.inf, {"psnr": -math.inf}], "count": 3, "name": "NaN", "none": None}
    expected = {"mse": None, "each": [1.5, None, {"psnr": None}], "count": 3, "name": "NaN", "none": None}
    for indent in (None, 2):
        assert json.loads(finite.strict_json(measured, indent), parse_constant=pytest.fail) == expected
