"""Mean and covariance of feature vectors, in float64, from parts that can be merged in any order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

# Vectors that are in float64 at once.
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of vectors with weights.

    Attributes:
        count: sum of the weights.
        mean: weighted.
        scatter: weighted sum of the outer products of differences from the mean.
    """

    count: float
    mean: Float[np.ndarray, " c"]
    scatter: Float[np.ndarray, "c c"]

    def covariance(self, unbiased: bool) -> Float[np.ndarray, "c c"]:
        """Divided by one less than the count, or by the count (of a single vector, zero)."""
        return self.scatter / max(self.count - unbiased, 1)


def statistics(vectors: Float[np.ndarray, "n c"], weights: Float[np.ndarray, " n"] | None = None) -> Statistics:
    """Of one vector or more, a few hundred at a time; all weigh 1 by default, and not all may weigh 0."""
    weights = np.ones(len(vectors)) if weights is None else weights
    parts = (slice(first, first + _CHUNK) for first in range(0, len(vectors), _CHUNK))
    return merge([_statistics(vectors[part].astype(np.float64), weights[part], 0.0) for part in parts])


def merge(parts: Sequence[Statistics]) -> Statistics:
    """Of all vectors of the parts together; there must be at least one part.

    Differences of means are what is squared, not means, so that large means cost no digits.
    """
    counts = np.array([part.count for part in parts])
    return _statistics(np.stack([part.mean for part in parts]), counts, sum(part.scatter for part in parts))


def _statistics(
    values: Float[np.ndarray, "n c"], weights: Float[np.ndarray, " n"], scatter: Float[np.ndarray, "c c"] | float
) -> Statistics:
    count = float(weights.sum())
    # Of nothing the mean does not matter, as long as it is a number.
    mean = weights @ values / (count or 1.0)
    centred = values - mean
    return Statistics(count, mean, scatter + (centred * weights[:, None]).T @ centred)
