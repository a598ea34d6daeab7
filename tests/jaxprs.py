"""What a traced program consists of."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

PRODUCTS = ("dot_general", "conv_general_dilated")


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, those of the programs inside it (loops, branches, `jit`, custom gradients) too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def products(jaxpr: Any) -> list[Any]:
    """The equations that are matrix products or convolutions."""
    return [eqn for eqn in equations(jaxpr) if eqn.primitive.name in PRODUCTS]


def place(eqn: Any) -> str:
    """The function of this package that an equation comes from, or nothing where JAX no longer knows."""
    frames = eqn.source_info.traceback.frames if eqn.source_info.traceback else ()
    return next((frame.function_name for frame in frames if "/osv_jax/" in frame.file_name), "")


def kernel_gradients(jaxpr: Any, kernels: Mapping[tuple[str, ...], tuple[int, ...]]) -> set[tuple[str, ...]]:
    """Of kernels (shapes by network class and path), those whose gradient the program computes.

    A backward pass is where the name of an equation says so, and in a layer's backward pass a product of the kernel's
    own sizes is its gradient: that of the input has an axis of the batch.
    """
    found = set()
    for eqn in products(jaxpr):
        name = str(eqn.source_info.name_stack)
        if match := re.match(r"transpose\(jvp\((\w+)[^/]*\)\)/(.+)", name):
            path = (match[1], *(part for part in match[2].split("/") if "." not in part))
            # What follows a layer's name is of JAX's own functions in it.
            for end in range(len(path), 1, -1):
                shape = kernels.get(path[:end])
                if shape and _sizes(shape) == _sizes(eqn.outvars[0].aval.shape):
                    found.add(path[:end])
    return found


def _sizes(shape: tuple[int, ...]) -> list[int]:
    """Layouts, and axes of one, are nobody's business."""
    return sorted(size for size in shape if size > 1)
