"""What a run writes about itself: a JSON line per step, TensorBoard, pictures, and curves drawn from the lines."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

import numpy as np
from jaxtyping import UInt8

from osv_jax.errors import UserError
from osv_jax.runtime import paths
from osv_jax.runtime.finite import strict_json
from osv_jax.runtime.media import write_picture
from osv_jax.runtime.paths import as_path, in_bucket
from osv_jax.runtime.ranges import FINITE, WHOLE

_LINES = "metrics.jsonl"
_BOARD = "tensorboard"
_PICTURES = "pictures"
# TensorBoard shows what was written this long ago [s].
_SHOW_SECONDS = 10
# In a bucket, what grows is uploaded whole, again and again: after this time [s] at the earliest, and so that it takes
# no more than this share of the time.
_UPLOAD_SECONDS, _UPLOAD_SHARE = 60, 0.05


class MetricsWriter:
    """Writes `metrics.jsonl`, `tensorboard/` and `pictures/` in a run's folder; does nothing on other processes.

    Args:
        workdir: the folder of the run, created if need be.
        step: the step a run resumes at (0 for a new one). What was written about later steps is dropped, because
            those steps are about to be repeated; so is a last line that a kill cut short.
        process_index: only process 0 writes.
    """

    def __init__(self, workdir: str | os.PathLike, step: int = 0, process_index: int = 0):
        self._active = process_index == 0
        if not self._active:
            return
        self._workdir = as_path(workdir)
        (self._workdir / _PICTURES).mkdir(parents=True, exist_ok=True)
        # Nothing in a bucket can be appended to: what grows is written here, and uploaded by `flush`.
        self._scratch = tempfile.TemporaryDirectory() if in_bucket(self._workdir) else None
        self._folder = pathlib.Path(self._scratch.name) if self._scratch else self._workdir
        self._flushed, self._flush_seconds = time.monotonic(), 0.0
        lines = self._workdir / _LINES
        if lines.exists():
            kept = [row for row in read_metrics(lines) if row["step"] <= step]
            paths.write_text(self._folder / _LINES, "".join(strict_json(row) + "\n" for row in kept))
        self._file = (self._folder / _LINES).open("a")
        self._board = _Board(self._folder / _BOARD, step)

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Appends one line `{"step": step, **metrics}`. JSON has no NaN or infinity: they are written as null."""
        if not self._active:
            return
        values = {name: float(value) for name, value in metrics.items()}
        self._file.write(strict_json({"step": int(step), **values}) + "\n")
        self._file.flush()
        self._board.write(step, values)
        if time.monotonic() - self._flushed > max(_UPLOAD_SECONDS, self._flush_seconds / _UPLOAD_SHARE):
            self.flush()

    def write_picture(self, name: str, step: int, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Saves `pictures/{name}_{step}.png`, the step in seven digits so that the files sort, and shows it."""
        if not self._active:
            return
        write_picture(self._workdir / _PICTURES / f"{name}_{step:07d}.png", image)
        self._board.write_picture(step, name, image)

    def flush(self) -> None:
        """To be called before others read what has been written: uploads it, if the run's folder is in a bucket."""
        if not self._active or not self._scratch:
            return
        begin = time.monotonic()
        self._board.flush()
        for name in paths.files_below(self._folder):
            paths.copy_file(self._folder / name, self._workdir / name)
        self._flushed = time.monotonic()
        self._flush_seconds = self._flushed - begin

    def close(self) -> None:
        if not self._active:
            return
        # A full disk may refuse any of these.
        with contextlib.ExitStack() as ending:
            if self._scratch:
                ending.callback(self._scratch.cleanup)
            ending.callback(self._board.close)
            ending.callback(self.flush)
            ending.callback(self._file.close)


class _Board:
    """TensorBoard's events, written by the thread that calls: one of tensorboardX's own ends with the first error, and
    whoever gives it more waits for ever.

    Args:
        step: what has been written about later ones is not shown any more.
    """

    def __init__(self, folder: pathlib.Path, step: int):
        # It imports torch where there is one, which takes longer than all else.
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._summary, self._event = summary, Event
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{step}"
        self._file, self._flushed = RecordWriter(os.path.abspath(folder / name)), time.monotonic()
        self._write(0, file_version="brain.Event:2")
        self._write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write(step, summary=self._summary.scalar(name, value))
        if time.monotonic() - self._flushed > _SHOW_SECONDS:
            self.flush()

    def write_picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        self._write(step, summary=self._summary.image(name, image, dataformats="HWC"))

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), step=step, **content).SerializeToString())


def read_metrics(jsonl: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, without an incomplete last one.

    Raises:
        UserError: if the file is missing, or a line before the last is no row.
    """
    path = as_path(jsonl)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the metrics.jsonl in the folder of a run.")
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise UserError(f"Line {number} of {path} is no JSON of a step's metrics; delete that line.")
    return rows


def _row(line: bytes) -> dict[str, float | None] | None:
    """What a line says, or None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and row.get("step") in WHOLE
    return row if is_row and all(value is None or value in FINITE for value in row.values()) else None


def loss_curves(jsonl: str | os.PathLike, png: str | os.PathLike, names: Sequence[str]) -> None:
    """Draws each chosen metric over the steps, one panel below the other. Values that are not finite leave gaps.

    Raises:
        UserError: if the file cannot be read, or no row has one of the metrics.
    """
    rows = read_metrics(jsonl)
    available = sorted({name for row in rows for name in row} - {"step"})
    for name in names:
        if name not in available:
            raise UserError(f"{jsonl} has no metric {name!r}; choose among {', '.join(available) or 'none (empty)'}.")
    # A third of what importing this program takes; only what draws needs it.
    from matplotlib.figure import Figure

    # A Figure of its own, not pyplot: nothing global, no display, safe in threads.
    # Fixed margins: to have them measured takes as long as all the drawing, for which a run waits.
    height = 2.4 * len(names)
    figure = Figure(figsize=(8, height))
    figure.subplots_adjust(left=0.12, right=0.98, bottom=0.55 / height, top=1 - 0.15 / height, hspace=0.12)
    panels = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for name, panel in zip(names, panels, strict=True):
        points = [(row["step"], row[name]) for row in rows if name in row]
        steps = [step for step, _ in points]
        values = [math.nan if value is None else value for _, value in points]
        panel.plot(steps, values, linewidth=1, marker="." if len(points) < 50 else None)
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
    figure.align_ylabels(panels)
    panels[-1].set_xlabel("step")
    with paths.new_file(as_path(png)) as file:
        figure.savefig(file, dpi=120, format="png")


def progress_line(
    step: int, num_steps: int, seconds_per_step: float, batch_size: int, metrics: Mapping[str, SupportsFloat]
) -> str:
    """One line for a person: `step 12/2000  loss 0.123  1.6 clips/s  ETA 1h02m`.

    Args:
        step, num_steps: steps done, and to do in all.
        seconds_per_step: wall time [s] of a step.
        batch_size: clips in a step, over all processes.
        metrics: the values to show, in this order, with three significant digits.
    """
    shown = [f"{name} {float(value):.3g}" for name, value in metrics.items()]
    rate = f"{batch_size / seconds_per_step:.3g} clips/s"
    left = f"ETA {_duration((num_steps - step) * seconds_per_step)}"
    return "  ".join([f"step {step}/{num_steps}", *shown, rate, left])


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
