"""A Stable Diffusion 1.5 and a motion adapter of diffusers with small random networks, saved as they are published."""

from __future__ import annotations

import pathlib

import tiny_tokenizer
import transformers
from diffusers import AnimateDiffPipeline, AutoencoderKL, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from tool import convert
from torch_reference import randomise

WIDTHS = (16, 32)


def unet_2d(cross_attention_dim: int = 24) -> UNet2DConditionModel:
    return randomise(
        UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=WIDTHS,
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=cross_attention_dim,
            norm_num_groups=8,
        )
    )


def adapter(widths: tuple[int, ...] = WIDTHS, **options) -> MotionAdapter:
    return randomise(MotionAdapter(widths, motion_layers_per_block=1, **options))


def small_adapter() -> MotionAdapter:
    return adapter(motion_num_attention_heads=4, motion_norm_num_groups=8)


def image_vae(levels: int = 2) -> AutoencoderKL:
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    widths = (16,) * (levels - 1) + (32,)
    return randomise(AutoencoderKL(block_out_channels=widths, layers_per_block=2, norm_num_groups=8, **kinds))


def text_encoder(vocab_size: int) -> transformers.CLIPTextModel:
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(vocab_size=vocab_size, eos_token_id=2, **sizes)
    return randomise(transformers.CLIPTextModel(config))


def save_checkpoint(folder: pathlib.Path, levels: int = 2) -> dict:
    """Folders `sd` and `motion` in diffusers layout; the networks in them, by the names of their folders."""
    networks = {"unet": unet_2d(), "vae": image_vae(levels), "motion": small_adapter()}
    networks["text_encoder"] = text_encoder(tiny_tokenizer.save(folder / "sd" / "tokenizer"))
    for name, network in networks.items():
        network.save_pretrained(folder / name if name == "motion" else folder / "sd" / name)
    (folder / "sd" / "scheduler").mkdir()
    (folder / "sd" / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "epsilon"}')
    return networks


def import_all(folder: pathlib.Path, output: pathlib.Path) -> None:
    """Imports `save_checkpoint`'s folders as float32."""
    assert convert(["sd", str(folder / "sd"), str(output), "--dtype=float32"]) == 0
    assert convert(["motion", str(folder / "motion"), str(output), "--dtype=float32"]) == 0


def pipeline(folder: pathlib.Path, networks: dict) -> AnimateDiffPipeline:
    """diffusers', with the scheduler of AnimateDiff's own configuration."""
    made = AnimateDiffPipeline(
        vae=networks["vae"],
        text_encoder=networks["text_encoder"],
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "sd" / "tokenizer", model_max_length=77),
        unet=networks["unet"],
        motion_adapter=networks["motion"],
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False
        ),
    )
    made.set_progress_bar_config(disable=True)
    return made
