"""Reading back what preparing wrote: plan, chunks and batches, each held to what it must be before it is used."""

from __future__ import annotations

import re
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from osv_jax.convert.json_files import parse_json, read_json
from osv_jax.data.latents import is_plain
from osv_jax.errors import UserError
from osv_jax.runtime.paths import Path
from osv_jax.runtime.ranges import FINITE, WHOLE, Range

_INDEX = Range(-1, whole=True)


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan of a dataset, finished or not.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    try:
        plan = read_json(folder / "plan.json")
        if not re.fullmatch(r"\d{1,9}/\d{1,9}", str(plan.get("shard"))):
            raise UserError(f"{folder / 'plan.json'} names no shard.")
        return plan
    except UserError as error:
        raise UserError(f"{folder} has no intact plan.json; it was not made by osv_jax.prepare.") from error


def read_chunks(folder: Path) -> list[dict[str, Any]]:
    """The chunks of a finished dataset, with the names of their files.

    Raises:
        UserError: if they cannot be read.
    """
    file = folder / "chunks.jsonl"
    try:
        chunks = [parse_json(line, file) for line in file.read_bytes().splitlines()]
        if not chunks or not all(_is_chunk(info) and _is_named(info) for info in chunks):
            raise UserError(f"{file} holds other things than chunks.")
        return chunks
    except (OSError, UserError) as error:
        raise UserError(f"{file} is missing or damaged; copy the dataset again, or prepare it again.") from error


def read_chunk(file: Path, index: int) -> dict[str, Any]:
    """A finished chunk of an unfinished dataset, and which.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        info = read_json(file)
        if not _is_chunk(info) or info["index"] != index:
            raise UserError(f"{file} is not chunk {index}.")
        return info
    except UserError as error:
        raise UserError(
            f"{file} is damaged; delete it and give the same command again, which prepares its videos again."
        ) from error


def read_batch(file: Path) -> tuple[dict[str, Any], list[bytes]]:
    """The header of a batch, and its records.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        header, *records = read_records(file)
    except Exception as error:  # ArrayRecord meets damage with exceptions of all kinds.
        raise _damaged_batch(file) from error
    return _checked_header(file, header), records


def read_records(file: Path) -> list[bytes]:
    """All records of an intact file."""
    reader = ArrayRecordReader(str(file))
    records = reader.read_all()
    reader.close()
    return records


def read_header(file: Path) -> dict[str, Any]:
    """The header of a batch alone; raises UserError as `read_batch`."""
    try:
        reader = ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")
        (header,) = reader.read([0])
        reader.close()
    except Exception as error:
        raise _damaged_batch(file) from error
    return _checked_header(file, header)


def _checked_header(file: Path, header: bytes) -> dict[str, Any]:
    try:
        content = parse_json(header, file)
    except UserError as error:
        raise _damaged_batch(file) from error
    following = content.get("next")
    is_whole = (
        isinstance(following, list)
        and len(following) == 2
        and all(number in WHOLE for number in following)
        and isinstance(content.get("complete"), bool)
        and _are_motions(content.get("motions"))
        and _are_skipped(content.get("skipped"))
    )
    if not is_whole:
        raise _damaged_batch(file)
    return content


def _damaged_batch(file: Path) -> UserError:
    return UserError(
        f"{file} is damaged; delete the folder {file.parent} and give the same command again, which prepares its"
        " videos again."
    )


def _is_chunk(info: dict[str, Any]) -> bool:
    return (
        info.get("index") in _INDEX
        and all(info.get(name) in WHOLE for name in ("records", "bytes", "videos"))
        and all(isinstance(info.get(name), str) for name in ("split", "sha256"))
        and (info["split"].isidentifier() if info["index"] >= 0 else not info["records"])
        and _are_motions(info.get("motions"))
        and len(info["motions"]) == info["records"]
        and _are_skipped(info.get("skipped"))
    )


def _is_named(info: dict[str, Any]) -> bool:
    file = info.get("file")
    return is_plain(file) if info["records"] else file == ""


def _are_motions(motions: Any) -> bool:
    return isinstance(motions, list) and all(motion in FINITE for motion in motions)


def _are_skipped(skipped: Any) -> bool:
    return isinstance(skipped, list) and all(
        isinstance(entry, list) and len(entry) == 2 and all(isinstance(text, str) for text in entry)
        for entry in skipped
    )
