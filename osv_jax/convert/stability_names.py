"""The names that Stability's code (sgm, LDM) gives to tensors of SVD and Stable Diffusion 1.5; ComfyUI has the same.

Here they are made from PyTorch names of diffusers and transformers (see `naming`), of networks of any size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# A name of the two libraries -> its name in a file, and which of how many equal parts along axis 0 it is there.
Names = dict[str, tuple[str, int, int]]

UNET_PREFIX = "model.diffusion_model."
# The VAE's encoder and quant_conv; its decoder is the first stage's, which has an encoder of its own.
ENCODER_PREFIX = "conditioner.embedders.3.encoder."
FIRST_STAGE_PREFIX = "first_stage_model."
# Stable Diffusion 1.5's text encoder, under transformers' names.
TEXT_PREFIX = "cond_stage_model.transformer."
CLIP_PREFIX = "conditioner.embedders.0.open_clip.model.visual."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP_OF_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_TRANSFORMER = {
    "temporal_transformer_blocks": "time_stack",
    "time_pos_embed.linear_1": "time_pos_embed.0",
    "time_pos_embed.linear_2": "time_pos_embed.2",
}
_IN_VAE = {
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "resnets": "block",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "time_conv_out": "conv_out.time_mix_conv",
}
_IN_CLIP = {
    "vision_model.embeddings.class_embedding": "class_embedding",
    "vision_model.embeddings.patch_embedding": "conv1",
    "vision_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.pre_layrnorm": "ln_pre",
    "vision_model.post_layernorm": "ln_post",
    "vision_model.encoder.layers": "transformer.resblocks",
    "visual_projection.weight": "proj",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_BLOCK = re.compile(
    r"(?:(?P<half>down|up)_blocks\.(?P<level>\d+)|mid_block)\.(?P<kind>\w+)\.(?P<number>\d+)\.(?P<in>.*)"
)


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """Names of diffusers' SVD or Stable Diffusion UNet -> Stability's, both without a prefix.

    Motion modules keep theirs: no file of Stability's has any.

    Args:
        names: all of one UNet, whose sizes they tell.
    """
    names = list(names)
    levels = len({name.split(".")[1] for name in names if name.startswith("down_blocks.")})
    # Of the halves' blocks each has as many: residual blocks, and on the way down one that halves the picture.
    numbers = {name.split(".")[3] for name in names if name.startswith(f"up_blocks.{levels - 1}.resnets.")}
    attending = {name.split(".")[1] for name in names if re.match(r"up_blocks\.\d+\.attentions\.", name)}

    def renamed(name: str) -> str:
        match = _BLOCK.fullmatch(name)
        if match is None:
            return _replace(name, _TOP_OF_UNET)
        if match["kind"] == "motion_modules":
            return name
        level, number, rest = int(match["level"] or 0) * len(numbers), int(match["number"]), match["in"]
        if match["kind"] == "downsamplers":
            return f"input_blocks.{level + len(numbers)}.0.{rest.replace('conv', 'op')}"
        if match["kind"] == "upsamplers":
            return f"output_blocks.{level + len(numbers) - 1}.{1 + (match['level'] in attending)}.{rest}"
        if match["half"] is None:
            place = f"middle_block.{2 * number if match['kind'] == 'resnets' else 1}"
        else:
            block = (
                f"input_blocks.{level + number + 1}" if match["half"] == "down" else f"output_blocks.{level + number}"
            )
            place = f"{block}.{int(match['kind'] == 'attentions')}"
        if match["kind"] == "attentions":
            return f"{place}.{_replace(rest, _IN_TRANSFORMER)}"
        rest = _replace(rest, _RESNET).replace("spatial_res_block.", "").replace("temporal_res_block", "time_stack")
        return f"{place}.{rest}"

    return {name: renamed(name) for name in names}


def file_names(component: str, names: Iterable[str]) -> Names:
    """Where the tensors of a network are in a single file such as svd.safetensors or v1-5-pruned.safetensors.

    Args:
        component: `unet`, `vae` or `image_encoder`; of Stable Diffusion 1.5 `unet_2d`, `image_vae`, `text_encoder`.
        names: all of the network, of diffusers or transformers.
    """
    names = list(names)
    if component in ("unet", "unet_2d"):
        return {name: (UNET_PREFIX + target, 0, 1) for name, target in unet_names(names).items()}
    if component in ("vae", "image_vae"):
        levels = len({name.split(".")[2] for name in names if name.startswith("decoder.up_blocks.")})
        encoder = ENCODER_PREFIX if component == "vae" else FIRST_STAGE_PREFIX
        return {name: (_vae_name(name, levels, encoder), 0, 1) for name in names}
    if component == "text_encoder":
        return {name: (TEXT_PREFIX + name, 0, 1) for name in names}
    return {name: _clip_name(name) for name in names}


def _vae_name(name: str, levels: int, encoder: str) -> str:
    # Its highest level is the last here, and the first there.
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    name = _replace(name.replace("down_blocks", "down"), _IN_VAE).replace("spatial_res_block.", "")
    if ".temporal_res_block." in name:
        block, rest = name.split(".temporal_res_block.")
        name = f"{block}.time_stack.{_replace(rest, _RESNET)}"
    prefix = FIRST_STAGE_PREFIX if name.startswith("decoder.") else encoder
    return prefix + name.replace("time_mixer.", "")


def _clip_name(name: str) -> tuple[str, int, int]:
    packed = re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
    if packed:
        number, which, kind = packed.groups()
        return f"{CLIP_PREFIX}transformer.resblocks.{number}.attn.in_proj_{kind}", "qkv".index(which), 3
    return CLIP_PREFIX + _replace(name, _IN_CLIP), 0, 1


def _replace(name: str, parts: dict[str, str]) -> str:
    """`name` with whole components of it replaced, each of `parts` in turn."""
    for old, new in parts.items():
        name = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", name)
    return name
