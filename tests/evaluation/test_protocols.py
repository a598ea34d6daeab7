"""Every protocol's choices, its resizing against PyTorch's."""

import math

import numpy as np
import pytest
import torch
from conftest import relative_error
from torch.nn.functional import interpolate

from osv_jax.evaluation.features import resize
from osv_jax.evaluation.protocols import PROTOCOLS

SIZES = [(37, 53), (53, 37), (30, 30), (9, 12), (24, 25)]
SIDE = 24


def in_torch(name, video):
    """As the sources do it: `video` is [f 3 h w]."""
    if name == "sf-v":
        video = interpolate(video, (240, 320), mode="bilinear", antialias=True)
    if name != "stylegan-v":
        return interpolate(video, (SIDE, SIDE), mode="bilinear")
    height, width = video.shape[2:]
    scale = SIDE / min(height, width)
    size = (SIDE, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), SIDE)
    video = interpolate(video, size, mode="bilinear")
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    return video[:, :, top : top + SIDE, left : left + SIDE]


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("size", SIZES)
def test_frames_are_resized_as_in_torch(name, size, rng):
    frames = rng.integers(0, 256, (2, *size, 3), np.uint8)
    expected = in_torch(name, torch.tensor(frames).float().movedim(-1, 1)).movedim(1, -1).numpy()
    assert relative_error(resize(frames, PROTOCOLS[name], SIDE), expected) <= 1e-5


def test_the_sources_choices():
    chosen = {
        p.name: (p.network, p.num_frames, p.fps, p.unbiased, p.num_fake, p.equal_sizes) for p in PROTOCOLS.values()
    }
    assert chosen == {
        "stylegan-v": ("i3d", 16, None, True, None, True),
        "cd-fvd": ("videomae", 16, None, False, 2048, False),
        "sf-v": ("i3d", 14, 7, False, 2048, False),
        "osv": ("i3d", 14, 7, True, None, False),
    }


@pytest.mark.parametrize("num_videos", [1, 300, 2048, 3000])
def test_generated_videos_are_repeated_or_left_out(num_videos):
    protocol = PROTOCOLS["cd-fvd"]
    expected = np.bincount(np.arange(2048) % num_videos, minlength=num_videos)
    np.testing.assert_array_equal(protocol.weights(num_videos, generated=True), expected)
    np.testing.assert_array_equal(protocol.weights(num_videos, generated=False), np.ones(num_videos))
    np.testing.assert_array_equal(PROTOCOLS["osv"].weights(num_videos, generated=True), np.ones(num_videos))


def test_resizing_is_told():
    texts = {name: protocol.describe_resize(224) for name, protocol in PROTOCOLS.items()}
    assert texts["stylegan-v"] == "short side to 224, centre cut out, bilinear"
    assert texts["sf-v"] == "240 x 320 (antialiased), then 224 x 224, bilinear"
    assert texts["cd-fvd"] == texts["osv"] == "224 x 224, bilinear"
