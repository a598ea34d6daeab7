"""A whole Stable Video Diffusion pipeline of diffusers with small random networks, and the same imported here."""

from __future__ import annotations

import dataclasses
import pathlib

import tiny
import transformers
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, StableVideoDiffusionPipeline
from torch_reference import randomise, torch_unet

from osv_jax.convert.importers import import_svd, plan_dinov2, write

# In a network of 32 channels every group of a GroupNorm is one channel, which takes away what the time embedding adds.
UNET = dataclasses.replace(tiny.CONFIGS["unet"], block_out_channels=(64, 32))
CONFIGS = tiny.CONFIGS | {"unet": UNET}


def save_pipeline(folder: pathlib.Path) -> StableVideoDiffusionPipeline:
    """Saves a pipeline with the architectures of `CONFIGS` (but CLIP at 224 pixels, which the pipeline insists on)."""
    vae, clip = tiny.CONFIGS["vae"], tiny.CONFIGS["image_encoder"]
    pipeline = StableVideoDiffusionPipeline(
        vae=randomise(
            AutoencoderKLTemporalDecoder(
                block_out_channels=vae.block_out_channels,
                down_block_types=("DownEncoderBlock2D",) * len(vae.block_out_channels),
                layers_per_block=vae.layers_per_block,
            ),
            seed=1,
        ),
        image_encoder=randomise(
            transformers.CLIPVisionModelWithProjection(
                transformers.CLIPVisionConfig(
                    hidden_size=clip.hidden_size,
                    intermediate_size=clip.intermediate_size,
                    projection_dim=clip.projection_dim,
                    num_hidden_layers=clip.num_hidden_layers,
                    num_attention_heads=clip.num_attention_heads,
                    image_size=224,
                    patch_size=32,
                    hidden_act="gelu",
                )
            ),
            seed=2,
        ),
        unet=torch_unet(UNET, seed=3),
        # The released scheduler_config.json.
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_type="continuous",
            timestep_spacing="leading",
            steps_offset=1,
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
        ),
        feature_extractor=transformers.CLIPImageProcessorPil(),
    )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_dinov2(folder: pathlib.Path) -> None:
    """Saves the discriminator's backbone of `tiny`, for training from imported weights."""
    config = tiny.CONFIGS["dinov2"]
    network = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
        )
    )
    randomise(network, seed=4).save_pretrained(folder)


def import_all(folder: pathlib.Path, output: pathlib.Path) -> None:
    """Imports a saved pipeline, and DINOv2 if it lies beside it, as float32."""
    import_svd(folder, output, "float32")
    if (folder / "dinov2").is_dir():
        write([plan_dinov2(folder / "dinov2")], output, "float32")
