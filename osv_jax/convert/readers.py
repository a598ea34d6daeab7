"""Readers of PyTorch checkpoints, one tensor at a time.

Safetensors are read here without any library: the format is a JSON table of contents and raw bytes, and plain reads
(unlike memory maps) do not count as this process's memory. PyTorch is imported only for .bin and .pth files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from osv_jax.convert.json_files import parse_json, read_json
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
_FLOATS = frozenset(np.dtype(_SAFETENSORS_DTYPES[name]) for name in ("F64", "F32", "F16", "BF16"))
# The format's own limit; a larger number means that the first eight bytes are not a length.
_MAX_HEADER = 100 * 2**20
_METADATA = "__metadata__"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

# Where the tensors are in what some trainers save.
_WRAPPERS = ("module", "model", "state_dict")


@runtime_checkable
class Reader(Protocol):
    """Tensors by their PyTorch names."""

    source: Path

    def names(self) -> list[str]:
        """All tensor names, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""

    def dtype(self, name: str) -> np.dtype:
        """A tensor's stored dtype (`ml_dtypes.bfloat16` for bfloat16), without reading it."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its stored dtype."""


def open_weights(path: str | os.PathLike) -> Reader:
    """Opens a weights file, or the weights of one network's folder in diffusers or transformers layout.

    In a folder, full-precision files are preferred to their fp16 variants, and safetensors to pickles.

    Raises:
        UserError: nothing there, no weights in the folder, shards missing or with a tensor in common, or a file that
            cannot be read, is empty, truncated, damaged, only a git-lfs pointer, or a pickle of something else than
            tensors.
    """
    path = as_path(path)
    files = _weight_files(path) if path.is_dir() else [path]
    if files[0].suffix == ".safetensors":
        return SafetensorsReader(path, files)
    if files[0].suffix in (".bin", ".pth", ".pt", ".ckpt"):
        return PickleReader(path, files)
    raise UserError(f"{path} is not a weights file: give a folder, or a .safetensors, .bin or .pth file.")


def read_floats(reader: Reader, name: str) -> np.ndarray:
    """One tensor, which holds numbers of the network: integers would be the codes of a quantised checkpoint.

    Raises:
        UserError: a tensor in another dtype than float64, float32, float16 or bfloat16.
    """
    array = reader.read(name)
    if array.dtype not in _FLOATS:
        raise _unsupported(reader.source, name, array.dtype)
    return array


def _unsupported(source: Path, name: str, dtype: Any) -> UserError:
    return UserError(
        f"{source}: tensor {name} is stored as {dtype}, which is not supported: use a float32, float16 or bfloat16"
        " checkpoint."
    )


def _join(files: Iterable[Path], read: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """What `read` gives for each of the shards, together."""
    found: dict[str, Any] = {}
    for file in files:
        tensors = read(file)
        if twice := found.keys() & tensors.keys():
            raise UserError(f"{file} holds {min(twice)}, which another shard holds too: download the checkpoint again.")
        found |= tensors
    return found


class SafetensorsReader:
    """Safetensors files (all shards of one checkpoint)."""

    def __init__(self, source: Path, files: Iterable[Path]):
        self.source = source
        self._entries = _join(files, _read_header)

    def names(self) -> list[str]:
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        entry = self._entries[name]
        if entry.dtype not in _SAFETENSORS_DTYPES:
            raise _unsupported(entry.file, name, entry.dtype)
        return np.dtype(_SAFETENSORS_DTYPES[entry.dtype])

    def read(self, name: str) -> np.ndarray:
        entry, dtype = self._entries[name], self.dtype(name)
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
    metadata = _read_table(file)[0].get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
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
        return parse_json(header, file), 8 + length
    except UserError as error:
        raise _damaged(file) from error


def _damaged(file: Path) -> UserError:
    return UserError(f"{file} is not a readable safetensors file: it is damaged or something else; download it again.")


def _read_header(file: Path) -> dict[str, _Entry]:
    table, data = _read_table(file)
    entries, spans = {}, []
    try:
        for name, value in table.items():
            if name == _METADATA:
                continue
            dtype, shape, (begin, stop) = value["dtype"], value["shape"], value["data_offsets"]
            if not f"{name}{dtype}".isprintable():  # Messages name them.
                raise ValueError(name)
            if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in (*shape, begin, stop)):
                raise ValueError(name)
            known = _SAFETENSORS_DTYPES.get(dtype)
            if known is not None and math.prod(shape) * np.dtype(known).itemsize != stop - begin:
                raise ValueError(name)
            entries[name] = _Entry(file, dtype, tuple(shape), data + begin)
            spans.append((begin, stop))
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(file) from error
    # Tensors lie one after another, from the header to the end of the file.
    spans.sort()
    begins, stops = [begin for begin, _ in spans], [0, *(stop for _, stop in spans)]
    size, end = paths.size_of(file), data + stops[-1]
    if begins != stops[:-1] or size > end:
        raise _damaged(file)
    if size < end:
        raise UserError(f"{file} is truncated: it has {size} bytes of {end}; download it again.")
    return entries


class PickleReader:
    """PyTorch's .bin and .pth files (all shards of one checkpoint), tensors only; local ones are memory-mapped."""

    def __init__(self, source: Path, files: Iterable[Path]):
        self.source = source
        self._tensors = _join(files, _unpickle)

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> np.dtype:
        return self._to_numpy(name, self._tensors[name].new_empty(0)).dtype

    def read(self, name: str) -> np.ndarray:
        return self._to_numpy(name, self._tensors[name])

    def _to_numpy(self, name: str, tensor: Any) -> np.ndarray:
        import torch

        try:
            array = tensor.detach().contiguous()
            if array.dtype == torch.bfloat16:
                return array.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            return array.numpy()
        except (TypeError, RuntimeError) as error:  # NumPy has no such dtype, or it is sparse or quantised.
            raise _unsupported(self.source, name, f"{tensor.dtype}, {tensor.layout}") from error


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
    except Exception as error:  # What is damaged makes the unpickler raise anything.
        raise UserError(
            f"{file} is not a readable PyTorch file: it is damaged or truncated; download it again."
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
            break
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in tensors.items()
    ):
        raise UserError(f"{file} does not map names to tensors: expected a state dict, such as a released checkpoint.")
    for name, tensor in tensors.items():
        # Steps of 0 from element to element make a tensor of any size out of few bytes.
        size = tensor.numel() * tensor.element_size()
        if tensor.layout == torch.strided and size > tensor.untyped_storage().nbytes():
            raise UserError(f"{file} has {size} bytes of {name!r} in less than that: it is damaged; download it again.")
    return tensors


def _check_file(file: Path) -> None:
    try:
        if not file.is_file():
            raise UserError(f"{file} does not exist: check the path, or download the checkpoint again.")
        if paths.size_of(file) == 0:
            raise UserError(f"{file} is empty: download it again.")
        with file.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): check its permissions.") from error
    if start == _LFS_POINTER:
        raise UserError(f"{file} is a git-lfs pointer, not the weights: run `git lfs pull` in its repository.")


def _weight_files(folder: Path) -> list[Path]:
    for kind, variant in itertools.product((".safetensors", ".bin"), ("", ".fp16")):
        # The variant stands where transformers and diffusers put it, where diffusers 0.30 did, or where people do.
        indices = (f"{kind}.index{variant}.json", f"{kind}{variant}.index.json", f"{variant}{kind}.index.json")
        for stem in _STEMS:
            for suffix in (f"{variant}{kind}", *indices):
                file = folder / (stem + suffix)
                if file.is_file():
                    return _shards(file) if suffix.endswith(".json") else [file]
    raise UserError(
        f"{folder} has no weights: expected diffusion_pytorch_model, model or pytorch_model "
        "as .safetensors or .bin, whole, sharded or fp16; check that the download is complete."
    )


def _shards(index: Path) -> list[Path]:
    _check_file(index)
    weight_map = read_json(index).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    # A name from a file must not lead out of the folder.
    if not names or not all(
        isinstance(name, str) and name.isprintable() and pathlib.PurePath(name).name == name for name in names
    ):
        raise UserError(f"{index} is not a readable index of weight shards: download it again.")
    shards = [as_path(index.parent / name) for name in sorted(set(names))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(
            f"{index.parent} lacks {len(missing)} of the {len(shards)} weight shards its index names "
            f"(first: {missing[0]}): download them."
        )
    return shards
