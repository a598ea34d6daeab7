"""The text-to-video networks that a run started from, with which what it trained becomes whole again."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
import numpy as np

from osv_jax.convert import weights
from osv_jax.convert.text_to_video import video_unet, video_unet_shapes
from osv_jax.errors import UserError
from osv_jax.inference.trained import Trained
from osv_jax.models.text_unet import MotionConfig, TextUNetConfig
from osv_jax.runtime.paths import Path

PARTS = ("unet_2d", "motion_adapter")


class VideoBase(NamedTuple):
    """AnimateDiff's UNet of a weights folder: its architectures, and the parameters of both in one tree, float32."""

    folder: Path
    unet: TextUNetConfig
    motion: MotionConfig
    params: dict[str, Any]


def is_text_to_video(trained: Trained, given: str | os.PathLike | None) -> bool:
    """Whether what a run trained belongs to AnimateDiff's UNet of its weights folder, or of the one that is given."""
    folder = given or trained.config.get("weights")
    if not folder or not all((weights.locate(folder) / part).is_dir() for part in PARTS):
        return False
    if not (weights.locate(folder) / "unet").is_dir():
        return True
    shapes = video_unet_shapes(*(weights.load_config(folder, part) for part in PARTS))
    return trained.fits(shapes)


def load_video_base(trained: Trained, source: Any, given: str | os.PathLike | None) -> VideoBase:
    """The UNet that a run started from.

    Args:
        source: what messages call the run.
        given: the weights folder, if it is not the run's own.

    Raises:
        UserError: no folder, or the run does not fit it.
    """
    folder = given or trained.config.get("weights")
    if not folder:
        raise UserError("The run has no weights folder of its own: give the base's with --weights.")
    unet, motion = (weights.load_config(folder, part) for part in PARTS)
    trained.check_fits(video_unet_shapes(unet, motion), source)
    params = video_unet(*(weights.load_params(folder, part, dtype=np.float32) for part in PARTS))
    return VideoBase(weights.locate(folder), unet, motion, jax.tree.map(np.asarray, params))
