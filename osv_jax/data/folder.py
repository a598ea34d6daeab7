"""The videos in a folder, with the reason of whatever else is there."""

from __future__ import annotations

import dataclasses

from osv_jax.data.video import EXTENSIONS
from osv_jax.errors import UserError
from osv_jax.runtime.paths import Path, absolute, files_below

# (name, reason) of what cannot be used.
Skipped = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class FolderVideo:
    """A video file: its printable name relative to the folder, where it is, and its size [bytes]."""

    name: str
    file: Path
    size: int


def list_videos(folder: Path) -> tuple[list[FolderVideo], Skipped]:
    """The videos below a folder, sorted; links to files are followed, links to folders are not.

    Raises:
        UserError: if it is missing, no folder, or holds no video.
    """
    if not folder.exists():
        raise UserError(f"The video folder {folder} does not exist; give the path of a folder with videos.")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, but a folder with videos is needed; give the folder it is in.")
    videos: list[FolderVideo] = []
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
            videos.append(FolderVideo(name, file, size))
    if not videos:
        known = " ".join(EXTENSIONS)
        raise UserError(f"The folder {folder} holds no videos; put files in it that end in one of {known}.")
    return videos, skipped


def printable(name: str) -> str:
    """A file name as text: bytes that are no UTF-8 become question marks."""
    return name.encode(errors="surrogateescape").decode(errors="replace")
