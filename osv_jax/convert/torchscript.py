"""The tensors of a TorchScript file, of which no code is run and for which PyTorch is not needed.

Such a file is a zip archive: `data.pkl` is the module with its sub-modules as attributes, and each tensor in it a
reference to a file of raw numbers beside it.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
import zipfile
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from osv_jax.errors import UserError
from osv_jax.runtime.array_pickles import check_memo
from osv_jax.runtime.paths import Path

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "BoolStorage": np.bool_,
}


def is_torchscript(file: Path) -> bool:
    """Whether a file is one, and not a checkpoint."""
    with file.open("rb") as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                return any(name.endswith("/constants.pkl") for name in archive.namelist())
        except Exception:  # zipfile meets damage with exceptions of all kinds; who reads checkpoints tells of it.
            return False


class TorchScriptReader:
    """The parameters and buffers of a TorchScript file; see `readers.Reader`."""

    def __init__(self, source: Path):
        self.source = source
        try:
            with source.open("rb") as stream, zipfile.ZipFile(stream) as archive:
                (table,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
                self._folder = table.removesuffix("data.pkl")
                pickled = archive.read(table)
            check_memo(pickled)
            self._tensors = dict(_tensors(_ModuleUnpickler(io.BytesIO(pickled)).load(), ""))
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{source} was refused: it is no TorchScript module ({error}); use another copy."
            ) from error
        except Exception as error:  # What is damaged makes the unpackers raise anything.
            raise _damaged(source) from error

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._tensors[name].storage.dtype)

    def read(self, name: str) -> np.ndarray:
        tensor, dtype = self._tensors[name], self.dtype(name)
        try:
            with self.source.open("rb") as stream, zipfile.ZipFile(stream) as archive:
                data = archive.read(f"{self._folder}data/{tensor.storage.key}")
            # NumPy checks that all elements lie inside the data, but not that they are different ones.
            if math.prod(tensor.shape) * dtype.itemsize > len(data):
                raise ValueError(name)
            strides = [stride * dtype.itemsize for stride in tensor.strides]
            array = np.ndarray(tensor.shape, dtype, data, tensor.offset * dtype.itemsize, strides)
        except Exception as error:
            raise _damaged(self.source) from error
        return np.ascontiguousarray(array)


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: Any
    key: str


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A part of a storage; offset and strides are counted in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Inert:
    """Stands for a module, or for what else TorchScript stores: takes anything, does nothing, has attributes."""

    def __init__(self, *args: Any):
        pass


class _ModuleUnpickler(pickle.Unpickler):
    """Knows tensors and modules, the latter as bare attributes, so that a file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, tuple(shape), tuple(strides))
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module.split(".")[0] == "__torch__" or module == "torch.jit._pickle" or name == "OrderedDict":
            return _Inert
        raise pickle.UnpicklingError(f"it holds {f'{module}.{name}'!r}")

    def persistent_load(self, identifier: Any) -> _Storage:
        _, dtype, key, *_ = identifier
        return _Storage(np.dtype(dtype), str(key))


def _tensors(module: Any, prefix: str) -> Iterator[tuple[str, _Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, _Tensor):
            yield prefix + name, value
        elif isinstance(value, _Inert):
            yield from _tensors(value, f"{prefix}{name}.")


def _damaged(file: Path) -> UserError:
    return UserError(f"{file} is not a readable TorchScript file: it is damaged or truncated; download it again.")
