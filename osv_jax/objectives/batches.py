"""Clips as objectives take them: videos, encoded inside the step, or records of a dataset of latents."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, UInt8

from osv_jax.codec import Codec, Params
from osv_jax.diffusion.conditioning import Conditioning, added_time_ids, random_noise_aug_strength
from osv_jax.diffusion.ddpm import TextConditioning
from osv_jax.runtime.media import to_float


@struct.dataclass
class Batch:
    """Clips as a step takes them.

    Attributes:
        latents: x_0, scaled video latents, float32.
        cond: what the networks are conditioned on.
    """

    latents: Float[Array, "b f h w c"]
    cond: Conditioning


@struct.dataclass
class TextBatch:
    """Clips as a step of a text-to-video network takes them.

    Attributes:
        latents: x_0, scaled video latents, float32.
        cond: the texts of the clips, and the empty text beside each of them.
    """

    latents: Float[Array, "b f h w c"]
    cond: TextConditioning


def to_batch(
    codec: Codec, frozen: Params, clips: Mapping[str, Array], key: jax.Array, motion_bucket_id: float = 127
) -> Batch:
    """The batch that `training.clips` gives: videos are encoded, records of latents are used as they are."""
    if "video" in clips:
        return encode_batch(codec, frozen, clips["video"], clips["fps"], key, motion_bucket_id)
    return batch_of_records(clips, key, motion_bucket_id)


def encode_batch(
    codec: Codec,
    frozen: Params,
    video: UInt8[Array, "b f h w 3"],
    fps: Float[Array, " b"],
    key: jax.Array,
    motion_bucket_id: float = 127,
) -> Batch:
    """Clips to latents and conditions, with a random noise augmentation of every first frame."""
    strength_key, noise_key = jax.random.split(key)
    pixels = to_float(video)
    first = pixels[:, 0]
    strength = random_noise_aug_strength(strength_key, first.shape[:1])
    noise = jax.random.normal(noise_key, first.shape)
    cond = codec.condition(frozen, first, noise, strength, fps, motion_bucket_id)
    return Batch(latents=codec.encode_video(frozen["vae"], pixels), cond=cond)


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


def text_batch_of_records(records: Mapping[str, Array]) -> TextBatch:
    """Records of a dataset with texts.

    Args:
        records: `latents` [b f h w c]; `text_embeddings` [b 77 d], the text encoder's states of each caption; and
            `empty_text_embeddings` [b 77 d], those of the empty prompt, once for each clip, so that devices split them
            as everything else.
    """
    context, negative = (records[name].astype(jnp.float32) for name in ("text_embeddings", "empty_text_embeddings"))
    return TextBatch(records["latents"].astype(jnp.float32), TextConditioning(context, negative))
