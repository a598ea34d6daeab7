"""What a prepared dataset holds, in words and as a picture."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from osv_jax.data import latents
from osv_jax.preparation import stored
from osv_jax.preparation.batches import Tally
from osv_jax.runtime.media import sample_grid
from osv_jax.runtime.paths import Path

# Upper ends of the bins of motion (see `data.motion`).
_MOTION_BINS = (0.5, 1, 2, 4, 8, 16, 32, 64, 256)
_BAR = 40
_NAMED_REASONS = 12


def describe(folder: Path) -> str:
    """Clips, bytes, what was skipped and why, and a histogram of motion.

    Raises:
        UserError: if the folder is no finished dataset, or files of it are missing or cut short.
    """
    metadata = latents.read_metadata(folder)
    chunks = stored.read_chunks(folder)
    lines = [
        f"{folder}: clips of {metadata['num_frames']} frames at {metadata['fps']:g} fps,"
        f" {metadata['height']} x {metadata['width']}, {_conditions(metadata['schema'])}"
    ]
    for split in splits(folder):
        dataset = latents.open_dataset(folder, split)
        size = sum(chunk["bytes"] for chunk in chunks if chunk["split"] == split)
        lines.append(
            f"  {split:<8}{len(dataset)} clips in {len(dataset.files)} files, {_bytes(size)},"
            f" {_bytes(size / len(dataset))} a clip"
        )
    lines.append(f"  videos  {sum(chunk['videos'] for chunk in chunks)} were opened")
    lines += _skipped_lines(folder, [entry for chunk in chunks for entry in chunk["skipped"]])
    lines += _histogram_lines([motion for chunk in chunks for motion in chunk["motions"]])
    return "\n".join(lines)


def _conditions(schema: Mapping[str, int]) -> str:
    if "num_tokens" in schema:
        return f"with captions of {schema['num_tokens']} tokens"
    return f"{schema['num_augmented']} augmentations each"


def splits(folder: Path) -> list[str]:
    """The splits that have records."""
    return list(dict.fromkeys(chunk["split"] for chunk in stored.read_chunks(folder) if chunk["records"]))


def _skipped_lines(folder: Path, skipped: Iterable[Sequence[str]]) -> list[str]:
    """Counts of reasons; those that differ in a number or in what stands in brackets are one."""
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    for name, reason in skipped:
        kinds[re.sub(r"\d[\d.]*|\(.*\)|; \S+ was", "#", reason)].append(f"{name} {reason}")
    if not kinds:
        return ["  skipped nothing"]
    count = sum(map(len, kinds.values()))
    lines = [f"  skipped {count} videos, clips or rows, all named in {folder / 'skipped.txt'}:"]
    ordered = sorted(kinds.values(), key=len, reverse=True)
    lines += [f"    {len(entries):>8}  like: {' '.join(entries[0].split())}" for entries in ordered[:_NAMED_REASONS]]
    if len(ordered) > _NAMED_REASONS:
        lines.append(f"    and {len(ordered) - _NAMED_REASONS} more kinds of reasons")
    return lines


def _histogram_lines(motions: list[float]) -> list[str]:
    counts, _ = np.histogram(motions, bins=[0, *_MOTION_BINS])
    lines = ["  motion  (mean absolute difference of consecutive frames, of 255)"]
    lower: float = 0
    for upper, count in zip(_MOTION_BINS, counts.tolist(), strict=True):
        bar = "#" * -(-count * _BAR // max(1, counts.max()))
        lines.append(f"    {lower:>4g} to {upper:<4g}{count:>8}  {bar}".rstrip())
        lower = upper
    return lines


def contact_sheet(
    dataset: latents.LatentDataset,
    decode: Callable[[Float[np.ndarray, "f h w c"]], UInt8[np.ndarray, "f height width 3"]],
    num_clips: int = 8,
) -> UInt8[np.ndarray, "height width 3"]:
    """Decoded samples, evenly spaced over the records: a row each, with source, start and caption."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(num_clips, len(dataset))).round().astype(int))
    rows: dict[str, Any] = {}
    for index in chosen.tolist():
        record = dataset.read(index)
        caption = f": {record['caption'][:60]}" if record["caption"] else ""
        label = f"{index}  {record['source']} at {record['clip_start']:.2f} s, motion {record['motion']:.1f}{caption}"
        rows[label] = decode(record["latents"].astype(np.float32))
    return sample_grid(rows)


def summary(tally: Tally) -> str:
    """What a run did, in one line."""
    hint = "" if tally.utilisation > 0.9 or tally.clips < 100 else "; more --workers may keep it busier"
    return (
        f"This run: {tally.clips} clips in {tally.seconds:.0f} s, {tally.clips_per_second:.3g} clips/s; the encoder was"
        f" busy {100 * tally.utilisation:.0f} % of the time{hint}."
    )


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError("TB ends the loop")
