"""The film of the miniature: cuts are found, shots are split without sharing frames, and read back as written."""

import pathlib
import runpy

import av
import numpy as np
import pytest

from osv_jax.data import video

film = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "tools" / "fetch_film.py"))


def scene(rng, frames, brightness, drift=0.5):
    """A noisy picture that slowly gets brighter."""
    picture = brightness + rng.integers(0, 20, (9, 16))
    return np.stack([picture + drift * i for i in range(frames)]).astype(np.uint8)


def test_cuts_are_where_much_changes_at_once(rng):
    flash = scene(rng, 3, 200)
    fast = scene(rng, 20, 20, drift=10)  # Everything moves, and nothing is cut.
    scenes = [scene(rng, 30, 20), scene(rng, 40, 100), flash, scene(rng, 25, 20), scene(rng, 15, 90), fast]
    assert film["find_shots"](np.concatenate(scenes)) == [(0, 30), (30, 70), (73, 98), (98, 113), (113, 133)]


def test_nothing_is_both_trained_and_tested_on():
    shots = [(0, 40), (40, 90), (90, 130), (130, 150), (150, 200), (205, 260), (260, 300)]
    parts = film["split_shots"](shots, 100, (150, 204))
    assert parts == {"train": [(0, 40), (40, 90), (90, 100)], "test": [(130, 150), (205, 260), (260, 300)]}


def test_a_shot_is_read_back(tmp_path):
    grey = [np.full((108, 192, 3), 40 + 5 * i, np.uint8) for i in range(14)]
    frames = [av.VideoFrame.from_ndarray(x, format="rgb24").reformat(format="yuv420p") for x in grey]
    film["write_shot"](tmp_path / "shot.mp4", frames)
    info = video.probe(tmp_path / "shot.mp4")
    assert (info.num_frames, info.height, info.width, info.fps) == (14, 108, 192, pytest.approx(24))
    clip = video.read_clip(tmp_path / "shot.mp4", 2 / 24, 6, 12.0, 64, 96)
    np.testing.assert_allclose(clip.mean((1, 2, 3)), [50 + 10 * i for i in range(6)], atol=1.5)
    assert film["luma"](frames[0]).shape == (27, 48)
