"""GELU against PyTorch's in float64, with first and second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from osv_jax.models.layers import gelu


def derivatives(x):
    first = jax.grad(lambda x: gelu(x).sum())
    return gelu(x), first(x), jax.grad(lambda x: first(x).sum())(x)


def derivatives_in_torch(x):
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.gelu(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return y.detach(), first.detach(), second


def test_value_and_derivatives_match_pytorch():
    x = np.concatenate([np.linspace(-12, 12, 1001), [0.0]]).astype(np.float32)
    for actual, expected in zip(derivatives(x), derivatives_in_torch(x), strict=True):
        # All are of the order of 1 where they are not x.
        np.testing.assert_allclose(actual, expected, rtol=4e-6, atol=8e-6)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_rounds_the_result_alone(name, request):
    dtype = request.getfixturevalue(name) if name == "float16" else jnp.bfloat16
    x = jnp.linspace(-6, 6, 301).astype(dtype)
    np.testing.assert_array_equal(gelu(x), gelu(x.astype(jnp.float32)).astype(dtype))
    assert jax.grad(lambda x: gelu(x).sum())(x).dtype == dtype
