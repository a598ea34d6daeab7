"""Measures of clips against plain NumPy and numbers worked out by hand."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from osv_jax.errors import UserError
from osv_jax.evaluation import measures
from osv_jax.models.dinov2 import Dinov2Config
from osv_jax.models.lpips import LPIPS
from osv_jax.runtime.finite import NotFinite
from osv_jax.runtime.media import to_float


def grey(*levels):
    """A clip of plain frames."""
    return np.stack([np.full((4, 6, 3), level, np.uint8) for level in levels])


def test_motion_is_the_change_from_frame_to_frame():
    clips = np.stack([grey(0, 255, 0), grey(10, 14, 20), grey(7, 7, 7)])
    np.testing.assert_allclose(measures.motion(clips), [255, 5, 0])
    # Of single clips, as datasets are cut, too.
    assert measures.motion(clips[1]) == 5
    assert measures.motion(clips[:, :1]).tolist() == [0, 0, 0]


def test_colours_that_change_places_move(rng):
    """Their brightness does not change."""
    clip = grey(100, 100)
    clip[1] += np.array([30, 0, 0], np.uint8)
    clip[1] -= np.array([0, 30, 0], np.uint8)
    np.testing.assert_allclose(measures.motion(clip[None]), [20])
    noise = rng.integers(0, 256, (2, 5, 4, 6, 3), np.uint8)
    differences = abs(noise[:, 1:].astype(float) - noise[:, :-1])
    np.testing.assert_allclose(measures.motion(noise), differences.mean((1, 2, 3, 4)))


def test_flicker_is_the_distance_from_the_frames_beside_it(rng):
    clips = np.stack([grey(0, 255, 0, 255), grey(10, 20, 30, 40), grey(0, 0, 8, 8)])
    np.testing.assert_allclose(measures.flicker(clips), [255, 0, 4])
    assert measures.flicker(clips[:, :2]).tolist() == [0, 0, 0]
    noise = rng.integers(0, 256, (2, 5, 4, 6, 3), np.uint8)
    pixels = noise.astype(float)
    distances = abs(pixels[:, 1:-1] - (pixels[:, :-2] + pixels[:, 2:]) / 2)
    np.testing.assert_allclose(measures.flicker(noise), distances.mean((1, 2, 3, 4)))


def test_psnr_is_that_of_the_first_frame():
    """An error of 1 of 255 is 48.13 dB, ten times that 20 dB less."""
    clips, condition = np.stack([grey(51, 200), grey(60, 0), grey(50, 1)]), np.stack([grey(50)[0]] * 3)
    np.testing.assert_allclose(measures.first_frame_psnr(clips, condition), [48.1308, 28.1308, np.inf], rtol=1e-4)


@pytest.mark.integration
def test_lpips_is_the_mean_over_frames(rng):
    frames = rng.integers(0, 256, (2, 3, 32, 40, 3), np.uint8)
    condition = frames[:, 1]
    module = LPIPS()
    params = jax.jit(module.init)(jax.random.key(0), *[np.zeros((1, 32, 40, 3), np.float32)] * 2)["params"]

    pairs = to_float(frames.reshape(-1, 32, 40, 3)), to_float(np.repeat(condition, 3, axis=0))
    expected = jax.jit(module.apply)({"params": params}, *pairs).reshape(2, 3).mean(1)
    assert abs(expected[0] / expected[1] - 1) > 1e-4
    np.testing.assert_allclose(measures.lpips_to_condition(params, frames, condition), expected, rtol=1e-5)
    still = np.repeat(condition[:, None], 3, axis=1)
    np.testing.assert_allclose(measures.lpips_to_condition(params, still, condition), 0, atol=1e-6)
    with pytest.raises(UserError, match="Frames of 30 x 40 are too small for LPIPS, which needs 31 pixels a side"):
        measures.lpips_to_condition(params, frames[:, :, :30], condition[:, :30])


class PatchMeans(nn.Module):
    """Features: a patch's mean colour, times the block's number."""

    config: Dinov2Config = Dinov2Config(patch_size=2)

    @nn.compact
    def __call__(self, images, blocks, read):
        assert read == "patches"
        n, height, width, _ = images.shape
        patches = images.reshape(n, height // 2, 2, width // 2, 2, 3).mean((2, 4))
        return tuple(block * patches for block in blocks)


def test_features_are_compared_over_all_frames_and_blocks(rng):
    frames, target = rng.integers(0, 256, (2, 2, 3, 4, 6, 3), np.uint8)
    backbone, blocks = PatchMeans(), (1, 3)

    def patches(clips):
        normal = (clips / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        return normal.reshape(*clips.shape[:2], 2, 2, 3, 2, 3).mean((3, 5))

    def expected(others):
        squares = (patches(frames) - patches(others)) ** 2
        return (1**2 + 3**2) / 2 * squares.mean((1, 2, 3, 4))

    np.testing.assert_allclose(measures.feature_mse(backbone, {}, blocks, frames, target), expected(target), rtol=1e-5)
    # The condition stands beside every frame.
    condition = target[:, :1]
    np.testing.assert_allclose(
        measures.feature_mse(backbone, {}, blocks, frames, condition), expected(condition), rtol=1e-5
    )
    # (Two calls are two programs where compilers optimise: they may round differently.)
    np.testing.assert_allclose(measures.feature_mse(backbone, {}, blocks, frames, frames), 0, atol=1e-12)


def test_latents_go_from_the_least_to_the_largest_of_their_clip():
    latents = np.zeros((2, 1, 1, 2, 4), np.float32)
    latents[0, 0, 0] = [[-3, 0, 2, 99], [1, -1, 0, -99]]
    pixels = measures.latents_to_pixels(latents)
    assert pixels[0, 0, 0].tolist() == [[0, 153, 255], [204, 102, 153]]
    assert pixels.dtype == np.uint8 and pixels[1].max() == 0
    latents[1, 0, 0, 0, 0] = np.nan
    with pytest.raises(NotFinite):
        measures.latents_to_pixels(latents)
