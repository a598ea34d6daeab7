"""Latent mode: batches of a prepared dataset, for which nothing has to be encoded."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from osv_jax.diffusion.conditioning import Conditioning, added_time_ids
from osv_jax.objectives.adversarial import Batch


def batch_of_records(records: Mapping[str, Array], key: jax.Array, motion_bucket_id: float = 127) -> Batch:
    """Records of `data.latents.latent_batches` as a batch; which of the K noise augmentations is random."""
    strengths = records["noise_aug_strength"]
    choice = jax.random.randint(key, strengths.shape[:1], 0, strengths.shape[1])

    def chosen(values: Array) -> Array:
        index = choice.reshape(-1, *[1] * (values.ndim - 1))
        return jnp.take_along_axis(values, index, axis=1)[:, 0].astype(jnp.float32)

    cond = Conditioning(
        image_embedding=records["image_embedding"].astype(jnp.float32),
        image_latents=chosen(records["image_latents"]),
        added_time_ids=added_time_ids(records["fps"], motion_bucket_id, chosen(strengths)),
    )
    return Batch(latents=records["latents"].astype(jnp.float32), cond=cond)
