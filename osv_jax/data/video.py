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
from fractions import Fraction
from typing import TypeGuard

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
# Of a frame. 8K has half as many; beyond, a small damaged file could ask for gigabytes.
_MAX_PIXELS = 2**26
# Of a frame as it is shown: twice what H.264 and H.265 have.
_MAX_SIDE = 2**15
# Of a pixel. Broadcast formats have up to 2.
_MAX_ASPECT = 16


class NamedBytes(io.BytesIO):
    """A video file in memory, with the name that messages call it by."""

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self.name = name

    def __str__(self) -> str:
        return self.name


VideoFile = str | os.PathLike | NamedBytes


_NO_FRAME = "has a video stream without a frame"


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
            raise VideoError(file, _NO_FRAME)
        clips: list[list[np.ndarray]] = [[] for _ in offsets]
        times = np.array([_wanted(first.time + offset, num_frames, fps, stream) for offset in offsets])
        times = times.reshape(-1)
        order = np.argsort(times, kind="stable")
        shown = _on_screen(itertools.chain([first], frames), times[order])
        for number, picture in zip(order, _pictures(file, shown, height, width), strict=False):
            clips[number // num_frames].append(picture)
        for _ in frames:
            pass
        return timeline.info(), [np.stack(clip) for clip in clips if len(clip) == num_frames]


class _Timeline:
    """The frames of a file in order, none of them damaged; once through, what they told."""

    def __init__(self, file: VideoFile, container: av.container.InputContainer, stream: av.VideoStream):
        self._file, self._frames = file, _frames(file, container, stream)
        self._first: _Frame | None = None
        self._last: _Frame | None = None
        self._num_frames = 0

    def __iter__(self) -> Iterator[_Frame]:
        for frame in self._frames:
            if frame.picture.is_corrupt:
                raise VideoError(self._file, f"has a damaged frame at {frame.time:.2f} s")
            if self._last is not None and frame.time < self._last.time:
                raise VideoError(self._file, f"has timestamps that go back at {frame.time:.2f} s")
            self._first, self._last = self._first or frame, frame
            self._num_frames += 1
            yield frame

    def info(self) -> VideoInfo:
        first, last = self._first, self._last
        if first is None or last is None:
            raise VideoError(self._file, _NO_FRAME)
        return VideoInfo(first.time, last.end, self._num_frames, *last.size)


def read_clip(
    file: VideoFile, start_seconds: float, num_frames: int, fps: float, height: int, width: int
) -> UInt8[np.ndarray, "f h w 3"]:
    """Reads `num_frames` RGB frames that are 1 / fps [s] apart.

    Frame i is the one on screen at `start_seconds` + i / fps: the last whose timestamp is not later. This holds for
    variable frame rates too, and repeats frames where the file has fewer than `fps`. A time before the first frame
    takes the first. Rotation metadata and pixel aspect ratio are applied; then the picture is scaled (bicubic,
    antialiased) to cover `height` x `width` [px] and cropped at the centre, also where frames differ in size.

    Raises:
        VideoError: if the file does not decode, or ends before the last frame.
    """
    if start_seconds > 0:
        # Seeking is only a short cut: an index can be missing, lead past the wanted frame, or into damage.
        with contextlib.suppress(VideoError):
            return _read_clip(file, start_seconds, num_frames, fps, height, width, seek=True)
    return _read_clip(file, start_seconds, num_frames, fps, height, width, seek=False)


def _read_clip(
    file: VideoFile, start: float, num_frames: int, fps: float, height: int, width: int, seek: bool
) -> UInt8[np.ndarray, "f h w 3"]:
    with _opened(file) as (container, stream):
        times = _wanted(start, num_frames, fps, stream)
        if seek:
            with _decoding(file):
                container.seek(int(times[0] / stream.time_base) + (stream.start_time or 0), stream=stream)
        frames = _frames(file, container, stream)
        first = next(frames, None)
        if seek and (first is None or first.time > times[0]):
            raise VideoError(file, f"has no index that leads to {start:.2f} s")
        shown = _on_screen(itertools.chain([first] if first else [], frames), times)
        clip = list(_pictures(file, shown, height, width))
    if len(clip) < num_frames:
        raise VideoError(file, f"ends before the {num_frames / fps:.2f} s from {start:.2f} s that are wanted")
    return np.stack(clip)


def read_frames(file: VideoFile, num_frames: int, fps: float | None = None) -> UInt8[np.ndarray, "f h w 3"]:
    """Reads the first `num_frames` RGB frames, at the size in which the video is shown.

    Args:
        file: the video.
        num_frames: how many.
        fps: take those that are 1 / fps [s] apart, see `read_clip`; by default every frame.

    Raises:
        VideoError: if the file does not decode, or has fewer frames.
    """
    with _opened(file) as (container, stream):
        frames = _frames(file, container, stream)
        first = next(frames, None)
        if first is None:
            raise VideoError(file, "has a video stream without a frame")
        frames = itertools.chain([first], frames)
        if fps is not None:
            frames = _on_screen(frames, _wanted(first.time, num_frames, fps, stream))
        clip = list(itertools.islice(_pictures(file, frames, *first.size), num_frames))
    if len(clip) < num_frames:
        rate = f" at {fps:g} fps" if fps is not None else ""
        raise VideoError(file, f"has {len(clip)} frames{rate}, and {num_frames} are wanted")
    return np.stack(clip)


@contextlib.contextmanager
def _decoding(file: VideoFile) -> Iterator[None]:
    """Whatever PyAV raises inside becomes a `VideoError`: only some of the damage reaches it as an error of ffmpeg."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise VideoError(file, f"cannot be decoded ({reason})") from error


@contextlib.contextmanager
def _opened(file: VideoFile) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The open file and its main video stream.

    Raises:
        VideoError: if it does not open, or ffmpeg has no decoder for the stream.
    """
    # ffmpeg looks into some frames when it opens a file, and has another decoder for that: the limit is for both.
    limit = {"max_pixels": str(_MAX_PIXELS)}
    protocols = "file" if _is_local(file) else ""
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": protocols, **limit}
    with contextlib.ExitStack() as stack:
        with _decoding(file):
            source = stack.enter_context(_source(file))
            container = stack.enter_context(av.open(source, metadata_errors="replace", options=options))
            stream = container.streams.best("video")
            if stream is None:
                raise VideoError(file, "has no video stream")
            if stream.codec_context is None:
                raise VideoError(file, "is encoded in a way that ffmpeg does not know")
            if not stream.width * stream.height:
                raise VideoError(file, f"has frames of unknown size, or of more than {_MAX_PIXELS:,} pixels")
            if not stream.time_base:
                raise VideoError(file, "has no unit of time")
            stream.codec_context.options = limit
            # Where frames are decoded at once, ffmpeg loses the errors of the last ones, as many as there are cores.
            stream.thread_type = "SLICE"
        yield container, stream


def _is_local(file: VideoFile) -> TypeGuard[str | os.PathLike]:
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


def _tick(stream: av.VideoStream) -> Fraction:
    """The unit of a stream's timestamps [s]."""
    assert stream.time_base is not None, "only streams that are written have none"
    return stream.time_base


def _wanted(start: float, num_frames: int, fps: float, stream: av.VideoStream) -> Float[np.ndarray, " f"]:
    """The times [s] of a clip's frames."""
    # Containers round timestamps to their ticks (Matroska: 1 ms); a frame meant for this instant must count.
    slack = min(float(_tick(stream)) / 2, 5e-4) + 1e-6
    return start + slack + np.arange(num_frames) / fps


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A decoded frame, and how it is shown.

    Attributes:
        time, end: when it is on screen [s], from the first timestamp of the stream; the next frame may come earlier.
        quarter_turns: that set it upright, counter-clockwise.
        pixel_aspect: width / height of a pixel of `picture`.
    """

    picture: av.VideoFrame
    time: float
    end: float
    quarter_turns: int
    pixel_aspect: float

    @property
    def size(self) -> tuple[int, int]:
        """Height and width [px], as it is shown."""
        height, width = float(self.picture.height), self.picture.width * self.pixel_aspect
        if self.quarter_turns % 2:
            height, width = width, height
        return round(height), round(width)


def _frames(file: VideoFile, container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[_Frame]:
    """Frames in the order they are shown.

    Raises:
        VideoError: if one does not decode, or cannot be shown.
    """
    pictures = container.decode(stream)
    while True:
        with _decoding(file):
            picture = next(pictures, None)
            if picture is None:
                return
            tick = picture.dts if picture.pts is None else picture.pts
            if tick is None:
                continue
            time = float((tick - (stream.start_time or 0)) * _tick(stream))
            # As long as the file says, or else by its average rate.
            ticks, rate = picture.duration or 0, stream.average_rate or 0
            seconds = float(ticks * _tick(stream)) if ticks > 0 else float(1 / rate) if rate > 0 else 1.0
            pixel_aspect = float(stream.sample_aspect_ratio or 1)
            if not 1 / _MAX_ASPECT <= pixel_aspect <= _MAX_ASPECT:
                raise VideoError(file, f"has pixels that are {pixel_aspect:.3g} times as wide as high")
            # The rotation is in degrees; cameras write multiples of 90.
            turns = round(picture.rotation / 90)
        frame = _Frame(picture, time, time + seconds, turns, pixel_aspect)
        height, width = frame.size
        if not (0 < min(height, width) <= max(height, width) <= _MAX_SIDE and height * width <= _MAX_PIXELS):
            raise VideoError(
                file,
                f"has frames that are shown as {height} x {width}, and at most {_MAX_SIDE:,} on a side and"
                f" {_MAX_PIXELS:,} pixels are read",
            )
        yield frame


def _on_screen(frames: Iterable[_Frame], times: Float[np.ndarray, " n"]) -> Iterator[_Frame]:
    """The frame that is shown at each of the ascending `times`, as long as the video lasts."""
    waiting = collections.deque(times)
    shown = None
    for frame in frames:
        while shown is not None and waiting and waiting[0] < frame.time:
            waiting.popleft()
            yield shown
        if not waiting:
            return
        shown = frame
    while shown is not None and waiting and waiting[0] < shown.end:
        waiting.popleft()
        yield shown


def _pictures(
    file: VideoFile, frames: Iterable[_Frame], height: int, width: int
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    reformatter = VideoReformatter()
    previous = None
    for frame in frames:
        if frame is not previous:
            if frame.picture.is_corrupt:
                raise VideoError(file, f"has a damaged frame at {frame.time:.2f} s")
            with _decoding(file):
                rgb = reformatter.reformat(frame.picture, format="rgb24").to_ndarray()
            aspect = 1 / frame.pixel_aspect if frame.quarter_turns % 2 else frame.pixel_aspect
            picture = cover(np.rot90(rgb, frame.quarter_turns), height, width, aspect)
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
