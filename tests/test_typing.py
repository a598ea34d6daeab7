"""The package's signatures: every annotation means something, and tests hold callers to it."""

import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys
import typing

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import osv_jax
from osv_jax.objectives import losses

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


def test_wrong_dtype_in_a_call_is_an_error():
    with pytest.raises(jaxtyping.TypeCheckError, match="'x'"):
        losses.pseudo_huber(jnp.ones((2, 3), jnp.int32), jnp.ones((2, 3)), 1)


def test_shapes_of_one_call_must_agree():
    with pytest.raises(jaxtyping.TypeCheckError, match="'y'"):
        losses.pseudo_huber(jnp.ones((2, 3)), jnp.ones((2, 4)))


@pytest.mark.integration
def test_a_step_holds_to_the_signatures_of_the_networks():
    """In a process of its own, in which those are checked."""
    script = pathlib.Path(__file__).with_name("checked_networks.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


def test_numpy_arrays_and_ints_may_stand_in():
    losses.pseudo_huber(np.ones((2, 3), np.float32), jnp.zeros((2, 3)), 1)
