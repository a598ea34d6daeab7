"""Pixel mode: training clips read straight from a small folder of videos, in the order of `data.order`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from typing import Any

import grain
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from osv_jax.data import order, video
from osv_jax.data.cutting import Cutting
from osv_jax.data.motion import motion
from osv_jax.data.video import EXTENSIONS
from osv_jax.errors import UserError
from osv_jax.runtime.paths import Path, absolute, as_path, files_below, in_bucket, write_text
from osv_jax.runtime.ranges import COUNT, FINITE, WHOLE

_NAMED_REASONS = 10


@dataclasses.dataclass(frozen=True)
class Clip:
    """A stretch of a video: the file, relative to the index's folder, and where it begins [s]."""

    path: str
    start_seconds: float


@dataclasses.dataclass(frozen=True)
class ClipIndex:
    """The clips of a folder, the files left out as (path, reason), and how clips are read.

    `content_hash` covers what decides which clip a position means: file names and sizes, clip length and rate.
    """

    folder: Path
    clips: tuple[Clip, ...]
    skipped: tuple[tuple[str, str], ...]
    num_frames: int
    fps: float
    height: int
    width: int
    content_hash: str

    def read(self, clip_id: int) -> dict[str, Any]:
        """Decodes one clip: `video` uint8 [f h w 3], `fps` float32, `clip_id` int32.

        Raises:
            video.VideoError: naming the file, if it has changed or vanished since it was indexed.
        """
        clip = self.clips[clip_id]
        frames = video.read_clip(
            self.folder / clip.path, clip.start_seconds, self.num_frames, self.fps, self.height, self.width
        )
        return {"video": frames, "fps": np.float32(self.fps), "clip_id": np.int32(clip_id)}


def index_clips(
    folder: str | os.PathLike,
    num_frames: int,
    fps: float,
    height: int,
    width: int,
    cache_file: str | os.PathLike | None = None,
    stride: float | None = None,
) -> ClipIndex:
    """Finds the videos below a folder, decodes each once, and cuts those that can be used into clips.

    Clips follow each other from the first frame on. Files that do not decode, are shorter than one
    clip, or have fewer than `fps` frames a second (they would repeat frames) are left out with the reason.

    Args:
        folder: searched recursively; links to files are followed, links to folders are not.
        num_frames, fps: length [frames] and frame rate [1/s] of a clip.
        height, width: size [px] to which frames are scaled and cropped when they are read.
        cache_file: JSON file that remembers what decoding told, by path, size and modification time.
        stride: from the start of a clip to that of the next [s]; by default they do not overlap.

    Raises:
        UserError: if the folder is missing or no folder, or holds no video, or none that can be used.
    """
    folder = as_path(folder)
    if not folder.exists():
        raise UserError(f"The video folder {folder} does not exist; give the path of a folder with videos.")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, but a folder with videos is needed; give the folder it is in.")
    names = [name for name in files_below(folder) if pathlib.PurePath(name).suffix.lower() in EXTENSIONS]
    if not names:
        known = " ".join(EXTENSIONS)
        raise UserError(f"The folder {folder} holds no videos; put files in it that end in one of {known}.")

    cutting = Cutting(num_frames, fps, height, width, stride=num_frames / fps if stride is None else stride)
    clips, skipped, contents = [], [], []
    for path, (size, result) in zip(names, _probe_all(folder, names, cache_file), strict=True):
        reason = result if isinstance(result, str) else cutting.unfit(result)
        if reason is not None:
            skipped.append((path, reason))
        elif not isinstance(result, str):
            contents.append((path, size))
            clips += [Clip(path, start) for start in cutting.starts(result)]
    if not clips:
        reasons = "".join(f"\n  {path} {reason}" for path, reason in skipped[:_NAMED_REASONS])
        more = f"\n  and {len(skipped) - _NAMED_REASONS} more" if len(skipped) > _NAMED_REASONS else ""
        raise UserError(
            f"None of the {len(skipped)} videos in {folder} can be used; add longer or intact ones:{reasons}{more}"
        )
    description = json.dumps([contents, num_frames, float(fps), *([] if stride is None else [stride])])
    content_hash = hashlib.sha256(description.encode()).hexdigest()[:16]
    return ClipIndex(folder, tuple(clips), tuple(skipped), num_frames, fps, height, width, content_hash)


def spread_clips(
    folder: str | os.PathLike,
    count: int,
    num_frames: int,
    fps: float,
    height: int,
    width: int,
    shift: float,
    min_motion: float = 0.0,
) -> UInt8[np.ndarray, "n f h w 3"]:
    """Up to `count` clips, evenly spread over the videos of a folder and over each of them, decoded.

    Args:
        folder, num_frames, fps, height, width: see `index_clips`.
        shift: clips begin at multiples of this many frames, so that they may overlap.
        min_motion: clips with less (see `motion.motion`) are left out.

    Raises:
        UserError: as `index_clips`, or if nothing moves.
    """
    found = index_clips(folder, num_frames, fps, height, width, stride=shift / fps)
    clips = [found.read(number)["video"] for number in spread(len(found.clips), count if not min_motion else None)]
    moving = [clip for clip in clips if motion(clip) >= min_motion]
    if not moving:
        raise UserError(f"Nothing moves in the {len(clips)} clips of {folder}; give other videos.")
    return np.stack([moving[number] for number in spread(len(moving), count)])


def spread(available: int, count: int | None) -> list[int]:
    """Numbers of up to `count` things, evenly spaced."""
    if count is None or count >= available:
        return list(range(available))
    return np.linspace(0, available - 1, count).round().astype(int).tolist()


def _probe_all(
    folder: Path, names: list[str], cache_file: str | os.PathLike | None
) -> list[tuple[int, video.VideoInfo | str]]:
    """For each path its size [bytes] and its timeline, or else the reason why it has none."""
    cache = _read_cache(cache_file)
    known: dict[str, dict] = {}
    stats = {name: _size_and_time(folder / name) for name in names}
    for name in names:
        entry = cache.get(str(absolute(folder) / name))
        if entry and entry["stat"] == stats[name]:
            known[name] = entry
    new = [name for name in names if name not in known]
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    try:
        probes = [pool.submit(video.probe, folder / name) for name in new]
        bar = tqdm(new, desc="Checking videos", unit="video", file=sys.stderr, disable=not new)
        for name, probe in zip(bar, probes, strict=True):
            try:
                known[name] = {"stat": stats[name], "info": dataclasses.asdict(probe.result())}
            except video.VideoError as error:
                known[name] = {"stat": stats[name], "reason": error.reason}
    finally:
        pool.shutdown(cancel_futures=True)
        # Also when interrupted: what has been decoded need not be decoded again.
        if cache_file is not None and new:
            cache.update({str(absolute(folder) / name): entry for name, entry in known.items()})
            _write_cache(as_path(cache_file), cache)
    return [_size_and_result(known[name]) for name in names]


def _size_and_result(entry: dict) -> tuple[int, video.VideoInfo | str]:
    """What an entry of the cache says: the size [bytes] of a file, and its timeline or the reason why it has none."""
    size, time = entry["stat"]
    if not (size in WHOLE and time in WHOLE):
        raise ValueError("stat")
    if "reason" in entry:
        return size, str(entry["reason"])
    info = video.VideoInfo(**entry["info"])
    # (A frame takes a byte or more.)
    if not (info.start in FINITE and info.end in FINITE and info.start < info.end and info.num_frames in COUNT):
        raise ValueError("times")
    if not (info.num_frames <= size and info.height in COUNT and info.width in COUNT):
        raise ValueError("sizes")
    return size, info


def _size_and_time(path: Path) -> list[int]:
    """Size [bytes] and modification time [ns]; zeros where nothing can be read, which decoding then reports."""
    try:
        if in_bucket(path):
            found = path.stat()
            return [found.length, found.mtime * 10**9]
        stat = path.stat()
        return [stat.st_size, stat.st_mtime_ns]
    except OSError:
        return [0, 0]


def _read_cache(cache_file: str | os.PathLike | None) -> dict[str, dict]:
    """The entries by absolute path; none if the file is missing or damaged."""
    if cache_file is None:
        return {}
    try:
        cache = json.loads(as_path(cache_file).read_text())
        for entry in cache.values():
            _size_and_result(entry)
        return cache
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _write_cache(cache_file: Path, cache: dict[str, dict]) -> None:
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    write_text(cache_file, json.dumps(cache))


def pixel_dataset(
    index: ClipIndex,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 8,
) -> grain.IterDataset:
    """This process's part of the batches from `start_step` on; see `order.Order`.

    Args:
        index: the clips.
        start_step: the first step to read.
        batch_size, seed, process_index, process_count: see `order.Order`.
        num_threads: clips decoded at the same time. It does not change the order.

    Returns:
        An iterable of {`video`: uint8 [b f h w 3], `fps`: float32 [b], `clip_id`: int32 [b]}, b = B / process_count.

    Raises:
        UserError: if the batch does not split over the processes.
        video.VideoError: while iterating, naming the file, if one has become unreadable.
    """
    records = order.Order(len(index.clips), batch_size, seed, process_index, process_count)
    part = records.part
    positions = grain.MapDataset.range(start_step * part, records.num_steps * part)
    prefetch = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(2 * part, num_threads))
    return positions.map(lambda local: index.read(records.record(local))).to_iter_dataset(prefetch).batch(part)


def save_position(index: ClipIndex, batch_size: int, seed: int, step: int) -> dict[str, int | str]:
    """See `order.save_position`."""
    return order.save_position(index.content_hash, batch_size, seed, step)


def restore_step(state: dict[str, int | str], index: ClipIndex, batch_size: int, seed: int) -> int:
    """See `order.restore_step`."""
    name = f"The videos in {index.folder}, or the clip length or frame rate,"
    return order.restore_step(state, index.content_hash, name, batch_size, seed)
