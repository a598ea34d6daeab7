"""The losses of many runs in one picture."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

import numpy as np

from osv_jax.runtime import metrics, paths

# What is drawn of the runs that have it: title, metric, scale.
_PANELS = (
    ("teacher", "loss", "log"),
    ("students: distance to their targets", "loss_huber", "log"),
    ("discriminators", "loss_disc", "linear"),
)
# Single steps are of single clips and noise levels, and differ by more than the runs do.
_SMOOTHED = 0.05


def draw(workdirs: Sequence[pathlib.Path], png: pathlib.Path) -> None:
    """Draws the losses of runs over their steps, each the mean of the last twentieth of its run's steps.

    Args:
        workdirs: of `osv_jax.train`; a run's name is its folder's.
        png: the file, which is written whole or not at all.

    Raises:
        UserError: a run's metrics.jsonl is not there, or damaged.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    runs = {workdir.name: metrics.read_metrics(workdir / "metrics.jsonl") for workdir in workdirs}
    figure = Figure(figsize=(9, 3 * len(_PANELS)), layout="constrained")
    for panel, (title, metric, scale) in zip(figure.subplots(len(_PANELS)), _PANELS, strict=True):
        for number, (name, rows) in enumerate(runs.items()):
            values = [row[metric] for row in rows if metric in row]
            if values:
                smooth = running_mean([math.nan if value is None else value for value in values], _SMOOTHED)
                steps = [row["step"] for row in rows if metric in row]
                panel.plot(steps, smooth, label=name, linewidth=1, color=colormaps["tab20"](number % 20))
        panel.set(title=title, xlabel="step", yscale=scale)
        panel.grid(alpha=0.3)
        if len(panel.lines) > 1:
            panel.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    with paths.new_file(png) as file:
        figure.savefig(file, dpi=110, format="png")


def running_mean(values: Sequence[float], part: float) -> np.ndarray:
    """Of every value and those before it, as many as are `part` of all; what is NaN does not count."""
    width = max(1, round(part * len(values)))
    known = np.isfinite(values)
    sums, counts = (np.cumsum([0.0, *each]) for each in (np.where(known, values, 0), known))
    first = np.maximum(np.arange(len(values)) - width + 1, 0)
    count = counts[1:] - counts[first]
    return np.where(count > 0, (sums[1:] - sums[first]) / np.maximum(count, 1), math.nan)
