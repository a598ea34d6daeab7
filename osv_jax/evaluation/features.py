"""From a folder of videos to a feature vector of each, and the files in which these are kept."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from osv_jax.data.folder import FolderVideo, Skipped
from osv_jax.data.video import VideoError, read_frames
from osv_jax.errors import UserError
from osv_jax.evaluation.networks import FeatureNetwork
from osv_jax.evaluation.protocols import Protocol
from osv_jax.evaluation.stamps import modified
from osv_jax.runtime.finite import is_finite
from osv_jax.runtime.paths import Path, new_file
from osv_jax.runtime.ranges import COUNT

# Changes whenever the same videos would give other features.
_FORMAT = 1
SUFFIX = ".npz"


@dataclasses.dataclass(frozen=True)
class Features:
    """Of a set of videos.

    Attributes:
        vectors: one of each video, in their order; 1.6 kB of I3D's.
        sizes: how many videos have which height and width [px].
        skipped: name and reason of each video that could not be used.
        made_with: all that the vectors depend on besides the files, see `settings`.
    """

    vectors: Float[np.ndarray, "n c"]
    sizes: dict[tuple[int, int], int]
    skipped: Skipped
    made_with: dict[str, Any]

    def describe(self) -> str:
        """In words, how many videos of which size."""
        height, width = next(iter(self.sizes))
        size = f"{height} x {width}" if len(self.sizes) == 1 else f"{len(self.sizes)} different sizes"
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"{len(self.vectors):,} videos of {size}{skipped}"


def settings(protocol: Protocol, network: FeatureNetwork) -> dict[str, Any]:
    """What features depend on besides the files; those made with others are not compared."""
    return {
        "format": _FORMAT,
        "protocol": protocol.name,
        "network": network.name,
        "weights": network.fingerprint,
        "num_frames": network.num_frames,
        "side": network.side,
        "resize": protocol.describe_resize(network.side),
        "fps": protocol.fps,
    }


def check_made_with(name: str, features: Features, made_with: dict[str, Any]) -> None:
    """Raises UserError, telling the first that differs, unless these are the settings that the features have."""
    for setting, value in made_with.items():
        other = features.made_with.get(setting)
        if other != value:
            raise UserError(
                f"{name}: made with {setting} {other}, and cannot be compared with what is made with {value}; give the"
                " folder of videos instead, or the same options."
            )


def make_features(
    videos: list[FolderVideo],
    skipped: Skipped,
    protocol: Protocol,
    network: FeatureNetwork,
    workers: int,
    wanted: int | None = None,
    on_video: Callable[[], object] = lambda: None,
) -> Features:
    """Decodes in threads, ahead of the network.

    Args:
        videos, skipped: one or more to read; what was left out already.
        workers: threads.
        wanted: stop when so many could be used.
        on_video: called after each, used or skipped.

    Raises:
        UserError: none can be used; sizes differ where the protocol needs equal ones; features are not finite.
    """
    vectors: list[np.ndarray] = []
    waiting: list[np.ndarray] = []
    sizes: collections.Counter[tuple[int, int]] = collections.Counter()
    unreadable: Skipped = []

    def compute() -> None:
        vectors.extend(network(np.stack(waiting)))
        waiting.clear()

    for video, clip in _clips(videos, protocol, network, workers):
        on_video()
        if isinstance(clip, str):
            unreadable.append((video.name, clip))
            continue
        if protocol.equal_sizes and sizes and clip.size not in sizes:
            (height, width), (other_height, other_width) = next(iter(sizes)), clip.size
            raise UserError(
                f"{video.file} is {other_height} x {other_width}, and others are {height} x {width}, but"
                f" {protocol.name} compares videos of one size: resize them, or use another --protocol."
            )
        sizes[clip.size] += 1
        waiting.append(clip.pixels)
        if len(waiting) == network.batch_size:
            compute()
        if sizes.total() == wanted:
            break
    if waiting:
        compute()
    if not vectors:
        name, reason = unreadable[0]
        raise UserError(f"None of the {len(videos)} videos can be used: the first, {name}, {reason}.")
    return Features(np.stack(vectors), dict(sizes), [*skipped, *unreadable], settings(protocol, network))


def clip_features(
    clips: UInt8[np.ndarray, "n f h w 3"], protocol: Protocol, network: FeatureNetwork
) -> Float[np.ndarray, "n c"]:
    """Vectors of clips in memory, of which the first frames count, as many as the network takes.

    Raises:
        UserError: features that are not finite.
    """
    resized = [resize(clip[: network.num_frames], protocol, network.side) for clip in clips]
    size = network.batch_size
    batches = (np.stack(resized[start : start + size]) for start in range(0, len(resized), size))
    return np.concatenate([network(batch) for batch in batches])


def fingerprint(videos: Iterable[FolderVideo], skipped: Skipped, made_with: dict[str, Any]) -> str:
    """Of all that features depend on: names, sizes and times of the files, and `settings`."""
    files = [(video.name, video.size, modified(video.file)) for video in videos]
    return hashlib.sha256(json.dumps([made_with, files, skipped]).encode()).hexdigest()[:32]


def save_features(file: Path, features: Features) -> None:
    """Writes what `load_features` reads, whole or not at all."""
    sizes = [[*size, count] for size, count in features.sizes.items()]
    about = {"made_with": features.made_with, "sizes": sizes, "skipped": features.skipped}
    with new_file(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, vectors=features.vectors, about=json.dumps(about))


def load_features(file: Path) -> Features:
    """What `save_features` wrote.

    Raises:
        UserError: if it is missing, damaged, or something else.
    """
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            features = _parse(arrays["vectors"], json.loads(str(arrays["about"])))
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist; give a folder of videos, or a file of their features.") from error
    except Exception as error:  # NumPy's reader and zipfile meet damage with exceptions of all kinds.
        raise UserError(f"{file} holds no features of videos, or is damaged; give the folder of videos.") from error
    if not is_finite(features.vectors):
        raise UserError(f"{file} has features that are NaN or infinite; give the folder of videos.")
    return features


def _parse(vectors: Any, about: Any) -> Features:
    """The content of a file; what is none raises exceptions of many kinds."""
    sizes = {(height, width): count for height, width, count in about["sizes"]}
    skipped = [(name, reason) for name, reason in about["skipped"]]
    if vectors.dtype != np.float32 or vectors.ndim != 2 or not vectors.size:
        raise ValueError("vectors")
    if any(number not in COUNT for size, count in sizes.items() for number in (*size, count)):
        raise ValueError("sizes")
    if sum(sizes.values()) != len(vectors) or not all(isinstance(text, str) for entry in skipped for text in entry):
        raise ValueError("other videos")
    return Features(vectors, sizes, skipped, dict(about["made_with"]))


def cached_features(cache: Path | None, key: str, make: Callable[[], Features]) -> tuple[Features, Path | None]:
    """Features from a folder, or made and put there, and their file; damaged ones are made again."""
    if cache is None:
        return make(), None
    file = cache / f"{key}{SUFFIX}"
    try:
        return load_features(file), file
    except UserError:
        features = make()
        save_features(file, features)
        return features, file


@dataclasses.dataclass(frozen=True)
class _Clip:
    """The pixels that a network is given, 0 to 255, and the height and width [px] that the file has."""

    pixels: Float[np.ndarray, "f side side 3"]
    size: tuple[int, int]


def _clips(
    videos: list[FolderVideo], protocol: Protocol, network: FeatureNetwork, workers: int
) -> Iterator[tuple[FolderVideo, _Clip | str]]:
    """Of each video, in their order, its clip, or why there is none."""

    def read(video: FolderVideo) -> _Clip | str:
        try:
            frames = read_frames(video.file, network.num_frames, protocol.fps)
        except VideoError as error:
            return error.reason
        return _Clip(resize(frames, protocol, network.side), frames.shape[1:3])

    waiting: collections.deque[tuple[FolderVideo, concurrent.futures.Future]] = collections.deque()
    left = iter(videos)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                while len(waiting) < workers + 2 and (video := next(left, None)):
                    waiting.append((video, pool.submit(read, video)))
                if not waiting:
                    return
                video, future = waiting.popleft()
                yield video, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def resize(frames: UInt8[np.ndarray, "f h w 3"], protocol: Protocol, side: int) -> Float[np.ndarray, "f side side 3"]:
    """Resizes and crops as the protocol says, in float32, without rounding to whole values."""
    height, width = frames.shape[1:3]
    rows, columns = (matrix.astype(np.float32) for matrix in protocol.resampling(height, width, side))
    clip = np.empty((len(frames), side, side, 3), np.float32)
    for frame, picture in zip(frames, clip, strict=True):  # One at a time, as a frame may be large.
        lines = (rows @ frame.astype(np.float32).reshape(height, -1)).reshape(side, width, 3)
        turned = columns @ lines.swapaxes(0, 1).reshape(width, -1)
        picture[:] = turned.reshape(side, side, 3).swapaxes(0, 1)
    return clip
