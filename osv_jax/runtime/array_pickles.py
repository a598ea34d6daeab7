"""Pickles of NumPy arrays, in which some packages bring their weights along: read without running what is in them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct


def read_arrays(data: bytes) -> Mapping[str, Any]:
    """The nested dicts of NumPy arrays in a pickle.

    Raises:
        pickle.UnpicklingError: on a pickle of anything else, of which nothing is run.
        EOFError, ValueError: on one that is cut short or damaged.
    """
    arrays = _ArrayUnpickler(io.BytesIO(data)).load()
    if not isinstance(arrays, Mapping):
        raise pickle.UnpicklingError("It holds no dict.")
    return arrays


class _ArrayUnpickler(pickle.Unpickler):
    """Knows NumPy's arrays and nothing else, so that a file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        # Its home has moved since the files were written.
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _reconstruct
        raise pickle.UnpicklingError(f"{module}.{name} is not a NumPy array")
