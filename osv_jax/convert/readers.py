"""Readers of PyTorch checkpoints, one tensor at a time.

Safetensors are read here without any library: the format is a JSON table of contents and raw bytes, and plain reads
(unlike memory maps) do not count as this process's memory. PyTorch is imported only for .bin and .pth files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from osv_jax.errors import UserError
from osv_jax.runtime import paths
from osv_jax.runtime.paths import Path, as_path, in_bucket

# On-disk stems: diffusers' weights; transformers' safetensors and transformers' pickles.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")

_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# The format's own limit; a larger number means that the first eight bytes are not a length.
_MAX_HEADER = 100 * 2**20
_METADATA = "__metadata__"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@runtime_checkable
class Reader(Protocol):
    """Tensors by their PyTorch names."""

    source: Path

    def names(self) -> list[str]:
        """All tensor names, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its stored dtype (`ml_dtypes.bfloat16` for bfloat16)."""


def open_weights(path: str | os.PathLike) -> Reader:
    """Opens a weights file, or the weights of one network's folder in diffusers or transformers layout.

    In a folder, full-precision files are preferred to their fp16 variants, and safetensors to pickles.

    Raises:
        UserError: nothing there, no weights in the folder, shards missing, or a file that is empty, truncated,
            damaged, only a git-lfs pointer, or a pickle of something else than tensors.
    """
    path = as_path(path)
    files = _weight_files(path) if path.is_dir() else [path]
    if files[0].suffix == ".safetensors":
        return SafetensorsReader(path, files)
    if files[0].suffix in (".bin", ".pth", ".pt"):
        return PickleReader(path, files)
    raise UserError(f"{path} is not a weights file: give a folder, or a .safetensors, .bin or .pth file.")


class SafetensorsReader:
    """Safetensors files (all shards of one checkpoint)."""

    def __init__(self, source: Path, files: Iterable[Path]):
        self.source = source
        self._entries = {name: entry for file in files for name, entry in _read_header(file).items()}

    def names(self) -> list[str]:
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def read(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        if entry.dtype not in _SAFETENSORS_DTYPES:
            raise UserError(
                f"{entry.file}: tensor {name} is stored as {entry.dtype}, which is not supported: "
                "use a float32, float16 or bfloat16 checkpoint."
            )
        dtype = np.dtype(_SAFETENSORS_DTYPES[entry.dtype])
        size = math.prod(entry.shape) * dtype.itemsize
        if in_bucket(entry.file):
            with entry.file.open("rb") as stream:
                stream.seek(entry.offset)
                array = np.frombuffer(stream.read(size), np.uint8)
        else:
            array = np.fromfile(entry.file, np.uint8, size, offset=entry.offset)
        return array.view(dtype).reshape(entry.shape)


@dataclasses.dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def safetensors_metadata(file: Path) -> dict[str, str]:
    """The texts that a safetensors file holds beside its tensors.

    Raises:
        UserError: as `open_weights`.
    """
    metadata = _read_table(file)[0].get(_METADATA) or {}
    if not isinstance(metadata, dict):
        raise _damaged(file)
    return metadata


def _read_table(file: Path) -> tuple[dict[str, Any], int]:
    """A file's table of contents, and where the tensors begin [bytes]."""
    _check_file(file)
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
        if length > _MAX_HEADER:
            raise _damaged(file)
        header = stream.read(length)
    if len(header) < length:
        raise UserError(
            f"{file} is truncated: it has {paths.size_of(file)} bytes and not even its header is whole; download it"
            " again."
        )
    try:
        table = json.loads(header)
    except ValueError as error:
        raise _damaged(file) from error
    if not isinstance(table, dict):
        raise _damaged(file)
    return table, 8 + length


def _damaged(file: Path) -> UserError:
    return UserError(f"{file} is not a readable safetensors file: it is damaged or something else; download it again.")


def _read_header(file: Path) -> dict[str, _Entry]:
    table, data = _read_table(file)
    size, entries, end = paths.size_of(file), {}, data
    try:
        for name, value in table.items():
            if name == _METADATA:
                continue
            begin, stop = value["data_offsets"]
            shape = tuple(int(n) for n in value["shape"])
            dtype = _SAFETENSORS_DTYPES.get(value["dtype"])
            if dtype is not None and math.prod(shape) * np.dtype(dtype).itemsize != stop - begin:
                raise ValueError(name)
            entries[name] = _Entry(file, value["dtype"], shape, data + begin)
            end = max(end, data + stop)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file) from error
    if size < end:
        raise UserError(f"{file} is truncated: it has {size} bytes of {end}; download it again.")
    return entries


class PickleReader:
    """PyTorch's .bin and .pth files (all shards of one checkpoint), tensors only; local ones are memory-mapped."""

    def __init__(self, source: Path, files: Iterable[Path]):
        self.source = source
        self._tensors = {name: tensor for file in files for name, tensor in _unpickle(file).items()}

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> np.ndarray:
        import torch

        tensor = self._tensors[name].detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def _unpickle(file: Path) -> dict:
    _check_file(file)
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{file} needs PyTorch to be read: run `pip install osv_jax[convert]`, or use a safetensors checkpoint."
        ) from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 6):
        # Before 2.6 a crafted file could run code in spite of weights_only (CVE-2025-32434).
        raise UserError(
            f"PyTorch {torch.__version__} cannot read untrusted files such as {file} safely: "
            "install torch 2.6 or newer, or use a safetensors checkpoint."
        )
    try:
        # Only the zip format (PyTorch 1.6 and later) can be mapped; older files are read whole.
        mmap = not in_bucket(file) and zipfile.is_zipfile(file)
        with file.open("rb") if in_bucket(file) else contextlib.nullcontext(file) as source:
            tensors = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} was refused, because it is not a plain PyTorch file of tensors (it is damaged, or holds objects "
            "that could run code): use another copy, best in safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{file} is not a readable PyTorch file: it is damaged or truncated; download it again."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{file} does not map names to tensors: expected a state dict, such as a released checkpoint.")
    return tensors


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"{file} does not exist: check the path, or download the checkpoint again.")
    if paths.size_of(file) == 0:
        raise UserError(f"{file} is empty: download it again.")
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(f"{file} is a git-lfs pointer, not the weights: run `git lfs pull` in its repository.")


def _weight_files(folder: Path) -> list[Path]:
    # Where a variant's "fp16" stands in the name differs between libraries and over time.
    for suffixes in (
        (".safetensors", ".safetensors.index.json"),
        (".fp16.safetensors", ".safetensors.index.fp16.json", ".fp16.safetensors.index.json"),
        (".bin", ".bin.index.json"),
        (".fp16.bin", ".bin.index.fp16.json", ".fp16.bin.index.json"),
    ):
        for stem in _STEMS:
            for suffix in suffixes:
                file = folder / (stem + suffix)
                if file.is_file():
                    return _shards(file) if suffix.endswith(".json") else [file]
    raise UserError(
        f"{folder} has no weights: expected diffusion_pytorch_model, model or pytorch_model "
        "as .safetensors or .bin, whole, sharded or fp16; check that the download is complete."
    )


def _shards(index: Path) -> list[Path]:
    _check_file(index)
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        # A name from a file must not lead out of the folder.
        bad = not names or any(pathlib.PurePath(name).name != name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError):
        bad = True
    if bad:
        raise UserError(f"{index} is not a readable index of weight shards: download it again.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index.parent} lacks {len(missing)} of the {len(names)} weight shards its index names "
            f"(first: {missing[0]}): download them."
        )
    return [index.parent / name for name in names]
