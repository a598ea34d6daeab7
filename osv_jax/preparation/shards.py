"""Writing a prepared dataset so that a kill at any moment loses only what was not encoded yet.

The videos of a plan are divided into chunks, each of which becomes one record file. Its clips are encoded in batches;
every batch is a file of its own under `unfinished/`, and is there whole or not at all (it is written under another
name, then renamed). A finished chunk joins its batches. When all chunks are finished, their files get the names that
TFDS expects, and `dataset_info.json` makes them a dataset.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from osv_jax.data import latents
from osv_jax.data.folder import Skipped
from osv_jax.data.schemas import Schema, TextSchema, schema_of
from osv_jax.errors import UserError
from osv_jax.preparation import stored
from osv_jax.preparation.sources import Source, SourceVideo
from osv_jax.runtime import paths
from osv_jax.runtime.paths import Path, in_bucket, write_text

UNFINISHED = "unfinished"
# In the list of chunks, the one that holds what was left out before any video was opened.
SOURCE_CHUNK = -1


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Videos whose clips go to one record file."""

    index: int
    split: str
    videos: tuple[SourceVideo, ...]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a chunk has come.

    Attributes:
        batches: committed.
        video, clip: the next clip to encode: position of its video in the chunk, and its number in the video.
        complete: all clips of the chunk are in the batches.
    """

    batches: int = 0
    video: int = 0
    clip: int = 0
    complete: bool = False


def chunks_of(source: Source, videos_per_chunk: int) -> list[Chunk]:
    """The same for every machine; chunk i is done by shard i % n of n."""
    chunks: list[Chunk] = []
    for split, videos in source.splits.items():
        for start in range(0, len(videos), videos_per_chunk):
            chunks.append(Chunk(len(chunks), split, tuple(videos[start : start + videos_per_chunk])))
    return chunks


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps other processes from writing to `output`; a kill unlocks it.

    Nothing in a bucket can be locked: for one, only processes of this machine are kept away.

    Raises:
        UserError: if one is writing there, or the folder cannot be written to.
    """
    paths.check_folder(output, "--output")
    with _lock_file(output).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"Another process is writing to {output}; wait for it, or give another one.") from error
        yield


def _lock_file(output: Path) -> Path:
    if in_bucket(output):
        name = hashlib.sha256(str(output).encode()).hexdigest()[:16]
        return pathlib.Path(tempfile.gettempdir(), f"osv_jax-{name}.lock")
    return output / ".lock"


def check_plan(output: Path, plan: Mapping[str, Any]) -> None:
    """Compares a plan with the one that `output` was started with, and writes it there if it is the first.

    Raises:
        UserError: naming what differs, or when the folder holds something else.
    """
    file = output / "plan.json"
    if not file.exists():
        if output.is_dir() and any(path.name != ".lock" for path in output.iterdir()):
            raise UserError(f"{output} holds other files; give an empty folder, or one that does not exist yet.")
        write_text(file, json.dumps(plan, indent=2) + "\n")
        return
    before = stored.read_plan(output)
    differing = [
        f"{key} (was {before.get(key)!r}, is {plan.get(key)!r})"
        for key in sorted(before.keys() | plan.keys())
        if before.get(key) != plan.get(key)
    ]
    if differing:
        raise UserError(
            f"{output} was started with other videos or settings: {'; '.join(differing)}. Use the same ones to"
            " continue, or give another --output."
        )


def progress_of(output: Path, chunk: int) -> Progress:
    """What the last committed batch of a chunk says."""
    folder = _chunk_folder(output, chunk)
    numbers = sorted(int(path.stem) for path in folder.glob("*.array_record")) if folder.is_dir() else []
    if not numbers:
        return Progress()
    header = stored.read_header(folder / f"{numbers[-1]:06d}.array_record")
    video, clip = header["next"]
    return Progress(len(numbers), video, clip, header["complete"])


def resume(output: Path, chunks: Sequence[Chunk]) -> dict[int, Progress]:
    """How far each chunk has come; the files of those that a kill left complete are made up for."""
    progress = {}
    for chunk in chunks:
        finished = _chunk_info(output, chunk.index).exists()
        done = Progress(video=len(chunk.videos), complete=True) if finished else progress_of(output, chunk.index)
        if done.complete and not finished:
            finish_chunk(output, chunk)
        progress[chunk.index] = done
    return progress


def commit_batch(
    output: Path,
    chunk: Chunk,
    progress: Progress,
    records: Sequence[bytes],
    motions: Sequence[float],
    skipped: Skipped,
) -> None:
    """Writes one batch, and what follows it; if the chunk is complete, its file.

    Args:
        progress: after this batch.
        motions: of the records.
        skipped: since the batch before.
    """
    header = {
        "next": [progress.video, progress.clip],
        "complete": progress.complete,
        "motions": [round(motion, 3) for motion in motions],
        "skipped": skipped,
    }
    folder = _chunk_folder(output, chunk.index)
    folder.mkdir(parents=True, exist_ok=True)
    _write_records(folder / f"{progress.batches - 1:06d}.array_record", [json.dumps(header).encode(), *records])
    if progress.complete:
        finish_chunk(output, chunk)


def finish_chunk(output: Path, chunk: Chunk) -> None:
    """Joins the batches of a complete chunk. Started again after a kill, it begins anew."""
    folder = _chunk_folder(output, chunk.index)
    files = sorted(folder.glob("*.array_record"))
    headers = [stored.read_header(file) for file in files]
    digest, count = hashlib.sha256(), 0

    def records() -> Iterator[bytes]:
        nonlocal count
        for file in files:
            for record in stored.read_batch(file)[1]:
                digest.update(record)
                count += 1
                yield record

    joined = folder.with_suffix(".array_record")
    _write_records(joined, records())
    _write_chunk_info(
        output,
        {
            "index": chunk.index,
            "split": chunk.split,
            "records": count,
            "bytes": paths.size_of(joined),
            "sha256": digest.hexdigest(),
            "videos": len(chunk.videos),
            "motions": [motion for header in headers for motion in header["motions"]],
            "skipped": [entry for header in headers for entry in header["skipped"]],
        },
    )
    paths.remove_folder(folder)


def write_source_chunk(output: Path, skipped: Skipped) -> None:
    """Records what was left out before any video was opened."""
    info = {"index": SOURCE_CHUNK, "split": "", "records": 0, "bytes": 0, "videos": 0, "motions": []}
    _write_chunk_info(output, info | {"sha256": "", "skipped": skipped})


def publish(output: Path, indices: Iterable[int], schema: Schema | TextSchema, metadata: Mapping[str, Any]) -> None:
    """Turns finished chunks into a dataset. Started again after a kill, it goes on."""
    infos = [stored.read_chunk(_chunk_info(output, index), index) for index in indices]
    named = _named(infos)
    for name, info in named.items():
        file = _chunk_folder(output, info["index"]).with_suffix(".array_record")
        if file.exists():
            file.replace(output / name)
    _finish_dataset(output, infos, named, schema, metadata)
    paths.remove_folder(output / UNFINISHED)


def merge(parts: Sequence[Path], output: Path) -> None:
    """Joins the datasets of all shards of a preparation. Files are linked where that is possible, else copied.

    Raises:
        UserError: if a part is unfinished or of another preparation, or one is missing or there twice.
    """
    metadata = [latents.read_metadata(part) for part in parts]
    for part, found in zip(parts, metadata, strict=True):
        latents.check_files(part, found)
    plans = [stored.read_plan(part) for part in parts]
    for part, plan in zip(parts[1:], plans[1:], strict=True):
        if plan | {"shard": ""} != plans[0] | {"shard": ""}:
            raise UserError(f"{part} and {parts[0]} were not prepared from the same videos with the same settings.")
    shards = [plan["shard"] for plan in plans]
    count = int(shards[0].split("/")[1])
    for wanted in (f"{i}/{count}" for i in range(count)):
        if shards.count(wanted) != 1:
            problem = "is missing" if wanted not in shards else "is given twice"
            raise UserError(f"The part of --shard={wanted} {problem}; give the parts of all {count} shards.")
    if len(parts) > count:
        raise UserError(f"{len(parts)} parts are given, but there are {count} shards.")
    paths.check_apart(output, *parts)
    with locked(output):
        check_plan(output, plans[0] | {"shard": "0/1"})
        origins: dict[int, Path] = {}
        infos: dict[int, dict[str, Any]] = {}
        for part in parts:
            for info in stored.read_chunks(part):
                infos[info["index"]] = info
                if info["records"]:
                    origins[info["index"]] = part / info["file"]
        ordered = [infos[index] for index in sorted(infos)]
        named = _named(ordered)
        for name, info in named.items():
            _link_or_copy(origins[info["index"]], output / name)
        own = {key: metadata[0][key] for key in metadata[0] if key not in ("files", "content_hash")}
        _finish_dataset(output, ordered, named, schema_of(metadata[0]["schema"]), own)


def _named(infos: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """File name -> chunk, of those that have records, in the order of the dataset."""
    filled: dict[str, list[Any]] = {}
    for info in infos:
        if info["records"]:
            filled.setdefault(info["split"], []).append(info)
    return {
        latents.shard_name(split, i, len(chunks)): chunk
        for split, chunks in filled.items()
        for i, chunk in enumerate(chunks)
    }


def _finish_dataset(
    output: Path,
    infos: Sequence[Mapping[str, Any]],
    named: Mapping[str, Mapping[str, Any]],
    schema: Schema | TextSchema,
    metadata: Mapping[str, Any],
) -> None:
    if not named:
        raise UserError(f"Not one clip could be made; see {_write_skipped(output, infos)} for the reasons.")
    files = {info["index"]: name for name, info in named.items()}
    lines = [json.dumps({**info, "file": files.get(info["index"], "")}) + "\n" for info in infos]
    write_text(output / "chunks.jsonl", "".join(lines))
    _write_skipped(output, infos)
    lengths: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for info in named.values():
        lengths.setdefault(info["split"], []).append(info["records"])
        sizes[info["split"]] = sizes.get(info["split"], 0) + info["bytes"]
    content = json.dumps([[name, info["sha256"]] for name, info in named.items()])
    latents.write_info(
        output,
        schema,
        lengths,
        sizes,
        {
            **metadata,
            "format": latents.FORMAT,
            "schema": dataclasses.asdict(schema),
            "content_hash": hashlib.sha256(content.encode()).hexdigest()[:16],
            "files": {name: info["bytes"] for name, info in named.items()},
        },
    )


def _write_skipped(output: Path, infos: Iterable[Mapping[str, Any]]) -> Path:
    """One line each for what was left out, for people."""
    lines = [" ".join(f"{name} {reason}".split()) + "\n" for info in infos for name, reason in info["skipped"]]
    write_text(output / "skipped.txt", "".join(lines))
    return output / "skipped.txt"


def _chunk_folder(output: Path, index: int) -> Path:
    return output / UNFINISHED / f"{index:06d}"


def _chunk_info(output: Path, index: int) -> Path:
    return output / UNFINISHED / (f"{index:06d}.json" if index >= 0 else "source.json")


def _write_chunk_info(output: Path, info: Mapping[str, Any]) -> None:
    file = _chunk_info(output, info["index"])
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps(info))


def _write_records(file: Path, records: Iterable[bytes]) -> None:
    with paths.new_file(file) as temporary:
        writer = ArrayRecordWriter(str(temporary), latents.WRITER_OPTIONS)
        for record in records:
            writer.write(record)
        writer.close()
        # On the disk before the name says so: a machine may lose power too.
        with temporary.open("rb") as written:
            os.fsync(written.fileno())


def _link_or_copy(source: Path, target: Path) -> None:
    if in_bucket(source) or in_bucket(target):
        paths.copy_file(source, target)
        return
    with paths.new_file(target) as temporary:
        try:
            temporary.hardlink_to(source.resolve())
        except OSError:
            shutil.copyfile(source, temporary)
