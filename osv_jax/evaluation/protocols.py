"""What public tools do differently before they call the result FVD, under names; docs/evaluation.md has the sources."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from osv_jax.models.resize import bilinear_matrix

# I3D halves the frames three times, and two must be left to average over.
MIN_FRAMES = 10


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How videos become features, and features a covariance.

    Attributes:
        name: what it is called.
        network: whose features are compared, a component of a weights folder.
        num_frames: of every video, from its first on.
        fps: take the frames that are 1 / fps [s] apart; None takes every frame.
        first_size: height and width [px] to which frames are resized before all else (bilinear, antialiased), or None.
        crop: whether the short side is resized to the network's and the centre cut out, or height and width each
            (bilinear, not antialiased).
        unbiased: whether the covariance is divided by N - 1, or by N.
        num_fake: of how many generated videos, fewer being repeated and more left out; None for all, once.
        equal_sizes: whether the videos of a set must have the same height and width.
    """

    name: str
    network: str
    num_frames: int
    fps: float | None
    first_size: tuple[int, int] | None
    crop: bool
    unbiased: bool
    num_fake: int | None
    equal_sizes: bool = False

    def resampling(
        self, height: int, width: int, side: int
    ) -> tuple[Float[np.ndarray, "side height"], Float[np.ndarray, "side width"]]:
        """The matrices that resize and crop frames of `height` x `width` [px] to a network's `side` x `side`."""
        lengths = (height, width)
        first_height, first_width = self.first_size or lengths
        rows = _fit(first_height, first_width, side, self.crop)
        columns = _fit(first_width, first_height, side, self.crop)
        if self.first_size is None:
            return rows, columns
        first = (bilinear_matrix(*pair, antialias=True) for pair in zip(lengths, self.first_size, strict=True))
        return rows @ next(first), columns @ next(first)

    def describe_resize(self, side: int) -> str:
        """What `resampling` does, for people."""
        first = f"{self.first_size[0]} x {self.first_size[1]} (antialiased), then " if self.first_size else ""
        return f"{first}{f'short side to {side}, centre cut out' if self.crop else f'{side} x {side}'}, bilinear"

    def weights(self, num_videos: int, generated: bool) -> Float[np.ndarray, " n"]:
        """How often each of the videos of a set counts, in their order."""
        if not generated or self.num_fake is None:
            return np.ones(num_videos)
        number = np.arange(num_videos)
        return (self.num_fake // num_videos + (number < self.num_fake % num_videos)).astype(np.float64)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("stylegan-v", "i3d", 16, None, None, crop=True, unbiased=True, num_fake=None, equal_sizes=True),
        Protocol("cd-fvd", "videomae", 16, None, None, crop=False, unbiased=False, num_fake=2048),
        Protocol("sf-v", "i3d", 14, 7.0, (240, 320), crop=False, unbiased=False, num_fake=2048),
        Protocol("osv", "i3d", 14, 7.0, None, crop=False, unbiased=True, num_fake=None),
    )
}


def _fit(length: int, other: int, side: int, crop: bool) -> Float[np.ndarray, "side length"]:
    """Along one axis of frames, of which `other` is the other one."""
    if not crop:
        return bilinear_matrix(length, side)
    # Rounded up as the source does, also where rounding of the product alone makes it one more.
    resized = side if length <= other else math.ceil(length * (side / other))
    start = (resized - side) // 2
    return bilinear_matrix(length, resized, rows=slice(start, start + side))
