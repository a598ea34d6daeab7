"""What else is measured of clips, beside FVD: a number for each clip, without looking at others."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from osv_jax.data.motion import motion as motion  # Generated clips by the measure that training clips are chosen by.
from osv_jax.errors import UserError
from osv_jax.models.discriminator import backbone_features
from osv_jax.models.layers import apply
from osv_jax.models.lpips import LPIPS, SMALLEST_SIDE
from osv_jax.objectives.autoencoder import frame_psnr
from osv_jax.runtime.media import to_float, to_uint8
from osv_jax.runtime.precision import matmul_precision


def flicker(frames: UInt8[np.ndarray, "n f h w 3"]) -> Float[np.ndarray, " n"]:
    """Mean absolute difference of each frame from the mean of the two beside it, 0 to 255; 0 of fewer than 3 frames.

    VBench's motion smoothness (Huang et al. 2024), which leaves out frames and compares them with interpolated ones,
    with the mean for the interpolating network. Unlike `motion` it is 0 where brightness changes steadily.
    """
    if frames.shape[1] < 3:
        return np.zeros(len(frames))
    second_differences = np.diff(frames.astype(np.int16), n=2, axis=1)
    return np.abs(second_differences).mean(axis=(1, 2, 3, 4)) / 2


def first_frame_psnr(
    frames: UInt8[np.ndarray, "n f h w 3"], condition: UInt8[np.ndarray, "n h w 3"]
) -> Float[np.ndarray, " n"]:
    """Peak signal to noise ratio [dB] of the first frame against the picture it was made from; infinite if equal."""
    return np.asarray(frame_psnr(to_float(frames[:, :1]), to_float(condition[:, None])))[:, 0]


def lpips_to_condition(
    params: dict[str, Any], frames: UInt8[np.ndarray, "n f h w 3"], condition: UInt8[np.ndarray, "n h w 3"]
) -> Float[np.ndarray, " n"]:
    """LPIPS (Zhang et al. 2018) of a clip's frames to the picture it was made from, the mean over all frames.

    Small where the picture's content is kept, and smallest where nothing moves: read it beside `motion`.

    Args:
        params: see `lpips.load_lpips`.

    Raises:
        UserError: frames smaller than LPIPS takes.
    """
    height, width = frames.shape[2:4]
    if min(height, width) < SMALLEST_SIDE:
        raise UserError(
            f"Frames of {height} x {width} are too small for LPIPS, which needs {SMALLEST_SIDE} pixels a side."
        )
    # One clip after the other, so that memory does not depend on how many there are.
    with matmul_precision(jnp.float32):
        return np.array([_lpips(params, *clip).mean() for clip in zip(frames, condition, strict=True)])


def feature_mse(
    backbone: nn.Module,
    params: dict[str, Any],
    blocks: tuple[int, ...],
    frames: UInt8[np.ndarray, "n f h w 3"],
    others: UInt8[np.ndarray, "n g h w 3"],
) -> Float[np.ndarray, " n"]:
    """Mean squared difference of DINOv2's features of two sets of clips (OSV Table 3).

    Against the condition, repeated for every frame, it is small where a student makes still videos; against its
    training target, where it does what its teacher does. The paper does not say which features these are: here those
    that the discriminator sees, the patches of all its blocks, of frames in pixels.

    Args:
        backbone, params, blocks: see `discriminator.backbone_features`.
        frames, others: of the same videos, f frames each, or a single other one, which all are compared with.
    """
    with matmul_precision(jnp.float32):
        pairs = zip(frames, others, strict=True)
        return np.array([_feature_mse(backbone, blocks, params, *pair) for pair in pairs])


def latents_to_pixels(latents: Float[np.ndarray, "n f h w c"]) -> UInt8[np.ndarray, "n f h w 3"]:
    """Latents as pictures (OSV Fig. 8): the first three channels, each clip from its least to its largest value.

    The paper quantises latents to 0 to 255, and does not say which channels, nor which range.

    Raises:
        NotFinite: a value that is not.
    """
    shown = np.asarray(latents, np.float32)[..., :3]
    low, high = (extreme(shown, axis=(1, 2, 3, 4), keepdims=True) for extreme in (np.min, np.max))
    return to_uint8(2 * (shown - low) / np.where(high > low, high - low, 1) - 1)


@jax.jit
def _lpips(
    params: dict[str, Any], frames: UInt8[Array, "f h w 3"], condition: UInt8[Array, "h w 3"]
) -> Float[Array, " f"]:
    images = to_float(frames)
    return apply(LPIPS(), {"params": params}, images, jnp.broadcast_to(to_float(condition), images.shape))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _feature_mse(
    backbone: nn.Module,
    blocks: tuple[int, ...],
    params: dict[str, Any],
    frames: UInt8[Array, "f h w 3"],
    others: UInt8[Array, "g h w 3"],
) -> Float[Array, ""]:
    features = (backbone_features(backbone, params, clip[None] / 255, blocks) for clip in (frames, others))
    squares = [jnp.mean((ours - theirs) ** 2) for ours, theirs in zip(*features, strict=True)]
    return jnp.mean(jnp.array(squares))
