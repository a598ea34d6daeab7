"""The losses against a second transcription of the papers' equations, in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osv_jax.objectives import losses


@pytest.fixture
def videos(rng):
    return rng.standard_normal((2, 3, 2, 4, 5, 4), np.float32)


@pytest.fixture
def logits(rng):
    """Real and fake, on both sides of both hinges."""
    return [
        {
            "spatial": rng.standard_normal((3, 7), np.float32) * 2,
            "temporal": rng.standard_normal((3, 5), np.float32) * 2,
        }
        for _ in range(2)
    ]


@pytest.mark.parametrize("c", [1e-3, 0.5])
def test_pseudo_huber(videos, c):
    """d(x, y) below OSV Eq. 7, as the mean over elements."""
    x, y = videos
    expected = []
    for clip_x, clip_y in zip(x.astype(np.float64), y.astype(np.float64), strict=True):
        terms = [np.sqrt((a - b) ** 2 + c**2) - c for a, b in zip(clip_x.flat, clip_y.flat, strict=True)]
        expected.append(sum(terms) / len(terms))
    np.testing.assert_allclose(losses.pseudo_huber(x, y, c), expected, rtol=1e-5)


def test_pseudo_huber_has_a_gradient_everywhere(videos):
    x = jnp.asarray(videos[0])
    np.testing.assert_array_equal(losses.pseudo_huber(x, x), 0)
    np.testing.assert_array_equal(jax.grad(lambda y: losses.pseudo_huber(x, y).sum())(x), 0)
    # Far away it is the sign, a clip's share of one element.
    slope = jax.grad(lambda y: losses.pseudo_huber(x, y).sum())(x + 100)
    np.testing.assert_allclose(slope, 1 / x[0].size, rtol=1e-4)


def hinge(values):
    return [np.maximum(0, row.astype(np.float64)) for row in values]


def mean_of_all_heads(spatial, temporal):
    return [np.concatenate([s, t]).mean() for s, t in zip(spatial, temporal, strict=True)]


def test_discriminator_hinge(logits):
    """OSV Eq. 6 and 9: ReLU(1 - D(real)) + ReLU(1 + D(fake))."""
    real, fake = logits
    on_real = mean_of_all_heads(hinge(1 - real["spatial"]), hinge(1 - real["temporal"]))
    on_fake = mean_of_all_heads(hinge(1 + fake["spatial"]), hinge(1 + fake["temporal"]))
    np.testing.assert_allclose(losses.hinge_discriminator(real, fake), np.add(on_real, on_fake), rtol=1e-5)


def test_generator_hinge(logits):
    """The adversarial term of OSV Eq. 7 and 10: ReLU(1 - D(fake))."""
    fake = logits[1]
    expected = mean_of_all_heads(hinge(1 - fake["spatial"]), hinge(1 - fake["temporal"]))
    np.testing.assert_allclose(losses.hinge_generator(fake), expected, rtol=1e-5)


def test_no_clip_changes_another_clips_loss(videos, logits):
    x, y = videos
    real, fake = logits

    def all_losses(x, y, real, fake):
        return losses.pseudo_huber(x, y), losses.hinge_discriminator(real, fake), losses.hinge_generator(fake)

    def other_last_clip(values):
        return np.concatenate([values[:-1], values[-1:] - 3])

    before = all_losses(x, y, real, fake)
    after = all_losses(*jax.tree.map(other_last_clip, (x, y, real, fake)))
    for old, new in zip(before, after, strict=True):
        assert old.shape == (3,)
        np.testing.assert_array_equal(old[:-1], new[:-1])
    assert before[1][-1] != after[1][-1]
    assert before[2][-1] != after[2][-1]
