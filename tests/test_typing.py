"""The package's signatures: every annotation means something, and tests hold callers to it."""

import importlib
import inspect
import pkgutil
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import osv_jax
from osv_jax.distill import losses
from osv_jax.models.layers import Dense, timestep_embedding

MODULES = sorted(module.name for module in pkgutil.walk_packages(osv_jax.__path__, "osv_jax."))


def annotated(module):
    """What is written in a module: functions, classes (for their fields) and methods, all without their wrappers."""
    for _, value in inspect.getmembers(module):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            yield value
        for member in vars(value).values() if inspect.isclass(value) else [value]:
            member = inspect.unwrap(getattr(member, "__func__", getattr(member, "fget", member)))
            # Not what a dataclass generates.
            if inspect.isfunction(member) and member.__code__.co_filename == module.__file__:
                yield member


@pytest.mark.parametrize("name", MODULES)
def test_annotations_resolve(name):
    # What does not resolve is checked by nobody, in silence.
    for item in annotated(importlib.import_module(name)):
        typing.get_type_hints(item, include_extras=True)


def test_wrong_shape_in_a_call_is_an_error():
    with pytest.raises(jaxtyping.TypeCheckError, match="timesteps"):
        timestep_embedding(jnp.ones((2, 2)), 8)


def test_wrong_dtype_in_a_call_is_an_error():
    with pytest.raises(jaxtyping.TypeCheckError, match="timesteps"):
        timestep_embedding(jnp.arange(4), 8)


def test_shapes_of_one_call_must_agree():
    with pytest.raises(jaxtyping.TypeCheckError, match="'y'"):
        losses.pseudo_huber(jnp.ones((2, 3)), jnp.ones((2, 4)))


def test_shapes_are_checked_inside_jit_and_in_modules():
    with pytest.raises(jaxtyping.TypeCheckError, match="'x'"):
        jax.eval_shape(Dense(3).init, jax.random.key(0), jnp.ones((2, 3), jnp.int32))


def test_numpy_arrays_and_ints_may_stand_in():
    losses.pseudo_huber(np.ones((2, 3), np.float32), jnp.zeros((2, 3)), 1)
