"""What a run writes about itself: a JSON line per step, TensorBoard, pictures, and curves drawn from the lines."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import SupportsFloat

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from osv_jax.errors import UserError
from osv_jax.runtime.finite import strict_json


class MetricsWriter:
    """Writes `metrics.jsonl`, `tensorboard/` and `pictures/` in a run's folder; does nothing on other processes.

    Args:
        workdir: the folder of the run, created if need be.
        step: the step a run resumes at (0 for a new one). What was written about later steps is dropped, because
            those steps are about to be repeated; so is a last line that a kill cut short.
        process_index: only process 0 writes.
    """

    def __init__(self, workdir: str | pathlib.Path, step: int = 0, process_index: int = 0):
        self._active = process_index == 0
        if not self._active:
            return
        # It imports torch where there is one, which takes longer than all else.
        from tensorboardX import SummaryWriter

        self._pictures = pathlib.Path(workdir) / "pictures"
        self._pictures.mkdir(parents=True, exist_ok=True)
        path = pathlib.Path(workdir) / "metrics.jsonl"
        if path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(strict_json(row) + "\n" for row in kept))
            temporary.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(pathlib.Path(workdir) / "tensorboard"), purge_step=step + 1, flush_secs=10)

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Appends one line `{"step": step, **metrics}`. JSON has no NaN or infinity: they are written as null."""
        if not self._active:
            return
        values = {name: float(value) for name, value in metrics.items()}
        self._file.write(strict_json({"step": int(step), **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def write_picture(self, name: str, step: int, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Saves `pictures/{name}_{step}.png`, the step in seven digits so that the files sort, and shows it."""
        if not self._active:
            return
        Image.fromarray(image).save(self._pictures / f"{name}_{step:07d}.png")
        self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        if self._active:
            self._file.close()
            self._board.close()


def read_metrics(jsonl: str | pathlib.Path) -> list[dict[str, float | None]]:
    """The rows of a `metrics.jsonl`, without an incomplete last one.

    Raises:
        UserError: if the file is missing, or a line before the last is no JSON.
    """
    path = pathlib.Path(jsonl)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the metrics.jsonl in the folder of a run.")
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"Line {number} of {path} is no JSON; delete that line.") from error
    return rows


def loss_curves(jsonl: str | pathlib.Path, png: str | pathlib.Path, names: Sequence[str]) -> None:
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
    figure.savefig(png, dpi=120)


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
