"""What the fuzz test reads of Stable Diffusion's folders, tokenizers and motion adapters; see `fuzz.py`."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator

import numpy as np
import tiny_tokenizer
from fuzz_weights import check_plan, torch_tensors
from safetensors.numpy import save_file

from osv_jax.convert import text_to_video
from osv_jax.convert.tokenizer import Tokenizer
from osv_jax.models.clip_text import CLIPTextConfig
from osv_jax.models.svd_vae import VAEConfig
from osv_jax.models.text_unet import MotionConfig, frame_positions

PROMPTS = ["", "the cat and the 25 cars", "Ein Café  \N{CAT} <|endoftext|> x"]
MOTION = MotionConfig((32, 32), motion_layers_per_block=1, motion_max_seq_length=24, use_motion_mid_block=False)


def make_texts(target: pathlib.Path) -> None:
    """A text encoder, an image VAE and a tokenizer in diffusers' layout, and a motion adapter in both of its forms."""
    vae = VAEConfig(block_out_channels=(8, 8), norm_num_groups=4)
    text = CLIPTextConfig(8, 16, 1, 1, vocab_size=tiny_tokenizer.save(target / "sd" / "tokenizer"))
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    networks = {
        "sd/vae": ("image_vae", vae, {"_class_name": "AutoencoderKL", **blocks}),
        "sd/text_encoder": ("text_encoder", text, {"model_type": "clip_text_model"}),
        "motion": ("motion_adapter", MOTION, {"_class_name": "MotionAdapter"}),
    }
    for folder, (component, config, more) in networks.items():
        (target / folder).mkdir(parents=True, exist_ok=True)
        (target / folder / "config.json").write_text(json.dumps(dataclasses.asdict(config) | more))
        tensors = torch_tensors(component, config, np.float16)
        if component == "motion_adapter":
            tensors |= _positions(tensors)
        file = "model.safetensors" if component == "text_encoder" else "diffusion_pytorch_model.safetensors"
        save_file(tensors, target / folder / file)
    # As AnimateDiff's authors name them; the sizes follow from the shapes, but for that of heads.
    own = {re.sub(r"\.(norm|proj_in|proj_out)\.", r".temporal_transformer.\1.", name): x for name, x in tensors.items()}
    own = {re.sub(r"\.transformer_blocks\.", ".temporal_transformer.transformer_blocks.", n): x for n, x in own.items()}
    save_file({f"module.{name}": x for name, x in own.items()}, target / "mm.safetensors")
    (target / "sd" / "scheduler").mkdir()
    (target / "sd" / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "epsilon"}')


def _positions(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What an adapter's file has besides parameters."""
    blocks = {name.split(".attn1.")[0]: x.shape[0] for name, x in tensors.items() if name.endswith("attn1.to_q.weight")}
    length = MOTION.motion_max_seq_length
    return {f"{block}.pos_embed.pe": frame_positions(length, width)[None] for block, width in blocks.items()}


def use_texts(source: pathlib.Path, damaged: str) -> Iterator[str]:
    if damaged.startswith("sd"):
        for plan in text_to_video.plan_stable_diffusion(source / "sd", ["image_vae", "text_encoder", "tokenizer"]):
            check_plan(plan)
        tokens = Tokenizer(source / "sd" / "tokenizer")
        found = tokens(PROMPTS)
        assert found.ids.shape == (len(PROMPTS), 77) and found.ids.min() >= 0
        assert found.ids.max() == tokens.vocab_size - 1 and not any(found.cut)
        return iter(())
    plan = text_to_video.plan_motion_adapter(source / ("motion" if damaged.startswith("motion") else damaged))
    check_plan(plan)
    return iter(())
