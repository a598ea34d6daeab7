"""Mean and covariance from parts against those of all vectors at once."""

import numpy as np
import pytest
from conftest import relative_error

from osv_jax.evaluation.statistics import merge, statistics


@pytest.mark.parametrize("sizes", [(1, 299), (7, 1, 292), (300,)])
def test_parts_in_any_order_give_what_two_passes_give(sizes, rng):
    # A mean that is large beside the spread costs sums of squares all their digits.
    vectors = rng.standard_normal((300, 12)) @ rng.standard_normal((12, 12)) + 1e6
    parts = [statistics(part) for part in np.split(vectors, np.cumsum(sizes)[:-1])]
    for order in (parts, parts[::-1]):
        merged = merge(order)
        assert merged.count == 300
        assert relative_error(merged.mean, vectors.mean(axis=0)) <= 1e-14
        assert relative_error(merged.covariance(unbiased=True), np.cov(vectors, rowvar=False)) <= 1e-9
        assert relative_error(merged.covariance(unbiased=False), np.cov(vectors, rowvar=False, ddof=0)) <= 1e-9


def test_sums_of_float32_are_float64s(rng):
    vectors = (rng.standard_normal((1000, 3)) + 1000).astype(np.float32)
    expected = np.cov(vectors.astype(np.float64), rowvar=False)
    assert relative_error(statistics(vectors).covariance(unbiased=True), expected) <= 1e-11


def test_weights_are_repetitions(rng):
    vectors, weights = rng.standard_normal((600, 4)), rng.integers(0, 3, 600)
    weights[:300] = 0  # Of a whole chunk.
    expected = statistics(np.repeat(vectors, weights, axis=0))
    actual = statistics(vectors, weights.astype(float))
    assert actual.count == expected.count
    np.testing.assert_allclose(actual.mean, expected.mean, atol=1e-13)
    np.testing.assert_allclose(actual.scatter, expected.scatter, atol=1e-10)


def test_of_one_vector_the_covariance_is_zero():
    one = statistics(np.array([[1.0, 2.0]]))
    for unbiased in (True, False):
        np.testing.assert_array_equal(one.covariance(unbiased), np.zeros((2, 2)))
