"""The Fréchet distance of two normal distributions, and how far chance may have moved it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float

from osv_jax.evaluation.statistics import Statistics, statistics

# Of a normal distribution, within which 95 % lie [standard deviations].
_NORMAL_95 = 1.96


@dataclasses.dataclass(frozen=True)
class Sample:
    """Feature vectors, one of each video, and how often each of them counts."""

    vectors: Float[np.ndarray, "n c"]
    weights: Float[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Score:
    """A distance and its 95 % interval; `low` and `high` are None where no interval was asked for, or can be known.

    Attributes:
        draws: the distances of the bootstrap's replicates, in the order of their draws.
    """

    value: float
    low: float | None = None
    high: float | None = None
    draws: tuple[float, ...] = ()

    def __str__(self) -> str:
        interval = "" if self.low is None else f" (95 % interval {self.low:.2f} to {self.high:.2f})"
        return f"{self.value:.2f}{interval}"

    def as_row(self, name: str) -> dict[str, float | None]:
        """For a row of a table or of metrics: NAME, NAME_low and NAME_high."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def frechet_distance(
    mean: Float[np.ndarray, " c"],
    covariance: Float[np.ndarray, "c c"],
    other_mean: Float[np.ndarray, " c"],
    other_covariance: Float[np.ndarray, "c c"],
) -> float:
    """||m - m'||^2 + tr(C + C' - 2 (C C')^(1/2)), the squared 2-Wasserstein distance of two normal distributions.

    The trace of the root is that of (C^(1/2) C' C^(1/2))^(1/2), or the sum of the singular values of F^T F', where
    C = F F^T and C' = F' F'^T. The factors come from symmetric eigendecompositions: nothing is inverted, no root is
    taken of what is not symmetric, so that covariances may have any rank, and no digits are lost by squaring.
    """
    root_trace = np.linalg.svd(_factor(covariance).T @ _factor(other_covariance), compute_uv=False).sum()
    trace = np.trace(covariance) + np.trace(other_covariance) - 2 * root_trace
    return float(np.sum((mean - other_mean) ** 2) + trace)


def score(
    real: Sample,
    fake: Sample,
    unbiased: bool,
    replicates: int = 0,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Score:
    """The distance of two samples, with an interval from the bootstrap.

    Args:
        real, fake: one vector or more each.
        unbiased: see `Statistics.covariance`.
        replicates: of the bootstrap, each of which draws as many videos as there are, with replacement; 0 for none.
        seed: of the draws.
        progress: what `range(replicates)` goes through.

    Returns:
        The interval is +- 1.96 standard deviations of the replicates. (Their quantiles would not do: a replicate has
        fewer different videos, and the distance grows as there are fewer.)
    """
    value = _distance(real, fake, unbiased)
    if not replicates or min(len(real.vectors), len(fake.vectors)) < 2:
        return Score(value)
    rng = np.random.default_rng(seed)
    draws = tuple(_distance(_drawn(real, rng), _drawn(fake, rng), unbiased) for _ in progress(range(replicates)))
    spread = _NORMAL_95 * float(np.std(draws))
    return Score(value, max(0.0, value - spread), value + spread, draws)


def difference(distance: Score, other: Score) -> Score:
    """By how much a distance is larger than another, of two methods' videos of the same clips.

    The same seed draws the same clips for both, and the same real ones; what these have in common, which is most of an
    interval's width, is not in the interval of the difference.

    Args:
        distance, other: of equally many videos, in the same order, against the same real ones, with the same seed.
    """
    value = distance.value - other.value
    if not distance.draws or len(distance.draws) != len(other.draws):
        return Score(value)
    draws = tuple(np.subtract(distance.draws, other.draws).tolist())
    spread = _NORMAL_95 * float(np.std(draws))
    return Score(value, value - spread, value + spread, draws)


def _drawn(sample: Sample, rng: np.random.Generator) -> Sample:
    n = len(sample.vectors)
    return dataclasses.replace(sample, weights=sample.weights * rng.multinomial(n, np.full(n, 1 / n)))


def _distance(real: Sample, fake: Sample, unbiased: bool) -> float:
    moments: list[Statistics] = [statistics(sample.vectors, sample.weights) for sample in (real, fake)]
    return frechet_distance(*(part for m in moments for part in (m.mean, m.covariance(unbiased))))


def _factor(covariance: Float[np.ndarray, "c c"]) -> Float[np.ndarray, "c c"]:
    values, vectors = np.linalg.eigh(covariance)
    # Rounding makes the zeros of a covariance that is not of full rank negative, too.
    return vectors * np.sqrt(values.clip(min=0))
