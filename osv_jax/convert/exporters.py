"""What a run trained, for PyTorch: a LoRA in one of four spellings, UNets, or all of SVD in one file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from osv_jax.convert import lora_files
from osv_jax.convert.architectures import Config, expected_params
from osv_jax.convert.importers import DTYPES
from osv_jax.convert.model_card import Card
from osv_jax.convert.naming import to_torch, torch_module
from osv_jax.convert.single_file import write_single_file
from osv_jax.convert.weights import cast, locate
from osv_jax.errors import UserError
from osv_jax.models.svd_unet import UNetConfig
from osv_jax.models.text_unet import MotionConfig, TextUNetConfig, frame_positions
from osv_jax.runtime import paths
from osv_jax.runtime.paths import as_path

LORA_FORMATS = ("peft", "diffusers", "kohya", "comfyui")
FORMATS = (*LORA_FORMATS, "unet", "single-file")

Params = Mapping[str, Any]


def export_lora(
    kind: str,
    lora: Params,
    output: str | os.PathLike,
    dtype: str = "float32",
    overwrite: bool = False,
    config: UNetConfig | None = None,
    card: Card | None = None,
) -> None:
    """Writes a folder with a LoRA in one of `LORA_FORMATS`; see the functions of `lora_files` with these names.

    The files of kohya and ComfyUI are called as the folder.

    Args:
        dtype: stored dtype: "bfloat16", "float32" or "float16".
        config: of the UNet that it is for, which ComfyUI's names depend on; by default the released one.
        card: what its README.md says, if it is to have one.

    Raises:
        UserError: if `output` exists, unless it may be overwritten, or cannot be written; also a value beyond `dtype`.
    """
    stored, file = _stored(lora, dtype), f"{as_path(output).name}.safetensors"
    with new_folder(output, overwrite) as folder:
        if kind == "peft":
            lora_files.write_peft(folder, stored)
        elif kind == "diffusers":
            lora_files.write_diffusers(folder / lora_files.DIFFUSERS_WEIGHTS, stored)
        elif kind == "kohya":
            lora_files.write_kohya(folder / file, stored)
        else:
            lora_files.write_comfyui(folder / file, stored, expected_params("unet", config or UNetConfig()))
        if card:
            card.write(folder, kind, file)


def _stored(lora: Params, dtype: str) -> Params:
    flat = flatten_dict(lora)
    return unflatten_dict({path: cast(np.asarray(x), DTYPES[dtype], "/".join(path)) for path, x in flat.items()})


def export_unet(
    config: UNetConfig,
    params: Params,
    output: str | os.PathLike,
    dtype: str = "float32",
    overwrite: bool = False,
    card: Card | None = None,
) -> None:
    """Writes a folder that diffusers' `UNetSpatioTemporalConditionModel.from_pretrained` opens.

    Args:
        config: the architecture.
        params: all parameters of the UNet, LoRA merged.
        dtype, card: see `export_lora`.

    Raises:
        UserError: as `export_lora`.
    """
    tensors = {}
    for path, array in flatten_dict(params).items():
        name, array = to_torch(path, np.asarray(array))
        tensors[name] = cast(array, DTYPES[dtype], name)
    with new_folder(output, overwrite) as folder:
        (folder / "config.json").write_text(json.dumps(unet_json(config), indent=2) + "\n")
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        if card:
            card.write(folder, "unet")


def export_video_unet(
    unet: TextUNetConfig,
    motion: MotionConfig,
    params: Params,
    output: str | os.PathLike,
    dtype: str = "float32",
    overwrite: bool = False,
    card: Card | None = None,
) -> None:
    """Writes a folder with `unet` and `motion_adapter`, which diffusers' `from_pretrained` of each opens.

    Args:
        unet, motion: the architectures.
        params: all parameters of the video UNet, LoRA merged.
        dtype, card: see `export_lora`.

    Raises:
        UserError: as `export_lora`.
    """
    flat = flatten_dict(params)
    parts = {
        "unet": (text_unet_json(unet), expected_params("unet_2d", unet)),
        "motion_adapter": (motion_json(motion), expected_params("motion_adapter", motion)),
    }
    with new_folder(output, overwrite) as folder:
        for part, (config, paths_of) in parts.items():
            tensors = {}
            for path in paths_of:
                name, array = to_torch(path, np.asarray(flat[path]))
                tensors[name] = cast(array, DTYPES[dtype], name)
            if part == "motion_adapter":
                tensors |= {name: cast(array, DTYPES[dtype], name) for name, array in _positions(motion, paths_of)}
            (folder / part).mkdir()
            (folder / part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            save_file(tensors, folder / part / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        if card:
            card.write(folder, "unet")


def _positions(motion: MotionConfig, paths_of: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """The embedding of frame indices, which every motion module's file has."""
    for path in paths_of:
        if path[-2:] == ("proj_in", "bias"):
            level = int(path[0].rsplit("_", 1)[1]) if path[0] != "mid_block" else -1
            widths = motion.block_out_channels[::-1] if path[0].startswith("up_") else motion.block_out_channels
            positions = frame_positions(motion.motion_max_seq_length, widths[level])
            yield torch_module((*path[:-2], "transformer_blocks_0", "pos_embed", "pe")), positions[None]


def export_single_file(
    networks: Mapping[str, tuple[Config, Params]],
    output: str | os.PathLike,
    dtype: str = "float32",
    overwrite: bool = False,
    card: Card | None = None,
) -> None:
    """Writes a folder with all of SVD in one file, called as the folder; see `single_file.write_single_file`.

    Args:
        dtype, card: see `export_lora`.

    Raises:
        UserError: as `export_lora`.
    """
    file = f"{as_path(output).name}.safetensors"
    with new_folder(output, overwrite) as folder:
        write_single_file(folder / file, networks, dtype)
        if card:
            card.write(folder, "single-file", file)


def check_output(output: str | os.PathLike, overwrite: bool, *sources: str | os.PathLike) -> None:
    """To be called before the work for an output begins.

    Args:
        sources: what it is made from, as `weights.locate` takes it.

    Raises:
        UserError: if `output` exists, unless it may be overwritten, cannot be written, or is not apart from `sources`.
    """
    folder = as_path(output)
    paths.check_folder(folder.parent, "output")
    paths.check_apart(folder, *map(locate, sources))
    if folder.is_file():
        raise UserError(f"{folder} is a file, where a folder is to be written: choose another output.")
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} exists: choose another output, or replace it with --overwrite.")


@contextlib.contextmanager
def new_folder(output: str | os.PathLike, overwrite: bool) -> Iterator[pathlib.Path]:
    """A folder to fill, which takes the name `output` when that is done, and never exists half full under it.

    Raises:
        UserError: if `output` exists, unless it may be overwritten, or cannot be written.
    """
    check_output(output, overwrite)
    output = as_path(output)
    try:
        with paths.new_folder(output) as folder:
            yield folder
            # Safetensors lets nobody but the owner read what it writes; these files are as open as their folder.
            for file in filter(pathlib.Path.is_file, folder.rglob("*")):
                file.chmod(folder.stat().st_mode & 0o666)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}): choose another output.") from error


def unet_json(config: UNetConfig) -> dict[str, Any]:
    """diffusers' config.json for the architecture: the inverse of `architectures`' reading of it."""
    fields = dataclasses.asdict(config)
    has_attention, ids = fields.pop("has_attention"), fields.pop("num_added_time_ids")
    return {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "_diffusers_version": "0.24.0",
        # Only the pipeline's default picture size depends on it; this is SVD's.
        "sample_size": 96,
        **fields,
        **_block_types(has_attention, "SpatioTemporal"),
        "projection_class_embeddings_input_dim": ids * config.addition_time_embed_dim,
    }


def _block_types(has_attention: Sequence[bool], kind: str) -> dict[str, list[str]]:
    attention = ["CrossAttn" if has else "" for has in has_attention]
    return {
        "down_block_types": [f"{name}DownBlock{kind}" for name in attention],
        "up_block_types": [f"{name}UpBlock{kind}" for name in reversed(attention)],
    }


def text_unet_json(config: TextUNetConfig) -> dict[str, Any]:
    """diffusers' config.json of the 2-D UNet: the inverse of `config_json.text_unet_config`."""
    fields = dataclasses.asdict(config)
    has_attention, heads = fields.pop("has_attention"), fields.pop("num_attention_heads")
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.24.0",
        # Only the pipeline's default picture size depends on it; this is Stable Diffusion 1.5's.
        "sample_size": 64,
        **fields,
        "attention_head_dim": heads,
        **_block_types(has_attention, "2D"),
    }


def motion_json(config: MotionConfig) -> dict[str, Any]:
    """diffusers' config.json of a motion adapter: the inverse of `config_json.motion_config`."""
    return {"_class_name": "MotionAdapter", "_diffusers_version": "0.24.0", **dataclasses.asdict(config)}
