"""From the videos of chunks to committed batches: decoding runs ahead in processes, encoding in a thread beside this.

A batch never reaches beyond its chunk, so that what is in it depends on the plan alone, however often it was killed.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from osv_jax.data.cutting import Clip, Cutting, Task
from osv_jax.data.folder import Skipped
from osv_jax.data.latents import serialize
from osv_jax.preparation import shards
from osv_jax.preparation.decoding import Decoder
from osv_jax.preparation.shards import Chunk, Progress
from osv_jax.preparation.sources import SourceVideo
from osv_jax.runtime.paths import Path

# (clips, [(name of the video, number of the clip, caption)]) -> arrays of the dataset's schema, for all clips.
Encode = Callable[[UInt8[np.ndarray, "n f h w 3"], Sequence[tuple[str, int, str]]], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Clips to encode, what was skipped since the last batch, and how far the chunk is afterwards."""

    chunk: Chunk
    progress: Progress
    new_videos: int
    clips: list[tuple[SourceVideo, Clip]]
    skipped: Skipped


@dataclasses.dataclass
class Tally:
    """What a run has done.

    Attributes:
        videos, clips, skipped: numbers, of this run.
        encoding: time the encoder was busy [s].
        started, ended: when the first clips were there, and the last were committed (`time.perf_counter`).
    """

    videos: int = 0
    clips: int = 0
    skipped: int = 0
    encoding: float = 0.0
    started: float = 0.0
    ended: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def clips_per_second(self) -> float:
        return self.clips / self.seconds if self.seconds else 0.0

    @property
    def utilisation(self) -> float:
        """The share of the time that the encoder was busy."""
        return min(1.0, self.encoding / self.seconds) if self.seconds else 0.0


def read_batches(
    decoder: Decoder,
    chunks: Sequence[Chunk],
    progress: Mapping[int, Progress],
    cutting: Cutting,
    batch_size: int,
) -> Iterator[Batch]:
    """What is left of the chunks; the last batch of each says that it is complete, and may have no clips.

    Args:
        progress: by the index of a chunk.
    """

    def tasks() -> Iterator[Task]:
        for position, chunk in enumerate(chunks):
            done = progress[chunk.index]
            for number in range(done.video, len(chunk.videos)):
                video = chunk.videos[number]
                skip = done.clip if number == done.video else 0
                yield Task((position, number), video.name, video.location, cutting, skip)

    cuts = itertools.groupby(decoder.cuts(tasks()), key=lambda item: item[0].key[0])
    for chunk, (_, results) in zip(chunks, cuts, strict=True):
        count, done = progress[chunk.index].batches, progress[chunk.index].video
        clips: list[tuple[SourceVideo, Clip]] = []
        skipped: Skipped = []
        for task, cut in results:
            video = chunk.videos[task.key[1]]
            if cut.reason:
                skipped.append((video.name, cut.reason))
            for clip in cut.clips:
                if clip.number < task.skip:
                    continue
                if clip.reason:
                    skipped.append((video.name, clip.reason))
                    continue
                clips.append((video, clip))
                if len(clips) == batch_size:
                    count += 1
                    number = task.key[1]
                    yield Batch(chunk, Progress(count, number, clip.number + 1), number - done, clips, skipped)
                    clips, skipped, done = [], [], number
        everything = Progress(count + 1, len(chunk.videos), 0, complete=True)
        yield Batch(chunk, everything, len(chunk.videos) - done, clips, skipped)


def encode_batches(
    batches: Iterator[Batch],
    encode: Encode,
    features: Any,
    fps: float,
    output: Path,
    on_commit: Callable[[Tally], None],
) -> Tally:
    """Encodes and commits batches in their order, one batch ahead of the one that is written.

    Args:
        features: of the dataset's schema.
        fps: of the clips, for the records.
        on_commit: called after each batch.
    """
    tally = Tally()

    def timed(batch: Batch) -> Mapping[str, np.ndarray]:
        start = time.perf_counter()
        tally.started = tally.started or start
        names = [(video.name, clip.number, video.caption) for video, clip in batch.clips]
        encoded = encode(np.stack([clip.frames for _, clip in batch.clips if clip.frames is not None]), names)
        tally.encoding += time.perf_counter() - start
        return encoded

    def commit(batch: Batch, encoded: Mapping[str, np.ndarray]) -> None:
        records = []
        for i, (video, clip) in enumerate(batch.clips):
            known: dict[str, Any] = {"caption": video.caption, "source": video.name}
            known |= {"fps": fps, "clip_start": clip.start, "motion": clip.motion}
            records.append(serialize(features, known | {name: value[i] for name, value in encoded.items()}))
        motions = [clip.motion for _, clip in batch.clips]
        shards.commit_batch(output, batch.chunk, batch.progress, records, motions, batch.skipped)
        tally.videos += batch.new_videos
        tally.clips += len(records)
        tally.skipped += len(batch.skipped)
        tally.started = tally.started or time.perf_counter()
        tally.ended = time.perf_counter()
        on_commit(tally)

    in_flight: collections.deque[tuple[Batch, concurrent.futures.Future | None]] = collections.deque()

    def finish_one() -> None:
        batch, future = in_flight.popleft()
        commit(batch, future.result() if future else {})

    with concurrent.futures.ThreadPoolExecutor(1) as encoder:
        for batch in batches:
            in_flight.append((batch, encoder.submit(timed, batch) if batch.clips else None))
            if len(in_flight) > 1:
                finish_one()
        while in_flight:
            finish_one()
    return tally
