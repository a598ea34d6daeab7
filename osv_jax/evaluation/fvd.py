"""FVD: the Fréchet distance between what a network sees in real and in generated videos."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from osv_jax.evaluation.features import Features, check_made_with
from osv_jax.evaluation.frechet import Sample, Score, score
from osv_jax.evaluation.protocols import Protocol


def fvd(
    real: Features,
    fake: Features,
    protocol: Protocol,
    replicates: int = 0,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Score:
    """The distance by a protocol.

    Args:
        real, fake: of real and of generated videos.
        protocol: the one that both were made with.
        replicates, seed, progress: of the bootstrap, see `frechet.score`.

    Raises:
        UserError: they were made in different ways.
    """
    check_made_with("The features of the generated videos", fake, real.made_with)
    real_sample, fake_sample = (
        Sample(features.vectors, protocol.weights(len(features.vectors), generated))
        for features, generated in ((real, False), (fake, True))
    )
    return score(real_sample, fake_sample, protocol.unbiased, replicates, seed, progress)
