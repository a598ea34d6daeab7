"""Decoding video files: what a file holds, and clips of frames chosen by their timestamps.

Seconds are counted from the first timestamp of the video stream, so that 0 is the beginning in every container.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, UInt8
from PIL import Image

from osv_jax.errors import UserError
from osv_jax.runtime.paths import as_path, in_bucket

EXTENSIONS = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"),
)
# Containers only. ffmpeg also plays lists (HLS, concat, DASH) that name other files and addresses: a file that somebody
# else wrote must not choose what is read here.
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,h264,hevc,m4v,mjpeg,gif,ivf,nut,swf,rm,dv,mxf"
_MAX_PIXELS = 2**26


class NamedBytes(io.BytesIO):
    """A video file in memory, with the name that messages call it by."""

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self.name = name

    def __str__(self) -> str:
        return self.name


VideoFile = str | os.PathLike | NamedBytes


class VideoError(UserError):
    """A video file that cannot be used; `reason` is the sentence without the file's name and without advice."""

    def __init__(self, file: VideoFile, reason: str):
        super().__init__(f"{file} {reason}; replace it by a video that ffmpeg can play, or remove it.")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What decoding a whole file tells: first and end time [s], frames, and the size [px] of a frame as it is shown."""

    start: float
    end: float
    num_frames: int
    height: int
    width: int

    @property
    def fps(self) -> float:
        """Mean frame rate [1/s]."""
        return self.num_frames / (self.end - self.start)


def probe(file: VideoFile) -> VideoInfo:
    """Decodes every frame of a video and reports its timeline.

    Headers lie (durations, frame counts, indices of truncated files); only decoding shows that a file can be read.

    Raises:
        VideoError: if the file does not open, has no video stream, or does not decode cleanly to its end.
    """
    with _opened(file) as (container, stream):
        timeline = _Timeline(file, container, stream)
        for _ in timeline:
            pass
        return timeline.info()


def probe_and_read(
    file: VideoFile, offsets: Sequence[float], num_frames: int, fps: float, height: int, width: int
) -> tuple[VideoInfo, list[UInt8[np.ndarray, "f h w 3"]]]:
    """`probe`, and `read_clip` for several clips, in one pass over the file.

    Args:
        file: the video.
        offsets: where clips begin [s], ascending, counted from the first frame. They may overlap. Clips for which the
            video is too short are left out.
        num_frames, fps, height, width: see `read_clip`.

    Raises:
        VideoError: see `probe`.
    """
    with _opened(file) as (container, stream):
        timeline = _Timeline(file, container, stream)
        frames = iter(timeline)
        first = next(frames, None)
        if first is None:
            timeline.info()  # raises
        clips: list[list[np.ndarray]] = [[] for _ in offsets]
        times = np.array([_wanted(first[0] + offset, num_frames, fps, stream) for offset in offsets])
        times = times.reshape(-1)
        order = np.argsort(times, kind="stable")
        shown = _on_screen(itertools.chain([first], frames), times[order], stream)
        for number, picture in zip(order, _pictures(file, shown, stream, height, width), strict=False):
            clips[number // num_frames].append(picture)
        for _ in frames:
            pass
        return timeline.info(), [np.stack(clip) for clip in clips if len(clip) == num_frames]


class _Timeline:
    """The frames of a file with their times [s], in order, none of them damaged; once through, what they told."""

    def __init__(self, file: VideoFile, container: av.container.InputContainer, stream: av.VideoStream):
        self._file, self._container, self._stream = file, container, stream
        self._first = self._last = self._frame = None
        self._num_frames = 0
        stream.thread_type = "AUTO"

    def __iter__(self) -> Iterator[tuple[float, av.VideoFrame]]:
        for time, frame in _timed_frames(self._container, self._stream):
            if frame.is_corrupt:
                raise VideoError(self._file, f"has a damaged frame at {time:.2f} s")
            if self._last is not None and time < self._last:
                raise VideoError(self._file, f"has timestamps that go back at {time:.2f} s")
            self._first = time if self._first is None else self._first
            self._last, self._frame = time, frame
            self._num_frames += 1
            yield time, frame

    def info(self) -> VideoInfo:
        frame, stream = self._frame, self._stream
        if frame is None:
            raise VideoError(self._file, "has a video stream without a frame")
        height, width = frame.height, frame.width * float(stream.sample_aspect_ratio or 1)
        if frame.rotation % 180:
            height, width = width, height
        end = self._last + _duration(frame, stream)
        return VideoInfo(self._first, end, self._num_frames, round(height), round(width))


def read_clip(
    file: VideoFile, start_seconds: float, num_frames: int, fps: float, height: int, width: int
) -> UInt8[np.ndarray, "f h w 3"]:
    """Reads `num_frames` RGB frames that are 1 / fps [s] apart.

    Frame i is the one on screen at `start_seconds` + i / fps: the last whose timestamp is not later. This holds for
    variable frame rates too, and repeats frames where the file has fewer than `fps`. A time before the first frame
    takes the first. Rotation metadata and pixel aspect ratio are applied; then the picture is scaled (bicubic,
    antialiased) to cover `height` x `width` [px] and cropped at the centre.

    Raises:
        VideoError: if the file does not decode, or ends before the last frame.
    """
    # Seeking is only a short cut: an index can be missing, or lead past the wanted frame.
    for seek in (True, False) if start_seconds > 0 else (False,):
        with _opened(file) as (container, stream):
            times = _wanted(start_seconds, num_frames, fps, stream)
            if seek:
                with contextlib.suppress(av.FFmpegError):
                    container.seek(int(times[0] / stream.time_base) + (stream.start_time or 0), stream=stream)
            frames = _timed_frames(container, stream)
            first = next(frames, None)
            if seek and (first is None or first[0] > times[0]):
                continue
            shown = _on_screen(itertools.chain([first] if first else [], frames), times, stream)
            clip = list(_pictures(file, shown, stream, height, width))
        if len(clip) < num_frames:
            seconds = num_frames / fps
            raise VideoError(file, f"ends before the {seconds:.2f} s from {start_seconds:.2f} s that are wanted")
        return np.stack(clip)
    raise AssertionError("the pass without seeking always returns or raises")


@contextlib.contextmanager
def _opened(file: VideoFile) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The open file and its main video stream; ffmpeg's errors inside the block become `VideoError`."""
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file" if _is_local(file) else ""}
    try:
        with _source(file) as source, av.open(source, metadata_errors="replace", options=options) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise VideoError(file, "has no video stream")
            if stream.width * stream.height > _MAX_PIXELS:
                raise VideoError(file, f"has frames of {stream.width} x {stream.height}, too many pixels")
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise VideoError(file, f"cannot be decoded ({error.strerror})") from error


def _is_local(file: VideoFile) -> bool:
    return not isinstance(file, NamedBytes) and not in_bucket(file)


def _source(file: VideoFile) -> contextlib.AbstractContextManager:
    """What ffmpeg is given."""
    if _is_local(file):
        # An absolute path, or else a name such as `concat:a.mp4` would be taken for a protocol.
        return contextlib.nullcontext(os.path.abspath(file))
    if isinstance(file, NamedBytes):
        file.seek(0)
        return contextlib.nullcontext(file)
    return as_path(file).open("rb")


def _wanted(start: float, num_frames: int, fps: float, stream: av.VideoStream) -> Float[np.ndarray, " f"]:
    """The times [s] of a clip's frames."""
    # Containers round timestamps to their ticks (Matroska: 1 ms); a frame meant for this instant must count.
    slack = min(float(stream.time_base) / 2, 5e-4) + 1e-6
    return start + slack + np.arange(num_frames) / fps


def _timed_frames(
    container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Frames in the order they are shown, with their times [s] from the first timestamp of the stream."""
    first_tick = stream.start_time or 0
    for frame in container.decode(stream):
        tick = frame.dts if frame.pts is None else frame.pts
        if tick is not None:
            yield float((tick - first_tick) * stream.time_base), frame


def _on_screen(
    timed_frames: Iterable[tuple[float, av.VideoFrame]], times: Float[np.ndarray, " n"], stream: av.VideoStream
) -> Iterator[av.VideoFrame]:
    """The frame that is shown at each of the ascending `times`, as long as the video lasts."""
    waiting = collections.deque(times)
    shown = end = None
    for time, frame in timed_frames:
        while shown is not None and waiting and waiting[0] < time:
            waiting.popleft()
            yield shown
        if not waiting:
            return
        shown, end = frame, time + _duration(frame, stream)
    while shown is not None and waiting and waiting[0] < end:
        waiting.popleft()
        yield shown


def _duration(frame: av.VideoFrame, stream: av.VideoStream) -> float:
    """How long a frame is shown [s]: as the file says, or else by its average rate."""
    if frame.duration:
        return float(frame.duration * stream.time_base)
    return float(1 / (stream.average_rate or 1))


def _pictures(
    file: VideoFile, frames: Iterable[av.VideoFrame], stream: av.VideoStream, height: int, width: int
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    reformatter = VideoReformatter()
    previous = picture = None
    for frame in frames:
        if frame.is_corrupt:
            raise VideoError(file, "has a damaged frame")
        if frame is not previous:
            rgb = reformatter.reformat(frame, format="rgb24").to_ndarray()
            # The rotation is counter-clockwise, in degrees; cameras write multiples of 90.
            turns = round(frame.rotation / 90)
            aspect = float(stream.sample_aspect_ratio or 1)
            picture = cover(np.rot90(rgb, turns), height, width, 1 / aspect if turns % 2 else aspect)
        yield picture
        previous = frame


def cover(
    image: UInt8[np.ndarray, "h0 w0 3"], height: int, width: int, pixel_aspect: float = 1.0
) -> UInt8[np.ndarray, "h w 3"]:
    """Scales an image (bicubic, antialiased) until it covers `height` x `width` [px] and crops it at the centre.

    Args:
        image: an RGB image of any size.
        height, width: the size wanted.
        pixel_aspect: width / height of one pixel of `image`.
    """
    rows, columns = image.shape[:2]
    scale = max(height / rows, width / (columns * pixel_aspect))
    box_height, box_width = min(rows, height / scale), min(columns, width / (scale * pixel_aspect))
    left, top = (columns - box_width) / 2, (rows - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box=box))
