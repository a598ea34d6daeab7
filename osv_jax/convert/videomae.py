"""Importing VideoMAE: from a transformers folder, or from a checkpoint of VideoMAE or VideoMAE V2."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from osv_jax.convert.importers import Plan, existing, make_plan, read_config
from osv_jax.convert.naming import renamed
from osv_jax.convert.readers import Reader, open_weights
from osv_jax.errors import UserError
from osv_jax.models.videomae import VideoMAEConfig

_PATCHES, _MLP = "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"
# Every released model has heads of 64, but for ViT-g, which has 16.
_GIANT_WIDTH, _GIANT_HEADS = 1408, 16

# transformers' names -> ours, all applied in turn.
_TRANSFORMERS_NAMES = (
    (r"^videomae\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


def plan_videomae(path: str | os.PathLike) -> Plan:
    """Plans the import of VideoMAE, fine-tuned, from a transformers folder or from a `.pth`, whose sizes are inferred.

    CD-FVD's network is `vit_g_hybrid_pt_1200e_ssv2_ft.pth`.

    Raises:
        UserError: nothing there, an architecture we have no code for, unreadable weights, or other tensors.
    """
    path = existing(path, "MCG-NJU/videomae-base-finetuned-ssv2")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json: expected a transformers VideoMAE folder, or give a .pth file.")
        config = read_config("videomae", path / "config.json")
        return make_plan("videomae", config, open_weights(path), _from_transformers_name)
    reader = open_weights(path)
    return make_plan("videomae", _config_of(reader), reader, _from_own_name)


def _from_transformers_name(name: str) -> Sequence[str]:
    name = renamed(name, _TRANSFORMERS_NAMES)
    return () if name.startswith("classifier.") else (name,)


def _from_own_name(name: str) -> Sequence[str]:
    if name.endswith(".attn.qkv.weight"):
        return tuple(name.replace(".qkv.", f".{part}.") for part in ("query", "key", "value"))
    return () if name.startswith("head.") else (name,)


def _config_of(reader: Reader) -> VideoMAEConfig:
    names = set(reader.names())
    if not {_PATCHES, _MLP} <= names:
        raise UserError(
            f"{reader.source} is not a VideoMAE checkpoint: expected {_PATCHES} and blocks, as in"
            " vit_g_hybrid_pt_1200e_ssv2_ft.pth."
        )
    width, _, tubelet, patch, _ = reader.shape(_PATCHES)
    return VideoMAEConfig(
        hidden_size=width,
        num_hidden_layers=len({match[1] for name in names if (match := re.match(r"blocks\.(\d+)\.", name))}),
        num_attention_heads=_GIANT_HEADS if width == _GIANT_WIDTH else width // 64,
        intermediate_size=reader.shape(_MLP)[0],
        patch_size=patch,
        tubelet_size=tubelet,
    )
