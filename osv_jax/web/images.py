"""What the page of images computes."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from osv_jax.data.image import read_image
from osv_jax.data.video import cover
from osv_jax.errors import UserError
from osv_jax.inference.options import DEFAULT_STEPS, CompleteOptions, Options
from osv_jax.inference.pipeline import PARTS, ImageToVideo
from osv_jax.web.studio import Request, Size, Studio

# A picture with more is refused: decoded, these are 150 MB.
MAX_PIXELS = 50_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRequest(Request):
    """What one person wants made of an image, a file."""

    image: str | os.PathLike
    motion_bucket_id: float


class ImageStudio(Studio[ImageRequest]):
    """Videos of images."""

    default_steps = DEFAULT_STEPS
    student_sampler, teacher_sampler = "tts", "euler"
    max_bytes = 30_000_000
    _pipeline, _options, _parts = ImageToVideo, Options, PARTS

    def _inputs(self, request: ImageRequest, plan: Mapping[str, CompleteOptions]) -> dict[str, Any]:
        return {"image": _read(pathlib.Path(request.image), self.max_bytes)}

    def _example(self, size: Size) -> dict[str, Any]:
        return {"image": np.full((*size, 3), 128, np.uint8)}

    def _chosen(self, request: ImageRequest, sampler: str) -> dict[str, Any]:
        return {"motion_bucket_id": request.motion_bucket_id}

    def _about(self, request: ImageRequest) -> dict[str, Any]:
        return {"image": pathlib.Path(request.image).name, "motion_bucket_id": request.motion_bucket_id}

    def _picture(
        self, inputs: Mapping[str, Any], made: Mapping[str, UInt8[np.ndarray, "f h w 3"]], size: Size
    ) -> UInt8[np.ndarray, "h w 3"]:
        """The image as the VAE saw it."""
        return cover(inputs["image"], *size)


def _read(path: pathlib.Path, max_bytes: int) -> UInt8[np.ndarray, "h w 3"]:
    """The image, within the limits of uploads; messages give its name alone, not where it is."""
    try:
        if path.stat().st_size > max_bytes:
            raise UserError(f"{path} has more than {max_bytes // 1_000_000} MB: scale it down first.")
        return read_image(path, MAX_PIXELS)
    except OSError as error:
        raise UserError(f"{path.name} is not there any more: upload it again.") from error
    except UserError as error:
        raise UserError(str(error).replace(os.fspath(path), path.name)) from error
