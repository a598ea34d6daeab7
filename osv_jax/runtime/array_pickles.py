"""Pickles of NumPy arrays, in which some packages bring their weights along: read without running what is in them."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct


def read_arrays(data: bytes) -> Mapping[str, Any]:
    """The nested dicts of NumPy arrays in a pickle.

    Raises:
        pickle.UnpicklingError: on a pickle of anything else, of which nothing is run, and on a damaged one.
    """
    try:
        check_memo(data)
        arrays = _ArrayUnpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # What is damaged makes the unpickler, and NumPy, raise anything.
        raise pickle.UnpicklingError(f"it is damaged: {type(error).__name__}") from error
    # An array can be made without its values, of any size.
    if not isinstance(arrays, Mapping) or sum(leaf.nbytes for leaf in _leaves(arrays)) > len(data):
        raise pickle.UnpicklingError("it holds other things than arrays")
    return arrays


def check_memo(data: bytes) -> None:
    """Raises UnpicklingError or ValueError for a pickle that has Python's unpickler make room for more objects than it
    can hold: it does so up to the largest number under which one is put away.
    """
    for opcode, number, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (number or 0) > len(data):
            raise pickle.UnpicklingError(f"it counts up to {number}")


def _leaves(tree: Mapping[Any, Any]) -> Iterator[np.ndarray]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and isinstance(name, str):
            yield from _leaves(value)
        elif isinstance(value, np.ndarray) and isinstance(name, str) and value.dtype.kind in "biuf":
            yield value
        else:
            raise pickle.UnpicklingError("it holds other things than arrays")


class _ArrayUnpickler(pickle.Unpickler):
    """Knows NumPy's arrays and nothing else, so that a file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        # Its home has moved since the files were written.
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _reconstruct
        raise pickle.UnpicklingError(f"{f'{module}.{name}'!r} is not a NumPy array")
