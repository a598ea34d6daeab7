"""Pixel mode: clips are encoded inside the step, for runs too small to be worth preparing latents."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from osv_jax.diffusion.conditioning import condition_on_image, random_noise_aug_strength
from osv_jax.objectives.adversarial import Batch
from osv_jax.objectives.networks import Networks, Params


def encode_batch(
    networks: Networks,
    frozen: Params,
    video: UInt8[Array, "b f h w 3"],
    fps: Float[Array, " b"],
    key: jax.Array,
    motion_bucket_id: float = 127,
) -> Batch:
    """Clips to latents and conditions, with a random noise augmentation of every first frame."""
    strength_key, noise_key = jax.random.split(key)
    pixels = video.astype(jnp.float32) / 127.5 - 1
    first = pixels[:, 0]
    strength = random_noise_aug_strength(strength_key, first.shape[:1])

    def encode_image(image: Array) -> Array:
        return networks.image_encoder.apply({"params": frozen["image_encoder"]}, image).astype(jnp.float32)

    def encode_mode(image: Array) -> Array:
        mean, _ = networks.vae.apply({"params": frozen["vae"]}, image, method="encode")
        return mean.astype(jnp.float32)

    cond = condition_on_image(
        encode_image,
        encode_mode,
        first,
        jax.random.normal(noise_key, first.shape),
        strength,
        fps,
        motion_bucket_id,
        clip_size=networks.image_encoder.config.image_size,
    )
    return Batch(latents=networks.encode_video(frozen["vae"], pixels), cond=cond)
