"""What runs have written so far, read while they write. Nothing is changed, and what is damaged is left out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from osv_jax.evaluation.page import Column
from osv_jax.evaluation.table import COLUMNS

# Deeper folders are not searched; a run's own folders hold checkpoints and pictures.
_DEPTH = 4
_LINES, _PICTURES, _CONFIG = "metrics.jsonl", "pictures", "config.json"
_TABLES = ("table.json", "measured.json")
# A run that wrote so long ago [s], or longer, does not run.
_SILENT = 120
_MAX_BYTES = 200_000_000
# Names of the columns of measured.json, which `osv_jax.compare` writes.
_ALSO = (Column("evaluations", "NFE", "", "low", 0),)


@dataclasses.dataclass
class Run:
    """A folder that a run writes to.

    Attributes:
        name: relative to the folder of runs.
        rows: of its metrics.jsonl, without damaged lines.
        state: `running`, `finished` or `stopped`.
        num_steps: how many it is to do, if it says so.
        objective: what it trains, if it says so.
        pictures: files, the last step's last.
    """

    name: str
    rows: list[dict[str, Any]]
    state: str
    num_steps: int | None
    objective: str
    pictures: list[str]

    @property
    def step(self) -> int:
        """The last step that it has told of."""
        return max((row["step"] for row in self.rows), default=0)

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Steps and values of a metric; NaN where it was not finite."""
        return [(row["step"], math.nan if row[name] is None else row[name]) for row in self.rows if name in row]


@dataclasses.dataclass(frozen=True)
class Table:
    """What `osv_jax.evaluate` or `osv_jax.compare` wrote.

    Attributes:
        name: of its folder, relative to the folder of runs.
        columns: those with a number.
        rows: values by the columns' keys, and `name`.
    """

    name: str
    columns: list[Column]
    rows: list[dict[str, Any]]


class Runs:
    """A folder of runs, of tables and of folders of these. Files are read again when they have changed."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._read: dict[pathlib.Path, tuple[tuple[int, int], list[dict[str, Any]]]] = {}

    def names(self) -> list[str]:
        """Of all runs, those that wrote last first."""
        found = {folder: _changed(folder / _LINES) for folder in self._folders() if (folder / _LINES).is_file()}
        return [self._name(folder) for folder in sorted(found, key=lambda folder: -found[folder])]

    def run(self, name: str) -> Run | None:
        """A run, or None if there is none of that name any more."""
        if name not in self.names():
            return None
        folder = self._folder / name
        rows, config = self._rows(folder / _LINES), _json(folder / _CONFIG)
        num_steps = config.get("num_steps")
        num_steps = num_steps if isinstance(num_steps, int) and not isinstance(num_steps, bool) else None
        is_done = num_steps is not None and any(row["step"] >= num_steps for row in rows)
        is_silent = time.time() - _changed(folder / _LINES) > _SILENT
        pictures = sorted(file.name for file in _listed(folder / _PICTURES) if file.suffix == ".png")
        return Run(
            name,
            rows,
            "finished" if is_done else "stopped" if is_silent else "running",
            num_steps,
            str(config.get("objective", "")),
            sorted((file for file in pictures if not file.startswith(".")), key=lambda file: file.rsplit("_", 1)[-1]),
        )

    def tables(self) -> list[Table]:
        """Of all evaluations and comparisons, the newest first."""
        found = {}
        for folder in self._folders():
            for name in _TABLES:
                if (folder / name).is_file() and (table := _table(self._name(folder), _json(folder / name))):
                    found[table.name, name] = (_changed(folder / name), table)
        return [table for _, table in sorted(found.values(), key=lambda pair: -pair[0])]

    def file(self, path: str) -> pathlib.Path | None:
        """`RUN/PICTURE` as a file; None for anything that is not a picture of a run."""
        name, _, picture = path.rpartition("/")
        if name not in self.names() or not picture.endswith(".png"):
            return None
        known = {file.name: file for file in _listed(self._folder / name / _PICTURES)}
        file = known.get(picture)
        return file if file is not None and file.is_file() and not file.is_symlink() else None

    def _name(self, folder: pathlib.Path) -> str:
        return folder.relative_to(self._folder).as_posix()

    def _folders(self) -> Iterator[pathlib.Path]:
        """Those that may hold runs. Links are not followed."""
        waiting = [(self._folder, 0)]
        while waiting:
            folder, depth = waiting.pop()
            yield folder
            if depth < _DEPTH:
                inner = [path for path in _listed(folder) if path.is_dir() and not path.is_symlink()]
                skipped = ("checkpoints", _PICTURES, "tensorboard")
                waiting += [
                    (path, depth + 1) for path in inner if path.name not in skipped and not path.name.startswith(".")
                ]

    def _rows(self, file: pathlib.Path) -> list[dict[str, Any]]:
        try:
            stat = file.stat()
        except OSError:
            return []
        stamp = (stat.st_mtime_ns, stat.st_size)
        if file not in self._read or self._read[file][0] != stamp:
            self._read[file] = (stamp, _read_rows(file))
        return self._read[file][1]


def _read_rows(file: pathlib.Path) -> list[dict[str, Any]]:
    """The lines that are whole. (`metrics.read_metrics` refuses files of which others are damaged.)"""
    rows = []
    with contextlib.suppress(OSError), file.open("rb") as opened:
        for line in opened.read(_MAX_BYTES).splitlines():
            row = _parsed(line)
            step = row.get("step")
            if isinstance(step, int) and not isinstance(step, bool):
                rows.append({name: value for name, value in row.items() if value is None or _is_number(value)})
    return rows


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _json(file: pathlib.Path) -> dict[str, Any]:
    """A file's object; an empty one if it is missing, damaged or something else."""
    with contextlib.suppress(OSError):
        return _parsed(file.read_bytes())
    return {}


def _table(name: str, stored: dict[str, Any]) -> Table | None:
    rows: Any = stored.get("rows")
    samples = stored.get("samples")
    if isinstance(samples, dict):
        rows = [{"name": key, **row} for key, row in samples.items() if isinstance(row, dict)]
    if not isinstance(rows, list):
        return None
    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get("name"), str)]
    columns = [column for column in (*COLUMNS, *_ALSO) if any(_is_number(row.get(column.key)) for row in rows)]
    return Table(name, columns, rows) if rows and columns else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _listed(folder: pathlib.Path) -> Sequence[pathlib.Path]:
    with contextlib.suppress(OSError):
        return sorted(folder.iterdir())
    return ()


def _changed(file: pathlib.Path) -> float:
    with contextlib.suppress(OSError):
        return os.stat(file).st_mtime
    return 0.0
