"""What SVD is conditioned on, made from the first frame (diffusers' `StableVideoDiffusionPipeline`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from osv_jax.models.resize import apply_per_axis, bicubic_matrix

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

# ln of SVD's noise augmentation strength in training: N(-3, 0.5^2).
_NOISE_AUG_LOG_MEAN = -3.0
_NOISE_AUG_LOG_STD = 0.5


@flax.struct.dataclass
class Conditioning:
    """The conditions of a batch of clips.

    Attributes:
        image_embedding: CLIP embedding of the clean first frame.
        image_latents: VAE mode of the noise-augmented first frame, NOT scaled by 0.18215; one frame, which the network
            repeats over the clip.
        added_time_ids: fps - 1, motion bucket, noise augmentation strength.
    """

    image_embedding: Float[Array, "b c"]
    image_latents: Float[Array, "b h w 4"]
    added_time_ids: Float[Array, "b 3"]

    def unconditional(self) -> Conditioning:
        """The c_0 of classifier-free guidance: SVD was trained with BOTH image conditions dropped, the ids kept."""
        return dataclasses.replace(
            self, image_embedding=jnp.zeros_like(self.image_embedding), image_latents=jnp.zeros_like(self.image_latents)
        )


def condition_on_image(
    encode_image: Callable[[Float[Array, "b size size 3"]], Float[Array, "b c"]],
    encode_mode: Callable[[Float[Array, "b h w 3"]], Float[Array, "b latent_h latent_w 4"]],
    image: Float[Array, "b h w 3"],
    noise: Float[Array, "b h w 3"],
    noise_aug_strength: Float[Array, " b"],
    fps: float | int | Num[Array, " b"],
    motion_bucket_id: float | int | Num[Array, " b"],
    clip_size: int = 224,
) -> Conditioning:
    """Builds the conditioning of clips from their first frames.

    Args:
        encode_image: CLIP, from normalised pixels to embeddings.
        encode_mode: the VAE encoder's mode, from images in [-1, 1] to unscaled latents.
        image: CLEAN first frames in [-1, 1].
        noise: standard normal pixel noise.
        noise_aug_strength: standard deviation of the noise that the VAE, but not CLIP, sees.
        fps: frames a second.
        motion_bucket_id: SVD's amount of motion, 127 by default there.
        clip_size: the side of the images that `encode_image` takes.
    """
    augmented = image + noise_aug_strength[:, None, None, None] * noise
    return Conditioning(
        image_embedding=encode_image(clip_pixels(image, clip_size)),
        image_latents=encode_mode(augmented),
        added_time_ids=added_time_ids(fps, motion_bucket_id, noise_aug_strength),
    )


def random_noise_aug_strength(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Strengths as SVD was trained with."""
    return jnp.exp(_NOISE_AUG_LOG_MEAN + _NOISE_AUG_LOG_STD * jax.random.normal(key, shape))


def added_time_ids(
    fps: float | int | Num[Array, " b"],
    motion_bucket_id: float | int | Num[Array, " b"],
    noise_aug_strength: Float[Array, " b"],
) -> Float[Array, "b 3"]:
    """SVD's micro-conditioning [fps - 1, motion bucket, noise strength] in float32; it was trained on fps - 1."""
    columns = jnp.broadcast_arrays(jnp.asarray(fps) - 1, motion_bucket_id, noise_aug_strength)
    return jnp.stack([column.astype(jnp.float32) for column in columns], axis=-1)


def clip_pixels(image: Float[Array, "b h w 3"], size: int = 224) -> Float[Array, "b size size 3"]:
    """Images in [-1, 1] to CLIP's input, in float32: blur, bicubic resize without crop, CLIP normalisation.

    Blur and resize are diffusers' `_resize_with_antialiasing`. Images of any size are taken: an axis of one pixel,
    which PyTorch cannot reflect, is repeated.
    """
    rows, columns = (_blurred_resize_matrix(length, size) for length in image.shape[1:3])
    # The reference normalises to [0, 1] only after the cubic's overshoot, and does not clip it.
    return ((apply_per_axis(rows, columns, image) + 1) / 2 - CLIP_MEAN) / CLIP_STD


def _blurred_resize_matrix(length: int, size: int) -> Float[np.ndarray, "size length"]:
    """A Gaussian blur with reflected borders, then a bicubic resize with aligned corners, along one axis."""
    sigma = max((length / size - 1) / 2, 0.001)
    # int() then "make odd" are the reference's: the kernel spans about two sigmas on either side.
    window = int(max(4 * sigma, 3)) // 2 * 2 + 1
    offsets = np.arange(window) - window // 2
    gaussian = np.exp(-(offsets**2) / (2 * sigma**2))
    gaussian /= gaussian.sum()
    sources = np.pad(np.arange(length), window // 2, mode="reflect")
    resize = bicubic_matrix(length, size, align_corners=True)
    # Tap by tap: the blur as a matrix, [length, length], would take gigabytes for a photograph.
    rows, taps = np.nonzero(resize)
    matrix = np.zeros_like(resize)
    np.add.at(matrix, (rows[:, None], sources[taps[:, None] + np.arange(window)]), resize[rows, taps, None] * gaussian)
    return matrix
