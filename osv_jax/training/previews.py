"""Pictures of a run: a clip, the frame a sample starts from, if any, and a sample of what has been trained so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8
from ml_collections import ConfigDict

from osv_jax.convert import weights
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Objective
from osv_jax.objectives.players import TrainState
from osv_jax.runtime import media, mesh
from osv_jax.training.loop import Picture
from osv_jax.training.sampling import Sampler


def make_picture(
    config: ConfigDict, objective: Objective, example: Mapping[str, Any], devices: jax.sharding.Mesh
) -> Picture:
    """A picture of a clip, the frame the sample starts from if there is one, and the objective's `preview`.

    Args:
        example: a batch of one clip; of latents, the clip is shown as it is decoded.
        devices: those of the run.
    """
    # The same noise every time, so that pictures of different steps can be compared.
    keys = jax.random.split(jax.random.key(config.seed))
    sampler = Sampler(config, objective, devices)
    tiny: Params | None = None
    if objective.networks.tiny_decoder is not None:
        whole, dtype = mesh.replicated(devices), jnp.dtype(config.dtype)
        tiny = weights.load_params(config.weights, "tiny_decoder", whole, dtype)

    def frames(frozen: Params, latents: Array) -> UInt8[np.ndarray, "b f h w 3"]:
        return sampler.frames(frozen, latents) if tiny is None else sampler.fast_frames(tiny, latents)

    def draw(state: TrainState, frozen: Params) -> tuple[np.ndarray, Mapping[str, float]]:
        cond, noise = sampler.encode(frozen, example, *keys)
        latents = sampler.student(state.players["student"].params, frozen, cond, noise)
        sampled = frames(frozen, latents)[0]
        is_video = "video" in example
        clip = example["video"][0] if is_video else frames(frozen, jnp.asarray(example["latents"], jnp.float32))[0]
        label = "real clip" if is_video else "real clip, decoded from its latents"
        rows = {"condition": clip[0]} if objective.starts_from_image else {}
        return media.sample_grid(rows | {label: clip, objective.preview_label: sampled}), {}

    return draw
