"""Norms and their written-down gradients against those of PyTorch in float64, where means are far from zero, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error

from osv_jax.models import norms

EPSILON, GROUPS = 1e-5, 4


def inputs(rng, shape, mean):
    x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    # Every channel with a mean of its own, so that those of a group differ.
    x += mean * (1 + 0.1 * rng.standard_normal(shape[-1], np.float32))
    return x, *(1 + rng.standard_normal((2, shape[-1]), np.float32)), dy


def ours(x, scale, bias):
    return norms.group_norm(x, scale, bias, GROUPS, EPSILON, jnp.float32)


def in_torch(x, scale, bias):
    return torch.nn.functional.group_norm(x.movedim(-1, 1), GROUPS, scale, bias, EPSILON).movedim(1, -1)


def ours_of_vectors(x, scale, bias):
    return norms.layer_norm(x, scale, bias, EPSILON, jnp.float32)


def in_torch_of_vectors(x, scale, bias):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], scale, bias, EPSILON)


@pytest.mark.parametrize(
    ("function", "reference"), [(ours, in_torch), (ours_of_vectors, in_torch_of_vectors)], ids=["groups", "vectors"]
)
@pytest.mark.parametrize(("shape", "mean"), [((2, 3, 5, 7, 12), 0.0), ((2, 9, 8), 30.0), ((3, 5, 7, 4), -300.0)])
def test_output_and_gradients_match_pytorch(rng, function, reference, shape, mean):
    x, scale, bias, dy = inputs(rng, shape, mean)
    y, pull_back = jax.vjp(function, x, scale, bias)
    wanted = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (x, scale, bias)]
    expected = reference(*wanted)
    expected.backward(torch.tensor(dy, dtype=torch.float64))
    # x itself is rounded to 2^-24 of its mean, which is what is left of the precision of (x - mean).
    bound = 4e-6 + 4e-7 * abs(mean)
    assert relative_error(y, expected.detach()) < bound
    for gradient, tensor in zip(pull_back(dy), wanted, strict=True):
        assert relative_error(gradient, tensor.grad) < bound


def test_gradient_of_a_gradient_matches_pytorch(rng):
    # What R1 takes through the norms of a discriminator.
    x, scale, bias, dy = inputs(rng, (2, 5, 3, 8), 1.0)

    def penalty(x, scale):
        return jnp.sum(jnp.square(jax.grad(lambda x: jnp.sum(jnp.tanh(ours(x, scale, bias)) * dy))(x)))

    actual = jax.grad(penalty, argnums=(0, 1))(x, scale)
    tensors = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (x, scale)]
    value = (torch.tanh(in_torch(*tensors, torch.tensor(bias, dtype=torch.float64))) * torch.tensor(dy)).sum()
    (gradient,) = torch.autograd.grad(value, tensors[0], create_graph=True)
    expected = torch.autograd.grad(gradient.square().sum(), tensors)
    for ours_, theirs in zip(actual, expected, strict=True):
        assert relative_error(ours_, theirs) < 3e-5


@pytest.mark.parametrize(("function", "fixed"), [(norms.group_norm, (GROUPS, EPSILON)), (norms.layer_norm, (EPSILON,))])
def test_half_precision_rounds_the_result_alone(rng, function, fixed):
    x, scale, bias, dy = (value.astype(jnp.bfloat16) for value in inputs(rng, (2, 5, 3, 8), 30.0))

    def of(dtype, *values):
        return jax.vjp(lambda *values: function(*values, *fixed, dtype), *values)

    y, pull_back = of(jnp.bfloat16, x, scale, bias)
    wide, pull_back_wide = of(jnp.float32, *(value.astype(jnp.float32) for value in (x, scale, bias)))
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))
    for gradient, expected in zip(pull_back(dy), pull_back_wide(dy.astype(jnp.float32)), strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert relative_error(gradient, expected) < 2**-8


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="32 groups do not divide 48 channels"):
        norms.GroupNorm(1e-5).init(jax.random.key(0), jnp.zeros((1, 2, 48)))
