"""PyTorch tensor names and layouts <-> Flax parameter paths and layouts.

Our networks' module paths are PyTorch's on-disk names with every numeric component glued to its predecessor:
`down_blocks.0.resnets.1.conv1` is `down_blocks_0/resnets_1/conv1`. Nothing else about a network is known here: whether
a PyTorch `weight` is a `kernel`, a norm's `scale` or an `embedding` is decided by the Flax tree that is to be filled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

Path = tuple[str, ...]

# The only PyTorch components that end in _<digits> by themselves; every other such ending is a glued number.
UNSPLIT = frozenset({"linear_1", "linear_2"})

WEIGHT_LEAVES = frozenset({"kernel", "scale", "embedding"})

# Flax axis i comes from PyTorch axis PERMUTATION[ndim][i]: linear (out, in), convolutions (out, in, *window).
_KERNEL_FROM_TORCH = {2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}
_GLUED = re.compile(r"(.+)_(\d+)")


def module_path(torch_module: str) -> Path:
    """`down_blocks.0.resnets.1.conv1` -> `("down_blocks_0", "resnets_1", "conv1")`."""
    path: list[str] = []
    for component in torch_module.split("."):
        if component.isdigit() and path:
            path[-1] += f"_{component}"
        else:
            path.append(component)
    return tuple(path)


def renamed(name: str, replacements: Iterable[tuple[str, str]]) -> str:
    """The name after (pattern, replacement) pairs for `re.sub`, in their order."""
    for pattern, replacement in replacements:
        name = re.sub(pattern, replacement, name)
    return name


def torch_module(path: Path) -> str:
    """The inverse of `module_path`."""
    components: list[str] = []
    for component in path:
        numbers: list[str] = []
        while component not in UNSPLIT and (match := _GLUED.fullmatch(component)):
            component, number = match.groups()
            numbers.insert(0, number)
        components += [component, *numbers]
    return ".".join(components)


def torch_name(path: Path) -> str:
    """The PyTorch name of the parameter at `path`: `("norm", "scale")` -> `norm.weight`."""
    *module, leaf = path
    return torch_module((*module, "weight" if leaf in WEIGHT_LEAVES else leaf))


def flax_shape_to_torch(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape PyTorch gives to the parameter that has `shape` here."""
    if path[-1] != "kernel":
        return tuple(shape)
    return tuple(shape[axis] for axis in _kernel_to_torch(path, len(shape)))


def to_flax(path: Path, array: np.ndarray) -> np.ndarray:
    """PyTorch's array in the layout of the Flax parameter at `path`: a view, nothing is copied.

    Kernels: linear (out, in) -> (in, out), OIW -> WIO, OIHW -> HWIO, OIDHW -> DHWIO. Every other leaf stays as it is.
    """
    if path[-1] != "kernel":
        return array
    if array.ndim not in _KERNEL_FROM_TORCH:
        raise ValueError(f"{'/'.join(path)}: a kernel has 2 to 5 axes, got shape {array.shape}.")
    return array.transpose(_KERNEL_FROM_TORCH[array.ndim])


def to_torch(path: Path, array: np.ndarray) -> tuple[str, np.ndarray]:
    """The inverse of `to_flax`, with the PyTorch name: a view, nothing is copied."""
    if path[-1] == "kernel":
        array = array.transpose(_kernel_to_torch(path, array.ndim))
    return torch_name(path), array


def _kernel_to_torch(path: Path, ndim: int) -> tuple[int, ...]:
    if ndim not in _KERNEL_FROM_TORCH:
        raise ValueError(f"{'/'.join(path)}: a kernel has 2 to 5 axes, got {ndim}.")
    return tuple(int(axis) for axis in np.argsort(_KERNEL_FROM_TORCH[ndim]))
