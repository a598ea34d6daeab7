"""Pictures and videos for people: labelled grids of frames, and files that any player opens."""

from __future__ import annotations

import contextlib
import fractions
import itertools
import math
import os
import pathlib
import textwrap
from collections.abc import Mapping
from typing import TypeVar

import av
import numpy as np
from av.video.reformatter import Colorspace
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from osv_jax.errors import UserError
from osv_jax.runtime import paths
from osv_jax.runtime.finite import NotFinite, is_finite
from osv_jax.runtime.paths import Path, as_path

_AnyArray = TypeVar("_AnyArray", Array, np.ndarray)
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_MIN_FRAME_WIDTH = 96
# Of a video with labels, and letters of a label that fit beside each other.
_MIN_COLUMN_WIDTH, _LABEL_LETTERS = 160, 22
_FONT_SIZE = 13
_LINE = 18
_GAP = 4
_BT709 = 1
# GIF counts in 1/100 s, and players slow down what is shown for less than two of them.
_GIF_MAX_FPS = 50


def to_float(frames: UInt8[_AnyArray, "*batch h w 3"]) -> Float[_AnyArray, "*batch h w 3"]:
    """Pixels as frames in [-1, 1], of NumPy or of JAX as they come."""
    return frames.astype(np.float32) / 127.5 - 1


def to_uint8(frames: Float[Array | np.ndarray, "*batch h w 3"]) -> UInt8[np.ndarray, "*batch h w 3"]:
    """Frames in [-1, 1] (clipped to it) as pixels.

    Raises:
        NotFinite: a value that is not, for which there is no pixel.
    """
    frames = np.asarray(frames)
    if not is_finite(frames):
        raise NotFinite(
            "The frames that were made have values that are NaN or infinite: an option, or what was trained, is too"
            " extreme."
        )
    return ((frames.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def sample_grid(
    rows: Mapping[str, UInt8[np.ndarray, "f h w 3"] | UInt8[np.ndarray, "h w 3"]], max_frames: int = 7
) -> UInt8[np.ndarray, "height width 3"]:
    """One row per entry: its label, and below it up to `max_frames` frames from first to last with their numbers.

    Frames narrower than 96 px are enlarged by a whole factor, pixel by pixel, so that they stay exact and legible.

    Args:
        rows: label -> frames, or one image.
        max_frames: of a longer video this many, evenly spaced, first and last among them.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    strips = [_strip(label, np.asarray(frames), max_frames, font) for label, frames in rows.items()]
    grid = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        grid.paste(strip, (0, top))
        top += strip.height
    return np.asarray(grid)


def _strip(
    label: str, frames: np.ndarray, max_frames: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> Image.Image:
    is_video = frames.ndim == 4
    frames = frames if is_video else frames[None]
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), max_frames)).round().astype(int))
    frames = _enlarged(frames[chosen], _MIN_FRAME_WIDTH)
    _, height, width, _ = frames.shape
    frame_top = 2 * _LINE if is_video else _LINE
    size = (
        max(len(chosen) * (width + _GAP) + _GAP, math.ceil(font.getbbox(label)[2]) + 2 * _GAP),
        frame_top + height + _GAP,
    )
    strip = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(strip)
    draw.text((_GAP, 1), label, fill="black", font=font)
    for column, (number, frame) in enumerate(zip(chosen, frames, strict=True)):
        left = _GAP + column * (width + _GAP)
        if is_video:
            draw.text((left, _LINE), str(number), fill="gray", font=font)
        strip.paste(Image.fromarray(frame), (left, frame_top))
    return strip


def _enlarged(frames: UInt8[np.ndarray, "*batch h w 3"], min_width: int) -> UInt8[np.ndarray, "*batch h2 w2 3"]:
    """By the smallest whole factor that makes frames so wide, pixel by pixel."""
    factor = -(-min_width // frames.shape[-2])
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def beside_each_other(
    columns: Mapping[str, UInt8[np.ndarray, "n f h w 3"]],
) -> UInt8[np.ndarray, "f height width 3"]:
    """A video in which clips play at once: a column with its label for every entry, clip below clip.

    Frames are enlarged as in `sample_grid`, so that there is room for the labels, which may take several lines.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    columns = {label: _enlarged(clips, _MIN_COLUMN_WIDTH) for label, clips in columns.items()}
    count, num_frames, height, width, _ = next(iter(columns.values())).shape
    row_height, column_width = height + _GAP, width + _GAP
    lines = {label: textwrap.wrap(label, _LABEL_LETTERS) for label in columns}
    top = _LINE * max(map(len, lines.values())) + _GAP
    page = Image.new("RGB", (len(columns) * column_width + _GAP, top + count * row_height), "white")
    draw = ImageDraw.Draw(page)
    for column, label in enumerate(columns):
        text = "\n".join(lines[label])
        draw.multiline_text((_GAP + column * column_width, 1), text, fill="black", font=font)
    film = np.repeat(np.asarray(page)[None], num_frames, axis=0)
    for column, clips in enumerate(columns.values()):
        for row, clip in enumerate(clips):
            left, upper = _GAP + column * column_width, top + row * row_height
            film[:, upper : upper + height, left : left + width] = clip
    return film


def check_rate(path: str | os.PathLike, fps: float) -> None:
    """Raises UserError if the file at `path` cannot be played at this rate."""
    if str(path).lower().endswith(".gif") and fps > _GIF_MAX_FPS:
        raise UserError(f"fps={fps:g} is too fast for {path}: a GIF has at most {_GIF_MAX_FPS}; write an .mp4.")


def write_video(path: str | os.PathLike, frames: UInt8[np.ndarray, "f h w 3"], fps: float) -> None:
    """Writes frames as .mp4 (H.264, yuv420p, BT.709) or .gif.

    yuv420p needs even sizes: an odd last row or column is doubled.

    Raises:
        UserError: if the name ends in something else, or the rate is too fast for a GIF.
    """
    path = as_path(path)
    check_rate(path, fps)
    write = {".mp4": _write_mp4, ".gif": _write_gif}.get(path.suffix.lower())
    if write is None:
        raise UserError(f"Videos are written as .mp4 or .gif, not as {path.name!r}; choose one of these endings.")
    with paths.new_file(path) as file:
        write(file, frames, fps)


def write_picture(path: str | os.PathLike, picture: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes a .png file."""
    with paths.new_file(as_path(path)) as file:
        Image.fromarray(picture).save(file, "PNG")


def write_pictures(folder: Path, frames: UInt8[np.ndarray, "f h w 3"]) -> None:
    """Writes 000.png, 001.png, ... when all are made, and removes what a longer clip left of them."""
    with contextlib.ExitStack() as made:
        for number, frame in enumerate(frames):
            file = made.enter_context(paths.new_file(folder / f"{number:03d}.png"))
            Image.fromarray(frame).save(file, "PNG")
    for number in itertools.count(len(frames)):
        left = folder / f"{number:03d}.png"
        if not left.exists():
            return
        left.unlink()


def _write_mp4(path: pathlib.Path, frames: np.ndarray, fps: float) -> None:
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    # Absolute, as FFmpeg takes what is before a colon for a protocol.
    with av.open(os.path.abspath(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fractions.Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16"}
        # Untagged, players guess the matrix from the size, and half of them guess wrong.
        stream.codec_context.colorspace = _BT709
        for picture in frames:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode())


def _write_gif(path: pathlib.Path, frames: np.ndarray, fps: float) -> None:
    # Of 1/100 s: rounding the times, not the durations, keeps the length of the whole.
    ends = np.round(np.arange(len(frames) + 1) * 100 / fps)
    durations = (10 * np.diff(ends)).astype(int).tolist()
    first, *rest = (Image.fromarray(picture) for picture in frames)
    first.save(path, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
