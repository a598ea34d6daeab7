"""Importing Stable Diffusion 1.5 and AnimateDiff's motion adapters from diffusers' folders, and these from one file.

A weights folder for videos from text has `unet_2d`, `image_vae`, `text_encoder` and `tokenizer` of a Stable Diffusion,
and a `motion_adapter`: the video UNet is the 2-D UNet with the adapter's parameters beside its own.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from osv_jax.convert import tokenizer
from osv_jax.convert.architectures import expected_params
from osv_jax.convert.importers import Plan, existing, make_plan, new_attention_name, read_config, same_name
from osv_jax.convert.json_files import read_json
from osv_jax.convert.naming import Path as NamePath
from osv_jax.convert.naming import renamed
from osv_jax.convert.readers import Reader, open_weights
from osv_jax.convert.weights import locate
from osv_jax.errors import UserError
from osv_jax.models.clip_text import CLIPTextConfig
from osv_jax.models.text_unet import MotionConfig, TextUNetConfig, frame_positions
from osv_jax.runtime import paths
from osv_jax.runtime.paths import Path

TOKENIZER = "tokenizer"
# Of each component, its folder in a checkpoint.
FOLDERS = {"unet_2d": "unet", "image_vae": "vae", "text_encoder": "text_encoder", TOKENIZER: TOKENIZER}

# AnimateDiff's own names -> diffusers', all applied in turn.
_ANIMATEDIFF_NAMES = (
    (r"^module\.", ""),
    (r"\.temporal_transformer\.", "."),
    (r"\.attention_blocks\.0\.pos_encoder\.pe$", ".pos_embed.pe"),
    (r"\.attention_blocks\.0\.", ".attn1."),
    (r"\.attention_blocks\.1\.", ".attn2."),
    (r"\.norms\.0\.", ".norm1."),
    (r"\.norms\.1\.", ".norm2."),
    (r"\.ff_norm\.", ".norm3."),
)
_POSITIONS = re.compile(r"\.(?:pos_embed|attn2\.pos_encoder)\.pe$")
# What rounding to bfloat16 takes from positions is 0.004.
_POSITION_TOLERANCE = 0.01


def plan_stable_diffusion(folder: str | os.PathLike, components: Sequence[str] = tuple(FOLDERS)) -> list[Plan]:
    """Plans the import of the networks among `components` from a Stable Diffusion 1.5 folder in diffusers layout.

    Raises:
        UserError: not such a folder, a model with other latents or texts, or see `importers.plan_svd`.
    """
    folder = existing(folder, "stable-diffusion-v1-5/stable-diffusion-v1-5")
    unknown = [component for component in components if component not in FOLDERS]
    if unknown:
        raise UserError(
            f"There is no component {unknown[0]!r} in Stable Diffusion: expected some of {', '.join(FOLDERS)}."
        )
    networks = [component for component in components if component != TOKENIZER]
    missing = [name for name in map(FOLDERS.__getitem__, networks) if not (folder / name / "config.json").is_file()]
    if missing:
        raise UserError(
            f"{folder} has no {missing[0]}/config.json: expected a Stable Diffusion 1.5 folder in diffusers layout; "
            "check the path and that the download is complete."
        )
    _check_latents(folder)
    plans = []
    for component in networks:
        source = folder / FOLDERS[component]
        config = read_config(component, source / "config.json")
        translate = {"image_vae": new_attention_name, "text_encoder": _with_prefix}.get(component, same_name)
        plans.append(make_plan(component, config, open_weights(source), translate))
    made = {plan.component: plan.config for plan in plans}
    if {"unet_2d", "text_encoder"} <= made.keys():
        check_text_fits(cast(CLIPTextConfig, made["text_encoder"]), cast(TextUNetConfig, made["unet_2d"]), folder)
    if TOKENIZER in components:
        _check_tokenizer(folder, [plan.config for plan in plans])
    return plans


def _check_latents(folder: Path) -> None:
    """Of a model as a whole: its VAE tells what latents it has, and its scheduler what its UNet predicts."""
    if (folder / "vae" / "config.json").is_file():
        read_config("image_vae", folder / "vae" / "config.json")
    file = folder / "scheduler" / "scheduler_config.json"
    kind = read_json(file).get("prediction_type", "epsilon") if file.is_file() else "epsilon"
    if kind != "epsilon":
        raise UserError(
            f"{file} says prediction_type = {kind!r}, but AnimateDiff's UNets predict epsilon: use a model made from"
            " Stable Diffusion 1.5."
        )


def _check_tokenizer(folder: Path, configs: Sequence[object]) -> None:
    vocabulary, _ = tokenizer.read_files(folder / TOKENIZER)
    for config in configs:
        if isinstance(config, CLIPTextConfig) and config.vocab_size != len(vocabulary):
            raise UserError(
                f"{folder / TOKENIZER} has {len(vocabulary)} tokens, and the text encoder beside it"
                f" {config.vocab_size}: they are not of one checkpoint; download both again."
            )


def copy_tokenizer(folder: str | os.PathLike, output: str | os.PathLike, overwrite: bool = False) -> None:
    """Copies a checkpoint's tokenizer into a weights folder.

    Raises:
        UserError: see `check_tokenizer_output` and `tokenizer.read_files`.
    """
    source = _tokenizer_in(folder)
    tokenizer.read_files(source)
    check_tokenizer_output(output, overwrite, folder)
    with paths.new_folder(tokenizer_of(output)) as made:
        for name in tokenizer.FILES:
            with (source / name).open("rb") as read, (made / name).open("wb") as written:
                shutil.copyfileobj(read, written)


def _tokenizer_in(folder: str | os.PathLike) -> Path:
    """A Stable Diffusion has a folder for it, and a CLIP keeps it beside its weights."""
    source = existing(folder, "stable-diffusion-v1-5/stable-diffusion-v1-5")
    return source / TOKENIZER if (source / TOKENIZER).is_dir() else source


def check_tokenizer_output(output: str | os.PathLike, overwrite: bool, folder: str | os.PathLike | None = None) -> None:
    """To be called before anything is written.

    Raises:
        UserError: the weights folder has a tokenizer already that may not be overwritten, or that of the checkpoint
            in `folder`, which it is made from, would be.
    """
    if folder is not None:
        paths.check_apart(tokenizer_of(output), _tokenizer_in(folder))
    if tokenizer_of(output).exists() and not overwrite:
        raise UserError(f"{tokenizer_of(output)} exists: choose another output, or replace it with --overwrite.")


def tokenizer_of(weights: str | os.PathLike) -> Path:
    """A weights folder's tokenizer, for `tokenizer.Tokenizer`."""
    return locate(weights) / TOKENIZER


def plan_motion_adapter(path: str | os.PathLike) -> Plan:
    """Plans the import of a motion adapter, from a diffusers folder or one of AnimateDiff's own files (mm_sd_v15.ckpt).

    A file's version is told by its tensors: v2 has motion modules in the middle, and v1 positions for 24 frames.

    Raises:
        UserError: a config.json of another version than the weights, positions that AnimateDiff does not have, or see
            `importers.plan_svd`.
    """
    path = existing(path, "guoyww/animatediff-motion-adapter-v1-5-2")
    if not path.is_dir():
        reader = open_weights(path)
        return _plan_motion(_motion_config_of(reader), reader)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} has no config.json: expected a motion adapter's folder in diffusers layout, or a file."
        )
    config = cast(MotionConfig, read_config("motion_adapter", path / "config.json"))
    reader = open_weights(path)
    has_middle = any(_motion_name(name).startswith("mid_block.") for name in reader.names())
    if has_middle != config.use_motion_mid_block:
        raise UserError(
            f"{path} has {'' if has_middle else 'no '}motion modules in the middle block, but its config.json says"
            f" use_motion_mid_block = {config.use_motion_mid_block}: weights and config are of two versions of"
            " AnimateDiff (only v2 has them); download both again."
        )
    return _plan_motion(config, reader)


def _plan_motion(config: MotionConfig, reader: Reader) -> Plan:
    plan = make_plan("motion_adapter", config, reader, _motion_target)
    for name in reader.names():
        if _POSITIONS.search(_motion_name(name)):
            _check_positions(config, reader, name)
    return plan


def _check_positions(config: MotionConfig, reader: Reader, name: str) -> None:
    shape = reader.shape(name)
    if len(shape) != 3 or shape[:2] != (1, config.motion_max_seq_length):
        raise UserError(
            f"{reader.source}: {name} is of shape {list(shape)}, but config.json says motion_max_seq_length ="
            f" {config.motion_max_seq_length}: they are of two versions of AnimateDiff; download both again."
        )
    expected = frame_positions(shape[1], shape[2])
    if not np.allclose(reader.read(name)[0].astype(np.float32), expected, rtol=0, atol=_POSITION_TOLERANCE):
        raise UserError(
            f"{reader.source}: {name} is not AnimateDiff's sines and cosines: such an adapter cannot be read."
        )


def check_motion_fits(motion: MotionConfig, unet: TextUNetConfig, where: object) -> None:
    """Raises UserError unless the adapter was made for UNets such as this one; `where` is what has both."""
    theirs, ours = (
        (motion.block_out_channels, motion.motion_layers_per_block),
        (
            unet.block_out_channels,
            unet.layers_per_block,
        ),
    )
    if theirs != ours:
        raise UserError(
            f"{where}: the motion adapter is for a UNet with block_out_channels = {theirs[0]} and layers_per_block ="
            f" {theirs[1]}, and unet_2d has {ours[0]} and {ours[1]}: use one for Stable Diffusion 1.5 (v1, v2, v3)."
        )


def check_text_fits(text: CLIPTextConfig, unet: TextUNetConfig, where: object) -> None:
    """Raises UserError unless the UNet attends to states such as this text encoder's; `where` is what has both."""
    if text.hidden_size != unet.cross_attention_dim:
        raise UserError(
            f"{where}: the UNet attends to texts of {unet.cross_attention_dim} channels, and the text encoder's have"
            f" {text.hidden_size}: they are not of one model; use a model made from Stable Diffusion 1.5, all of it."
        )


def video_unet(unet_2d: Mapping[str, Any], motion_adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the video UNet: those of the 2-D UNet and of the adapter, side by side in one tree."""
    return unflatten_dict(flatten_dict(unet_2d) | flatten_dict(motion_adapter))


def video_unet_shapes(unet: TextUNetConfig, motion: MotionConfig) -> dict[NamePath, jax.ShapeDtypeStruct]:
    """The parameters that `video_unet` gives, by path."""
    return expected_params("unet_2d", unet) | expected_params("motion_adapter", motion)


def _with_prefix(name: str) -> Sequence[str]:
    """transformers 5 can leave away that these are the text model's."""
    return (name if name.startswith("text_model.") else f"text_model.{name}",)


def _motion_name(name: str) -> str:
    return renamed(name, _ANIMATEDIFF_NAMES)


def _motion_target(name: str) -> Sequence[str]:
    # Positions are computed.
    name = _motion_name(name)
    return () if _POSITIONS.search(name) else (name,)


def _motion_config_of(reader: Reader) -> MotionConfig:
    names = {_motion_name(name): name for name in reader.names()}
    norms = {
        name: match
        for name in names
        if (match := re.fullmatch(r"down_blocks\.(\d+)\.motion_modules\.(\d+)\.norm\.weight", name))
    }
    positions = [name for name in names if _POSITIONS.search(name)]
    if not norms or not positions:
        raise UserError(
            f"{reader.source} is not a motion adapter: expected down_blocks.0.motion_modules.0... and positions, as in"
            " mm_sd_v15_v2.ckpt."
        )
    widths = {int(match[1]): reader.shape(names[name])[0] for name, match in norms.items()}
    return MotionConfig(
        block_out_channels=tuple(widths[level] for level in sorted(widths)),
        motion_layers_per_block=1 + max(int(match[2]) for match in norms.values()),
        motion_max_seq_length=reader.shape(names[positions[0]])[1],
        use_motion_mid_block=any(name.startswith("mid_block.") for name in names),
    )
