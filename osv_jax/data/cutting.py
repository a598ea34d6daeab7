"""From one video to clips: what a decoding worker does. Imports no JAX, so that workers start fast and stay small."""

from __future__ import annotations

import dataclasses
import functools
import io
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from osv_jax.data import video, world
from osv_jax.data.motion import motion
from osv_jax.runtime.paths import as_path, in_bucket, size_of

# Clips handed over at a time: more would fill the memory with clips that wait.
CLIPS_AT_ONCE = 4
# A bigger file is not read into memory whole, and no clip collection has one.
_MAX_MEMBER_BYTES = 2**29


@dataclasses.dataclass(frozen=True)
class Cutting:
    """How clips are cut.

    Attributes:
        num_frames, fps: length [frames] and frame rate [1/s] of a clip.
        height, width: of a frame [px].
        stride: from the start of a clip to that of the next [s].
        max_clips: of one video; None for all.
        min_motion: clips with less (see `motion.motion`) are left out.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    stride: float
    max_clips: int | None = None
    min_motion: float = 0.0

    def starts(self, info: video.VideoInfo) -> list[float]:
        """Where the clips of a video begin [s]. A clip fits when its last frame is on screen before the video ends."""
        room = info.end - info.start - (self.num_frames - 1) / self.fps - 1e-6
        count = 1 + int(room / self.stride) if room > 0 else 0
        count = count if self.max_clips is None else min(count, self.max_clips)
        return [info.start + i * self.stride for i in range(count)]

    def unfit(self, info: video.VideoInfo) -> str | None:
        """Why a video gives no clip, or None."""
        seconds = info.end - info.start
        if seconds <= (self.num_frames - 1) / self.fps + 1e-6:
            return f"is {seconds:.2f} s long, and a clip takes {self.num_frames / self.fps:.2f} s"
        # A margin for rates such as 30000 / 1001, and for the odd dropped frame.
        if info.fps < 0.98 * self.fps:
            return f"has {info.fps:.2f} frames a second, and clips have {self.fps:g}"
        return None


@dataclasses.dataclass(frozen=True)
class Location:
    """Where the bytes of a video are: a file, or a member of a zip archive.

    Attributes:
        files: the file, or the archive, which may have been split into parts.
        member: the position in the archive's directory (names need not be unique).
    """

    files: tuple[str, ...]
    member: int | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A video of which all is decoded, to know how many clips it has and that it is intact, and its first clips.

    Attributes:
        key: what the asker knows it by.
        location: its bytes; or a clip of the world, which is drawn at the clips' own size and rate.
        skip: clips before this number are not needed.
        rest: instead, only these further clips (their numbers) of a video that is known, and its start [s].
    """

    key: tuple[int, int]
    name: str
    location: Location | world.Address
    cutting: Cutting
    skip: int = 0
    rest: range | None = None
    start: float = 0.0


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip, or the reason why it is left out.

    Attributes:
        number: among the clips of its video.
        start: in the video [s].
    """

    number: int
    start: float
    frames: UInt8[np.ndarray, "f h w 3"] | None
    motion: float
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Cut:
    """What became of a task: clips, and of a whole video their number and start, or why there are none."""

    clips: Sequence[Clip] = ()
    num_clips: int = 0
    start: float = 0.0
    reason: str | None = None


def cut(task: Task) -> Cut:
    """Decodes a video. Whatever is wrong with the file becomes the reason of the result."""
    try:
        return _cut(task)
    except video.VideoError as error:
        return Cut(reason=error.reason)


def _cut(task: Task) -> Cut:
    cutting, size = task.cutting, (task.cutting.num_frames, task.cutting.fps, task.cutting.height, task.cutting.width)
    if isinstance(task.location, world.Address):
        return Cut([_judge(0, 0.0, world.draw(world.scene(task.location), *size), cutting)], 1)
    file = open_location(task.location, task.name)
    if task.rest is not None:
        starts = [task.start + number * cutting.stride for number in task.rest]
        return Cut([_read(file, *item, cutting) for item in zip(task.rest, starts, strict=True)])
    numbers = range(CLIPS_AT_ONCE if cutting.max_clips is None else min(CLIPS_AT_ONCE, cutting.max_clips))
    info, clips = video.probe_and_read(file, [number * cutting.stride for number in numbers], *size)
    reason = cutting.unfit(info)
    if reason:
        return Cut(reason=reason)
    starts = cutting.starts(info)
    judged = [_judge(*item, cutting) for item in zip(numbers, starts, clips, strict=False)]
    return Cut(judged, len(starts), info.start)


def _read(file: video.VideoFile, number: int, start: float, cutting: Cutting) -> Clip:
    try:
        frames = video.read_clip(file, start, cutting.num_frames, cutting.fps, cutting.height, cutting.width)
    except video.VideoError as error:
        return Clip(number, start, None, 0.0, f"{error.reason}, in the clip from {start:.2f} s on")
    return _judge(number, start, frames, cutting)


def _judge(number: int, start: float, frames: UInt8[np.ndarray, "f h w 3"], cutting: Cutting) -> Clip:
    moved = float(motion(frames))
    if moved < cutting.min_motion:
        reason = f"does not move from {start:.2f} s on (motion {moved:.2f})"
        return Clip(number, start, None, moved, reason)
    return Clip(number, start, frames, moved)


def open_location(location: Location, name: str) -> video.VideoFile:
    """A file as ffmpeg reads it; a member of an archive is unpacked into memory, never onto a disk.

    Raises:
        VideoError: for a member that is encrypted, too large or damaged, also if the archive has changed.
    """
    if location.member is None:
        return location.files[0]
    try:
        archive = open_archive(location.files)
        member = archive.infolist()[location.member]
        if member.flag_bits & 1:
            raise video.VideoError(name, "is encrypted")
        if member.file_size > _MAX_MEMBER_BYTES:
            length, most = member.file_size / 2**20, _MAX_MEMBER_BYTES / 2**20
            raise video.VideoError(name, f"is {length:.0f} MiB long, and at most {most:.0f} are read")
        return video.NamedBytes(archive.read(member), name)
    except video.VideoError:
        raise
    except Exception as error:  # Python's unpackers meet damage with exceptions of all kinds.
        raise video.VideoError(name, f"cannot be unpacked ({type(error).__name__}: {error})") from error


@functools.lru_cache(maxsize=2)
def open_archive(files: tuple[str, ...]) -> zipfile.ZipFile:
    """A zip archive that may have been split into parts. A damaged one raises exceptions of all kinds."""
    whole = len(files) == 1 and not in_bucket(files[0])
    return zipfile.ZipFile(files[0] if whole else io.BufferedReader(_Joined(files)))


class _Joined(io.RawIOBase):
    """Several files, one after the other, as one that can be read."""

    def __init__(self, files: Sequence[str]):
        self._files = [as_path(file).open("rb") for file in files]
        self._ends = np.cumsum([size_of(as_path(file)) for file in files]).tolist()
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._ends[-1]}[whence]
        if origin + offset < 0:
            raise OSError("negative position")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads up to the end of one part; the buffered reader around this asks again."""
        begin = 0
        for file, end in zip(self._files, self._ends, strict=True):
            if self._position < end:
                file.seek(self._position - begin)
                count = file.readinto(memoryview(buffer)[: end - self._position])
                self._position += count
                return count
            begin = end
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()
