"""Pictures of a run: a clip, the frame a sample starts from, and a sample of what has been trained so far."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from osv_jax.diffusion.conditioning import Conditioning
from osv_jax.diffusion.edm import EDMBackbone
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Objective
from osv_jax.objectives.players import Student, TrainState
from osv_jax.runtime import media, mesh
from osv_jax.training.loop import Picture


def make_picture(
    config: ConfigDict, objective: Objective, example: Mapping[str, Any], devices: jax.sharding.Mesh
) -> Picture:
    """A picture of a clip, the frame the sample starts from, and the objective's `preview`.

    Args:
        example: a batch of one clip; of latents, the clip is shown as the VAE decodes it.
        devices: those of the run.
    """
    # The same noise every time, so that pictures of different steps can be compared.
    encode_key, noise_key = jax.random.split(jax.random.key(config.seed))
    networks, scale = objective.networks, config.lora.alpha / config.lora.rank
    boundary = config.get("boundary", "svd")

    # Every process has the whole sample, so that the first can write it down.
    whole = mesh.replicated(devices)

    @functools.partial(jax.jit, out_shardings=whole)
    def encode(frozen: Params) -> tuple[Conditioning, jax.Array]:
        batch = objective.batch(frozen, example, encode_key, config.data)
        return batch.cond, jax.random.normal(noise_key, batch.latents.shape)

    @functools.partial(jax.jit, out_shardings=whole)
    def denoised(student: Student, frozen: Params, cond: Conditioning, x: Array, sigma: Array) -> Array:
        network = networks.unet_with(student.variables(frozen["unet"], scale))
        return objective.preview_denoiser(EDMBackbone(network, cond, boundary), x.shape[1])(x, sigma)

    decode = jax.jit(networks.codec.decode_video, out_shardings=whole)

    def frames_of(frozen: Params, latents: np.ndarray) -> np.ndarray:
        # Two frames at a time: decoding a whole clip at 576 x 1024 takes more memory than a training step.
        chunks = [decode(frozen["vae"], latents[:, i : i + 2]) for i in range(0, latents.shape[1], 2)]
        decoded = np.concatenate([np.asarray(chunk[0]) for chunk in chunks])
        return media.to_uint8(decoded)

    def draw(state: TrainState, frozen: Params) -> tuple[np.ndarray, Mapping[str, float]]:
        cond, noise = encode(frozen)
        denoiser = functools.partial(denoised, state.players["student"].params, frozen, cond)
        sampled = frames_of(frozen, np.asarray(objective.preview(denoiser, noise)))
        is_video = "video" in example
        clip = example["video"][0] if is_video else frames_of(frozen, example["latents"].astype(np.float32))
        label = "real clip" if is_video else "real clip, decoded from its latents"
        return media.sample_grid({"condition": clip[0], label: clip, objective.preview_label: sampled}), {}

    return draw
