"""FVD: the Fréchet distance between what a network sees in real and in generated videos."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from osv_jax.errors import UserError
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
        UserError: they were made in different ways, or are not of one length.
    """
    check_made_with("The features of the generated videos", fake, real.made_with)
    length, other = real.vectors.shape[1], fake.vectors.shape[1]
    if length != other:
        raise UserError(
            f"The features of the real videos are of {length} numbers each, and those of the generated videos of"
            f" {other}: a file of one of them is damaged; give the folder of videos."
        )
    real_sample, fake_sample = (
        Sample(features.vectors, protocol.weights(len(features.vectors), generated))
        for features, generated in ((real, False), (fake, True))
    )
    return score(real_sample, fake_sample, protocol.unbiased, replicates, seed, progress)
