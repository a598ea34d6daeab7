"""Where videos come from: a folder, OpenVid-1M, or the drawn world; which of them, and in which split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

from osv_jax.data import world
from osv_jax.data.cutting import Location
from osv_jax.data.folder import Skipped, list_videos
from osv_jax.errors import UserError
from osv_jax.runtime.paths import Path


@dataclasses.dataclass(frozen=True)
class SourceVideo:
    """A video that is to be cut.

    Attributes:
        name: what it is called in messages and records; no two have the same.
        location: its bytes, or what is drawn.
        size: of the file [bytes]; 0 where there is none.
    """

    name: str
    location: Location | world.Address
    size: int
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """Videos by split (`train`, `test`), and what was left out already."""

    splits: dict[str, list[SourceVideo]]
    skipped: Skipped

    def fingerprint(self) -> str:
        """Of everything that decides which records come out: names, sizes, captions and splits."""
        digest = hashlib.sha256()
        for split, videos in self.splits.items():
            for video in videos:
                digest.update(json.dumps([split, video.name, video.size, video.caption]).encode())
        return digest.hexdigest()[:16]


def read_folder(folder: Path) -> tuple[list[SourceVideo], Skipped]:
    """The videos below a folder; see `list_videos`."""
    videos, skipped = list_videos(folder)
    return [SourceVideo(video.name, Location((str(video.file),)), video.size) for video in videos], skipped


def read_world(counts: Mapping[str, int], seed: int) -> dict[str, list[SourceVideo]]:
    """The first clips of each split of the drawn world, so many of each, with their captions.

    Args:
        counts: by the name of a split, see `world.SPLITS`; a split of none is left out.
    """
    addresses = {split: [world.Address(seed, split, number) for number in range(counts[split])] for split in counts}
    return {
        split: [SourceVideo(place.name, place, 0, world.scene(place).caption) for place in places]
        for split, places in addresses.items()
        if places
    }


def split_videos(
    videos: Sequence[SourceVideo], num_test: int, max_train: int | None, seed: int
) -> dict[str, list[SourceVideo]]:
    """A random, disjoint split by video: `num_test` for `test`, of the others `max_train` (or all) for `train`.

    Which ones is a function of the seed and their names. Both keep the order of `videos`, in which archives are read
    from front to back.

    Raises:
        UserError: if nothing would be left to train on.
    """
    if num_test >= len(videos):
        raise UserError(
            f"--test_videos={num_test} would leave none of the {len(videos)} videos to train on; use a smaller number."
        )

    def rank(video: SourceVideo) -> bytes:
        return hashlib.sha256(f"{seed} {video.name}".encode()).digest()

    ranked = sorted(videos, key=rank)
    test = {video.name for video in ranked[:num_test]}
    train = {video.name for video in ranked[num_test:][:max_train]}
    chosen = {"train": train, "test": test}
    return {split: [v for v in videos if v.name in names] for split, names in chosen.items() if names}
