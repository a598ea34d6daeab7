"""Random parameters for networks: for tests, benchmarks, the embedded demo, and teachers trained from scratch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from osv_jax.codec import parameter_dtype
from osv_jax.convert.architectures import ARCHITECTURES, TRAINING, Config, expected_params
from osv_jax.objectives.networks import Params


def random_components(config: ConfigDict | Mapping[str, Any]) -> set[str]:
    """The networks with random parameters: those that `random_networks` names, or all where there are no weights."""
    return set(config["random_networks"] if config["weights"] else TRAINING)


def random_architecture(random_networks: Mapping[str, Any], name: str) -> Config:
    """A network's architecture in a configuration, or in the JSON of one, which has lists in place of tuples."""
    fields = random_networks.get(name, {}).items()
    return ARCHITECTURES[name].config(**{key: tuple(x) if isinstance(x, list) else x for key, x in fields})


def random_frozen(architectures: Mapping[str, Config], dtype: Any) -> dict[str, Params]:
    """Parameters of the embedded networks, as NumPy arrays; the same for every seed of a run, and for preparing."""
    return fill_randomly(shapes_of(architectures), dtype)


def fill_randomly(shapes: Mapping[str, Params], dtype: Any) -> dict[str, Params]:
    """Each network is drawn by itself, so that it does not depend on which others there are; see `parameter_dtype`."""
    return {name: random_params(tree, 0, parameter_dtype(name, dtype)) for name, tree in shapes.items()}


def shapes_of(architectures: Mapping[str, Config]) -> dict[str, Params]:
    return {name: unflatten_dict(expected_params(name, made)) for name, made in architectures.items()}


def random_params(shapes: Mapping[str, Any], seed: int, dtype: Any) -> dict[str, Any]:
    """Random parameters for a tree of shapes, as NumPy arrays: for tests, benchmarks and the embedded demo.

    Kernels are normal with variance 1 / fan in, norms start as the identity, everything else is small. They are made
    on the host: a compiled program that fills hundreds of arrays takes XLA half a minute to build.
    """
    rng = np.random.default_rng(seed)

    def fill(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        name = path[-1].key
        if name in ("scale", "lambda1"):
            return np.ones(leaf.shape, dtype)
        std = math.prod(leaf.shape[:-1]) ** -0.5 if name == "kernel" else 0.02
        return (std * rng.standard_normal(leaf.shape, np.float32)).astype(dtype)

    return jax.tree.map_with_path(fill, shapes)
