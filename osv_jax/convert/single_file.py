"""Stable Video Diffusion in one file with Stability's names, read and written, and Stable Diffusion 1.5, read.

SVD's file has two encoders: the condition's (`conditioner.embedders.3`), which is what diffusers has, and the first
stage's, whose `quant_conv` is part of its last convolution. Only the first is read; both are written.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from osv_jax.convert.architectures import ARCHITECTURES, Config, expected_params, make_config
from osv_jax.convert.importers import DTYPES, SVD_COMPONENTS, Plan, existing, make_plan
from osv_jax.convert.json_files import parse_json
from osv_jax.convert.naming import to_torch, torch_name
from osv_jax.convert.readers import Reader, open_weights, safetensors_metadata
from osv_jax.convert.stability_names import (
    CLIP_PREFIX,
    ENCODER_PREFIX,
    FIRST_STAGE_PREFIX,
    TEXT_PREFIX,
    UNET_PREFIX,
    file_names,
)
from osv_jax.convert.weights import cast
from osv_jax.errors import UserError
from osv_jax.models.svd_unet import UNetConfig

# What of a file belongs to which network. The condition's encoder comes with a decoder that nothing uses.
_PREFIXES = {
    "unet": (UNET_PREFIX,),
    "vae": (f"{ENCODER_PREFIX}encoder.", f"{ENCODER_PREFIX}quant_conv.", f"{FIRST_STAGE_PREFIX}decoder."),
    "image_encoder": (CLIP_PREFIX,),
    "unet_2d": (UNET_PREFIX,),
    "image_vae": (FIRST_STAGE_PREFIX,),
    "text_encoder": (TEXT_PREFIX,),
}
SD_COMPONENTS = ("unet_2d", "image_vae", "text_encoder")
# The sizes of networks that are not the released ones, in the metadata of files written here.
_SIZES = "osv_jax"
# Products with vectors that are convolutions of one pixel there, and one that is stored the other way round.
_AS_CONVOLUTION = re.compile(r"\.attn_1\.(q|k|v|proj_out)\.weight$")
_TRANSPOSED = f"{CLIP_PREFIX}proj"

Params = Mapping[str, Any]


def plan_single_file(path: str | os.PathLike, components: Sequence[str] = SVD_COMPONENTS) -> list[Plan]:
    """Plans the import of SVD from a single file; see `importers.write`.

    The networks have the released sizes, unless osv_jax wrote the file, which then says others. A UNet in a file with
    `xt` in its name was trained on 25 frames, another on 14.

    Raises:
        UserError: as `importers.plan_svd`; a file without one of the components.
    """
    return _plan(path, components, SVD_COMPONENTS, "stabilityai/stable-video-diffusion-img2vid", "svd.safetensors")


def plan_sd_file(path: str | os.PathLike, components: Sequence[str] = SD_COMPONENTS) -> list[Plan]:
    """Plans the import of Stable Diffusion 1.5, or a model made from it, from a single file in LDM's naming.

    The networks have the released sizes, unless the file's metadata says others as `write_single_file` does. A
    tokenizer is not in such files.

    Raises:
        UserError: as `importers.plan_svd`; a file without one of the components, or of another Stable Diffusion.
    """
    return _plan(path, components, SD_COMPONENTS, "stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned.ckpt")


def _plan(path: str | os.PathLike, components: Sequence[str], known: Sequence[str], hub: str, file: str) -> list[Plan]:
    path = existing(path, hub)
    unknown = [component for component in components if component not in known]
    if unknown:
        raise UserError(f"There is no component {unknown[0]!r} in {file}: expected some of {', '.join(known)}.")
    reader = open_weights(path)
    metadata = safetensors_metadata(path) if path.suffix == ".safetensors" else {}
    stored = parse_json(metadata[_SIZES], f"{path}: {_SIZES}") if _SIZES in metadata else {}
    plans = []
    for component in components:
        part = _OneNetwork(reader, _PREFIXES[component])
        if not part.names():
            raise UserError(
                f"{path} has no {component}: expected tensors called {_PREFIXES[component][0]}..., as in {file};"
                " choose what it has with --components."
            )
        config = _config(component, stored, path)
        where = file_names(component, map(torch_name, expected_params(component, config)))
        targets: dict[str, list[str]] = {}
        for target, (name, _, _) in sorted(where.items(), key=lambda item: item[1]):
            targets.setdefault(name, []).append(target)
        plans.append(make_plan(component, config, part, functools.partial(_targets, targets)))
    return plans


def _targets(known: Mapping[str, Sequence[str]], name: str) -> Sequence[str]:
    # (The text encoder's indices of positions are known by their own name.)
    return known.get(name, [name.removeprefix(TEXT_PREFIX)])


def _config(component: str, stored: Mapping[str, Any], path: Any) -> Config:
    if component in stored:
        fields = stored[component] if isinstance(stored[component], dict) else {}
        names = {field.name for field in dataclasses.fields(ARCHITECTURES[component].config)}
        if fields.keys() != names:
            raise UserError(f"{path} was written by another version of osv_jax: export it again.")
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        return make_config(component, fields, f"{path}: {_SIZES}")
    if component == "unet":
        return UNetConfig(num_frames=25 if "xt" in re.split(r"[\W_]+", path.name.lower()) else 14)
    return ARCHITECTURES[component].config()


class _OneNetwork:
    """The tensors of one network under their names in the file, in the shapes that diffusers and transformers give."""

    def __init__(self, reader: Reader, prefixes: tuple[str, ...]):
        self.source = reader.source
        self._reader, self._prefixes = reader, prefixes

    def names(self) -> list[str]:
        return [name for name in self._reader.names() if name.startswith(self._prefixes)]

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._reader.shape(name)
        if _AS_CONVOLUTION.search(name) and shape[2:] == (1, 1):
            return shape[:2]
        return shape[::-1] if name == _TRANSPOSED else shape

    def dtype(self, name: str) -> np.dtype:
        return self._reader.dtype(name)

    def read(self, name: str) -> np.ndarray:
        array = self._reader.read(name)
        return array.T if name == _TRANSPOSED else array.reshape(self.shape(name))


def write_single_file(file: pathlib.Path, networks: Mapping[str, tuple[Config, Params]], dtype: str) -> None:
    """Writes what `plan_single_file` reads and ComfyUI's image-only checkpoint loader loads.

    Args:
        networks: config and all parameters of `unet`, `vae` and `image_encoder`.
        dtype: stored dtype, one of `importers.DTYPES`.

    Raises:
        UserError: a value that is not finite, or beyond `dtype`.
    """
    tensors: dict[str, np.ndarray] = {}
    for component, (_, params) in networks.items():
        named = dict(to_torch(path, np.asarray(array)) for path, array in flatten_dict(params).items())
        parts: dict[str, dict[int, np.ndarray]] = {}
        for target, (name, part, _) in file_names(component, named).items():
            parts.setdefault(name, {})[part] = named[target]
        for name, pieces in parts.items():
            array = np.concatenate([pieces[part] for part in sorted(pieces)]) if len(pieces) > 1 else pieces[0]
            if _AS_CONVOLUTION.search(name):
                array = array[:, :, None, None]
            tensors[name] = cast(array.T if name == _TRANSPOSED else array, DTYPES[dtype], name)
        if component == "vae":
            for name, array in _first_stage_encoder(named).items():
                tensors[name] = cast(array, DTYPES[dtype], name)
    sizes = {component: dataclasses.asdict(config) for component, (config, _) in networks.items()}
    save_file(tensors, file, {"format": "pt", _SIZES: json.dumps(sizes)})


def _first_stage_encoder(named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The encoder with `quant_conv`, a product with each pixel, taken into its last convolution."""
    encoder = {name: array for name, array in named.items() if name.startswith("encoder.")}
    mixing = named["quant_conv.weight"].astype(np.float32)[:, :, 0, 0]
    kernel, bias = (encoder[f"encoder.conv_out.{kind}"].astype(np.float32) for kind in ("weight", "bias"))
    encoder["encoder.conv_out.weight"] = np.tensordot(mixing, kernel, 1)
    encoder["encoder.conv_out.bias"] = mixing @ bias + named["quant_conv.bias"].astype(np.float32)
    renamed = {}
    for name, (target, _, _) in file_names("vae", named).items():
        if name in encoder:
            target = FIRST_STAGE_PREFIX + target.removeprefix(ENCODER_PREFIX)
            renamed[target] = encoder[name][:, :, None, None] if _AS_CONVOLUTION.search(target) else encoder[name]
    return renamed
