"""The smallest networks that make videos of prompts, and CLIP, as weights folders with random parameters."""

import pathlib

import numpy as np
import tiny_tokenizer

from osv_jax.convert import weights
from osv_jax.objectives.random_networks import random_architecture, random_frozen

_LAYERS = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
_UNET = {"block_out_channels": (32,), "layers_per_block": 1, "num_attention_heads": (1,), "has_attention": (False,)}
ANIMATEDIFF = {
    "unet_2d": _UNET | {"cross_attention_dim": 8},
    "motion_adapter": {
        "block_out_channels": (32,),
        "motion_layers_per_block": 1,
        "motion_num_attention_heads": 1,
    },
    "image_vae": {"block_out_channels": (32, 32)},
    "text_encoder": _LAYERS,
}
CLIP = {
    "clip_text": _LAYERS | {"projection_dim": 8},
    "clip_vision": _LAYERS | {"projection_dim": 8, "image_size": 28},
}


def save(folder: pathlib.Path, chosen: dict) -> None:
    """A weights folder with `ANIMATEDIFF`, or with `CLIP`, and a tokenizer."""
    vocabulary = tiny_tokenizer.save(folder / "tokenizer")
    chosen = {name: sizes | ({"vocab_size": vocabulary} if "text" in name else {}) for name, sizes in chosen.items()}
    architectures = {name: random_architecture(chosen, name) for name in chosen}
    for name, params in random_frozen(architectures, np.float32).items():
        weights.save_component(folder / name, name, architectures[name], params, folder)
