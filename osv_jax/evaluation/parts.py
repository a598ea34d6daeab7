"""Files of what is kept of a few clips, or of all of a method: whole or not there."""

from __future__ import annotations

from typing import Any

import numpy as np

from osv_jax.runtime.paths import Path, new_file

# What is kept: measures [n], by name; `features` [n c] of FVD's network; frames of the clips that are `shown`
# [k f h w 3]; `first` frames [n h w 3] of real clips, `latents` [n f h w c] of the target.
# Or the numbers of a `frechet.Score`, by name.
Part = dict[str, np.ndarray]


def save_part(file: Path, part: Part) -> None:
    """Writes what `load_part` reads."""
    with new_file(file) as temporary, temporary.open("wb") as stream:
        arrays: dict[str, Any] = {**part}
        np.savez_compressed(stream, **arrays)


def load_part(file: Path, *names: str) -> Part | None:
    """Some arrays (by default all) of what `save_part` wrote; None where there is nothing, or it is damaged."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in (names or arrays.files) if name in arrays.files}
    except Exception:  # NumPy's reader and zipfile meet damage with exceptions of all kinds.
        return None
