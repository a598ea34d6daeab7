"""What checkpoints' config.json files say, as our configs: options that there is no code for are refused by name."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from osv_jax.errors import UserError
from osv_jax.models.clip_text import CLIPTextConfig, CLIPTextProjectionConfig
from osv_jax.models.clip_vision import CLIPVisionConfig
from osv_jax.models.dinov2 import Dinov2Config
from osv_jax.models.i3d import I3DConfig
from osv_jax.models.svd_unet import UNetConfig
from osv_jax.models.svd_vae import VAEConfig
from osv_jax.models.text_unet import MotionConfig, TextUNetConfig
from osv_jax.models.tiny_decoder import TinyDecoderConfig
from osv_jax.models.videomae import VideoMAEConfig
from osv_jax.runtime.ranges import POSITIVE, Range

# Of a field that is not named: a number of channels, heads, tokens or pixels.
_SIZE = Range(1, 2**16, whole=True)
_EPS = Range(0, 1, above_low=True)
# What is counted here is traced one by one: a number that is damaged would take for ever.
_RANGES = {
    "fc_norm_eps": _EPS,
    "layer_norm_eps": _EPS,
    "norm_eps": _EPS,
    "mlp_ratio": Range(0, 2**8, above_low=True),
    "scaling_factor": POSITIVE,
    "num_register_tokens": Range(0, 2**10, whole=True),
    "num_hidden_layers": Range(1, 128, whole=True),
    "num_upsamples": Range(1, 8, whole=True),
    "layers_per_block": Range(1, 16, whole=True),
    "motion_layers_per_block": Range(1, 16, whole=True),
    "transformer_layers_per_block": Range(1, 16, whole=True),
}
_MAX_LEVELS = 8


def _fields(json: dict[str, Any], names: list[str], where: str) -> dict[str, Any]:
    """Options by name, lists as tuples; all must be there, for a default of ours need not be the checkpoint's."""
    missing = [name for name in names if name not in json]
    if missing:
        raise UserError(
            f"{where} does not say {', '.join(missing)}: expected the config.json that was saved with the weights."
        )
    return {name: tuple(json[name]) if isinstance(json[name], list) else json[name] for name in names}


def make_config(config_class: type, fields: Mapping[str, Any], where: Any) -> Any:
    """A config with all these fields.

    Args:
        where: the file that they are from.

    Raises:
        UserError: naming a field with a value that no network has; wrong sizes may also not match the weights.
    """
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


def unet_config(json: dict[str, Any]) -> UNetConfig:
    where = "unet/config.json"
    _require(json, where, _class_name="UNetSpatioTemporalConditionModel")
    names = [field.name for field in dataclasses.fields(UNetConfig)]
    names = [name for name in names if name not in ("has_attention", "num_added_time_ids")]
    fields = _fields(
        json, [*names, "down_block_types", "up_block_types", "projection_class_embeddings_input_dim"], where
    )
    _read_blocks(fields, "SpatioTemporal", where)
    ids = fields.pop("projection_class_embeddings_input_dim") // fields["addition_time_embed_dim"]
    return make_config(UNetConfig, fields | {"num_added_time_ids": ids}, where)


def _read_blocks(fields: dict[str, Any], suffix: str, where: str) -> None:
    """Block types become `has_attention`, and what may be one number or one a level what ours is."""
    kinds = {f"CrossAttnDownBlock{suffix}": True, f"DownBlock{suffix}": False}
    down = fields.pop("down_block_types")
    unknown = [kind for kind in down if kind not in kinds]
    if unknown:
        raise UserError(f"{where} says down_block_types with {unknown[0]!r}, but only {list(kinds)} are supported.")
    up = tuple(kind.replace("Down", "Up") for kind in reversed(down))
    _require(fields, where, up_block_types=up)
    del fields["up_block_types"]
    for name in ("num_attention_heads", "layers_per_block", "transformer_layers_per_block", "cross_attention_dim"):
        fields[name] = _per_level(fields[name], len(down), name, isinstance(getattr(UNetConfig, name), tuple), where)
    fields["has_attention"] = tuple(kinds[kind] for kind in down)


def _per_level(value: Any, levels: int, name: str, wants_tuple: bool, where: str) -> Any:
    """diffusers lets some options be one number or one number a level; ours are one or the other."""
    if wants_tuple:
        return value if isinstance(value, tuple) else (value,) * levels
    if isinstance(value, tuple) and len(set(value)) != 1:
        raise UserError(f"{where} says {name} = {value}, but only one value for all levels is supported.")
    return value[0] if isinstance(value, tuple) else value


def vae_config(json: dict[str, Any]) -> VAEConfig:
    where = "vae/config.json"
    _require(json, where, _class_name="AutoencoderKLTemporalDecoder")
    # What the file does not say: diffusers' network has no other.
    names = [field.name for field in dataclasses.fields(VAEConfig) if field.name != "norm_num_groups"]
    fields = _fields(json, names, where)
    _require(json, where, down_block_types=["DownEncoderBlock2D"] * len(fields["block_out_channels"]))
    return make_config(VAEConfig, fields, where)


# What later models than Stable Diffusion 1.5 have, and what is fixed in it.
_NOT_OF_SD15 = {"addition_embed_type": None, "class_embed_type": None, "use_linear_projection": False}
_FIXED_IN_SD15: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "act_fn": "silu",
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "time_cond_proj_dim": None,
    "encoder_hid_dim": None,
}


def text_unet_config(json: dict[str, Any]) -> TextUNetConfig:
    where = "unet/config.json"
    _require(json, where, _class_name="UNet2DConditionModel")
    for name, value in _NOT_OF_SD15.items():
        if json.get(name, value) != value:
            raise UserError(
                f"{where} says {name} = {json[name]!r}, so its model is none of Stable Diffusion 1.5's, whose latents"
                " and text encoder AnimateDiff has: use one made from it."
            )
    _require(json, where, **_FIXED_IN_SD15)
    # Older files do not say the first; the heads' number goes by another name in all.
    json = {"transformer_layers_per_block": 1} | json
    json["num_attention_heads"] = json.get("num_attention_heads") or json.get("attention_head_dim")
    names = [field.name for field in dataclasses.fields(TextUNetConfig) if field.name != "has_attention"]
    fields = _fields(json, [*names, "down_block_types", "up_block_types"], where)
    _read_blocks(fields, "2D", where)
    return make_config(TextUNetConfig, fields, where)


def motion_config(json: dict[str, Any]) -> MotionConfig:
    where = "the motion adapter's config.json"
    _require(json, where, _class_name="MotionAdapter", conv_in_channels=None, motion_mid_block_layers_per_block=1)
    _require(json, where, motion_transformer_layers_per_block=1, motion_transformer_layers_per_mid_block=1)
    fields = _fields(json, [field.name for field in dataclasses.fields(MotionConfig)], where)
    for name in ("motion_layers_per_block", "motion_num_attention_heads"):
        fields[name] = _per_level(fields[name], 1, name, False, where)
    return make_config(MotionConfig, fields, where)


def image_vae_config(json: dict[str, Any]) -> VAEConfig:
    where = "vae/config.json"
    _require(json, where, _class_name="AutoencoderKL", act_fn="silu", mid_block_add_attention=True)
    _require(json, where, use_quant_conv=True, use_post_quant_conv=True)
    json = {"scaling_factor": VAEConfig.scaling_factor, "shift_factor": None} | json
    latents = json["scaling_factor"], json["shift_factor"]
    if latents != (VAEConfig.scaling_factor, None):
        raise UserError(
            f"{where} says scaling_factor = {latents[0]!r} and shift_factor = {latents[1]!r}, so its latents are not"
            f" those of Stable Diffusion 1.5 ({VAEConfig.scaling_factor}, None), which AnimateDiff has: use a model"
            " made from it."
        )
    fields = _fields(json, [field.name for field in dataclasses.fields(VAEConfig)], where)
    levels = len(fields["block_out_channels"])
    _require(json, where, down_block_types=["DownEncoderBlock2D"] * levels)
    _require(json, where, up_block_types=["UpDecoderBlock2D"] * levels)
    return make_config(VAEConfig, fields, where)


def text_config(json: dict[str, Any]) -> CLIPTextConfig:
    where = "text_encoder/config.json"
    _require(json, where, model_type="clip_text_model", use_attention_mask=False)
    return make_config(
        CLIPTextConfig, _fields(json, [field.name for field in dataclasses.fields(CLIPTextConfig)], where), where
    )


def clip_text_config(json: dict[str, Any]) -> CLIPTextProjectionConfig:
    """The text tower of a whole CLIP."""
    return _tower_config(json, "text_config", CLIPTextProjectionConfig)


def clip_vision_config(json: dict[str, Any]) -> CLIPVisionConfig:
    """The image tower of a whole CLIP."""
    return _tower_config(json, "vision_config", CLIPVisionConfig)


def _tower_config(json: dict[str, Any], part: str, kind: type) -> Any:
    where = "CLIP's config.json"
    _require(json, where, model_type="clip")
    own = json.get(part)
    if not isinstance(own, dict):
        raise UserError(f"{where} does not say {part}: expected the config.json that was saved with the weights.")
    # What files leave out is as in the first model that transformers had, ViT-B/32.
    is_text = part == "text_config"
    sizes = (512, 2048, 8) if is_text else (768, 3072, 12)
    base: dict[str, Any] = dict(zip(("hidden_size", "intermediate_size", "num_attention_heads"), sizes, strict=True))
    base |= {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 512}
    base |= {"vocab_size": 49408, "max_position_embeddings": 77} if is_text else {"image_size": 224, "patch_size": 32}
    _require(own, f"{where}: {part}", num_channels=3)
    own = base | own | {"projection_dim": json.get("projection_dim", own.get("projection_dim", 512))}
    fields = _fields(own, [field.name for field in dataclasses.fields(kind)], where)
    return make_config(kind, fields, f"{where}: {part}")


def clip_config(json: dict[str, Any]) -> CLIPVisionConfig:
    where = "image_encoder/config.json"
    _require(json, where, model_type="clip_vision_model", num_channels=3)
    fields = _fields(json, [field.name for field in dataclasses.fields(CLIPVisionConfig)], where)
    return make_config(CLIPVisionConfig, fields, where)


def dinov2_config(json: dict[str, Any]) -> Dinov2Config:
    where = "DINOv2's config.json"
    registers = json.get("model_type") == "dinov2_with_registers"
    if not registers:
        _require(json, where, model_type="dinov2")
    _require(json, where, hidden_act="gelu", qkv_bias=True, num_channels=3)
    names = [field.name for field in dataclasses.fields(Dinov2Config)]
    if not registers:
        names.remove("num_register_tokens")
    return make_config(Dinov2Config, _fields(json, names, where), where)


def i3d_config(json: dict[str, Any]) -> I3DConfig:
    where = "I3D's config.json"
    return make_config(I3DConfig, _fields(json, [field.name for field in dataclasses.fields(I3DConfig)], where), where)


def videomae_config(json: dict[str, Any]) -> VideoMAEConfig:
    where = "VideoMAE's config.json"
    # The bias' name has changed.
    supported = {"model_type": "videomae", "hidden_act": "gelu", "num_channels": 3, "use_mean_pooling": True}
    _require(json, where, **supported, qkv_bias=True, qv_bias=True)
    names = [field.name for field in dataclasses.fields(VideoMAEConfig) if field.name != "fc_norm_eps"]
    # Which transformers' module does not take from the file.
    return make_config(VideoMAEConfig, _fields(json, names, where) | {"fc_norm_eps": 1e-5}, where)


def tiny_decoder_config(json: dict[str, Any]) -> TinyDecoderConfig:
    where = "The tiny decoder's config.json"
    names = [field.name for field in dataclasses.fields(TinyDecoderConfig)]
    return make_config(TinyDecoderConfig, _fields(json, names, where), where)
