"""Shared by all tests: eight fake devices, a persistent compilation cache, and the comparison that ports are held to."""

import os
import pathlib

import jax
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
_CACHE = pathlib.Path(os.environ.get("OSV_JAX_TEST_CACHE", pathlib.Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def relative_error(actual, expected) -> float:
    """||actual - expected|| / ||expected|| over all elements, in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
