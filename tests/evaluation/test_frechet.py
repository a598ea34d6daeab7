"""The distance against SciPy's matrix root and closed forms, and what its interval does."""

import numpy as np
import pytest
import scipy.linalg

from osv_jax.evaluation.frechet import Sample, Score, difference, frechet_distance, score
from osv_jax.evaluation.statistics import statistics


def sample(vectors):
    return Sample(vectors, np.ones(len(vectors)))


@pytest.mark.parametrize("counts", [(1000, 1200), (100, 1000)])
def test_against_scipy_of_any_rank(counts, rng):
    """Fewer than 400 vectors have covariances that are not of full rank."""
    spread = np.exp(1.5 * rng.standard_normal(400))
    sets = [
        statistics(scale * rng.standard_normal((n, 400)) * spread) for n, scale in zip(counts, (1, 1.2), strict=True)
    ]
    (mean, covariance), (other_mean, other) = ((s.mean, s.covariance(unbiased=True)) for s in sets)
    root = scipy.linalg.sqrtm(covariance @ other).real
    expected = np.sum((mean - other_mean) ** 2) + np.trace(covariance + other - 2 * root)
    assert frechet_distance(mean, covariance, other_mean, other) == pytest.approx(expected, rel=1e-5)
    assert abs(frechet_distance(mean, covariance, mean, covariance)) <= 1e-10 * np.trace(covariance)


def test_of_independent_features_it_is_a_sum(rng):
    mean, other_mean = rng.standard_normal((2, 5))
    deviation, other = rng.uniform(0, 2, (2, 5))
    expected = np.sum((mean - other_mean) ** 2 + (deviation - other) ** 2)
    actual = frechet_distance(mean, np.diag(deviation**2), other_mean, np.diag(other**2))
    assert actual == pytest.approx(expected, rel=1e-12)


def test_the_interval_covers_what_chance_does(rng):
    """The distance of means alone, 25, with a standard deviation of 10 sqrt(2 / n)."""
    for n in (50, 800):
        scored = score(sample(rng.standard_normal((n, 1))), sample(rng.standard_normal((n, 1)) + 5), True, 200)
        expected = 1.96 * 10 * np.sqrt(2 / n)
        assert (scored.high - scored.low) / 2 == pytest.approx(expected, rel=0.35)
        assert scored.low < scored.value < scored.high


def test_the_interval_depends_on_the_seed_alone(rng):
    real, fake = (sample(rng.standard_normal((20, 3))) for _ in range(2))
    first, again, other = (score(real, fake, True, 10, seed) for seed in (1, 1, 2))
    assert first == again and first.value == other.value and first.high != other.high


def test_without_an_interval(rng):
    two, one = sample(rng.standard_normal((2, 3))), sample(rng.standard_normal((1, 3)))
    for scored in (score(two, two, True), score(one, two, True, 10)):
        assert scored.low is None and scored.high is None and str(scored) == f"{scored.value:.2f}"


def test_a_distance_is_never_said_to_be_negative(rng):
    same = sample(rng.standard_normal((10, 3)))
    assert score(same, same, True, 20).low == 0


def test_of_a_difference_the_interval_is_without_what_two_methods_share(rng):
    """Of means alone: (m + a)^2 - m^2, where chance moves m, the same in both, by sqrt(2 / n)."""
    n, mean, more = 400, 5.0, 0.2
    real, fake = rng.standard_normal((n, 1)), rng.standard_normal((n, 1)) + mean
    worse, better = (score(sample(real), sample(fake + shift), True, 200) for shift in (more, 0.0))
    found = difference(worse, better)
    assert found.value == pytest.approx(worse.value - better.value)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 2 * more * np.sqrt(2 / n), rel=0.35)
    assert worse.low < better.high and found.low > 0  # Told apart, though their intervals overlap.
    swapped = difference(better, worse)
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx((-found.value, -found.high, -found.low))
    assert difference(worse, score(sample(real), sample(fake), True)) == Score(found.value)
