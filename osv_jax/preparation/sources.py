"""Where videos come from: a folder, or OpenVid-1M; which of them, and in which split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from osv_jax.data.cutting import Location
from osv_jax.data.video import EXTENSIONS
from osv_jax.errors import UserError
from osv_jax.runtime.paths import Path, absolute, files_below

# (name, reason) of what cannot be used.
Skipped = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class SourceVideo:
    """A video that is to be cut.

    Attributes:
        name: what it is called in messages and records; no two have the same.
        location: its bytes.
        size: of the file [bytes].
    """

    name: str
    location: Location
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
    """The videos below a folder, sorted; links to files are followed, links to folders are not.

    Raises:
        UserError: if it is missing, no folder, or holds no video.
    """
    if not folder.exists():
        raise UserError(f"The video folder {folder} does not exist; give the path of a folder with videos.")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, but a folder with videos is needed; give the folder it is in.")
    videos: list[SourceVideo] = []
    skipped: Skipped = []
    for path, size in files_below(folder).items():
        file, name = absolute(folder) / path, printable(path)
        if file.suffix.lower() not in EXTENSIONS:
            skipped.append((name, "does not end in the extension of a video, such as .mp4"))
        elif size < 0:
            skipped.append((name, "is a link to nowhere, or no file"))
        elif size == 0:
            skipped.append((name, "is empty"))
        else:
            videos.append(SourceVideo(name, Location((str(file),)), size))
    if not videos:
        known = " ".join(EXTENSIONS)
        raise UserError(f"The folder {folder} holds no videos; put files in it that end in one of {known}.")
    return videos, skipped


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


def printable(name: str) -> str:
    """A file name as text: bytes that are no UTF-8 become question marks."""
    return name.encode(errors="surrogateescape").decode(errors="replace")
