"""How much happens in clips: one number, by which datasets are cut and samples compared."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8


def motion(frames: UInt8[np.ndarray, "*clips f h w 3"]) -> Float[np.ndarray, "*clips"]:
    """Of each clip the mean absolute difference of consecutive frames, 0 to 255; 0 for a single frame.

    VBench (Huang et al. 2024) calls it temporal flickering, as it measures it on videos that should be still.
    """
    if frames.shape[-4] < 2:
        return np.zeros(frames.shape[:-4])
    differences = np.diff(frames.astype(np.int16), axis=-4)
    return np.asarray(np.abs(differences).mean(axis=(-4, -3, -2, -1)))
