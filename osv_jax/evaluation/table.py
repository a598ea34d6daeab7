"""The table of a finished plan: rows of numbers, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from osv_jax.evaluation.features import Features
from osv_jax.evaluation.frechet import Score, difference
from osv_jax.evaluation.fvd import fvd
from osv_jax.evaluation.page import Column
from osv_jax.evaluation.parts import Part, load_part, save_part
from osv_jax.evaluation.planning import Method, Plan
from osv_jax.evaluation.protocols import Protocol
from osv_jax.runtime import paths
from osv_jax.runtime.finite import strict_json
from osv_jax.runtime.paths import Path

Row = dict[str, float | str | None]
REAL = "real"
COLUMNS = (
    Column("steps", "steps", "", None, 0),
    Column("nfe", "NFE", "", "low", 0),
    Column("fvd", "FVD", "", "low", 1),
    Column("fvd_more", "FVD above the best", "", None, 1),
    Column("clip_score", "CLIPScore", "", "high", 2),
    Column("lpips", "LPIPS to the condition", "", None, 3),
    Column("motion", "motion", "0-255", None, 2),
    Column("flicker", "flicker", "0-255", None, 2),
    Column("mse", "MSE to the target", "", "low", 4),
    Column("first_frame_psnr", "first frame", "dB", "high", 1),
    Column("seconds", "time a clip", "s", "low", 3),
)
# Of each clip; the table has their mean.
_MEANS = ("clip_score", "motion", "flicker", "lpips", "first_frame_psnr", "mse")
# Below, FVD says more about the number of videos than about them.
FEW = 256
FILES = MARKDOWN, CSV, JSON = ("table.md", "table.csv", "table.json")


def make_rows(plan: Plan, progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> list[Row]:
    """A row for the real clips, and one for each method, of the files that `generate` left.

    Values by the keys of `COLUMNS`; `mse_std` is the deviation of `mse` over the clips, `fvd_low` and `fvd_high` are
    FVD's interval, `fvd_more` is its difference from the least, see `frechet.difference`.

    Args:
        progress: of each bootstrap, see `frechet.score`.
    """
    real = _gathered(plan, None)
    rows: list[Row] = [{"name": REAL, **_means(real)}]
    scores: dict[str, Score] = {}
    for method in plan.methods:
        part, video = _gathered(plan, method), method.video
        row: Row = {"name": method.name, "steps": video.steps, "nfe": video.num_evaluations, **_means(part)}
        row |= {"mse_std": float(part["mse"].std()), "seconds": float(np.median(part["seconds"]))}
        if plan.protocol is not None:
            scores[method.name] = _score(plan, plan.protocol, method, real, part, progress)
            row |= scores[method.name].as_row("fvd")
        rows.append(row)
    if scores:
        best = min(scores.values(), key=lambda score: score.value)
        for row, score in zip(rows[1:], scores.values(), strict=True):
            row |= difference(score, best).as_row("fvd_more") if score is not best else {}
    return rows


def _score(
    plan: Plan,
    protocol: Protocol,
    method: Method,
    real: Part,
    part: Part,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> Score:
    """FVD of a method with its interval, which is kept: draws take long."""
    kept = _kept_score(plan, method)
    if kept is not None:
        return kept
    of_real, of_made = _features(plan, real), _features(plan, part)
    score = fvd(of_real, of_made, protocol, plan.options.bootstrap, plan.options.seed, progress)
    known = {name: value for name, value in dataclasses.asdict(score).items() if value is not None}
    save_part(plan.score_file(method), {name: np.array(value) for name, value in known.items()})
    return score


def _kept_score(plan: Plan, method: Method) -> Score | None:
    kept = load_part(plan.score_file(method))
    if kept is None or "draws" not in kept:  # As it was written once.
        return None
    draws = tuple(kept.pop("draws").tolist())
    return Score(**{name: float(value) for name, value in kept.items()}, draws=draws)


def _gathered(plan: Plan, method: Method | None) -> Part:
    """The small arrays of all clips."""
    names = (*_MEANS, "seconds", "features", "made_with")
    parts = [load_part(plan.file(method, numbers), *names) for numbers in plan.batches()]
    whole = {name: [part[name] for part in parts if part is not None] for name in parts[0] or ()}
    return {name: arrays[0] if name == "made_with" else np.concatenate(arrays) for name, arrays in whole.items()}


def _means(part: Part) -> Row:
    return {name: float(part[name].mean()) for name in _MEANS if name in part}


def _features(plan: Plan, part: Part) -> Features:
    size = (plan.video.height, plan.video.width)
    return Features(part["features"], {size: len(part["features"])}, [], json.loads(str(part["made_with"])))


def describe(plan: Plan) -> list[tuple[str, str]]:
    """How it was measured: names and values."""
    options, video, count = plan.options, plan.video, len(plan.clips)
    about = [
        ("teacher", options.weights),
        ("clips", f"{count} of {options.videos}" + (", as the VAE decodes them" if plan.clips.encoded else "")),
        ("frames", f"{video.num_frames} of {video.height} x {video.width} at {video.fps:g} a second"),
        ("noise", f"seed {options.seed}, the same for all methods of a clip"),
        ("target of the MSE", plan.target.name),
        ("time", f"of the networks, without compiling, in batches of {plan.batch_size}"),
    ]
    if plan.kind.of_prompts:
        about.append(("prompts", options.prompts or "the captions of the clips"))
    if options.clip_weights:
        about.append(("CLIPScore", f"100 max(cos, 0), the mean over all frames; CLIP of {options.clip_weights}"))
    if plan.protocol is None:
        return about
    made_with = json.loads(str(_gathered(plan, None)["made_with"]))
    rate = f", by the protocol {plan.protocol.fps:g} fps" if plan.protocol.fps not in (None, video.fps) else ""
    own = f", by the protocol {plan.protocol.num_frames}" if plan.fvd_frames != plan.protocol.num_frames else ""
    about += [
        ("FVD", f"protocol {plan.protocol.name}, {made_with['network']} with weights {made_with['weights']}"),
        ("FVD's frames", f"the first {plan.fvd_frames}{own}{rate}; {made_with['resize']}"),
        ("FVD's interval", f"95 %, of {options.bootstrap} draws" if options.bootstrap else "none"),
    ]
    return about + ([("warning", few(count))] if count < FEW else [])


def few(count: int, kind: str = "") -> str:
    """What is to be said of so few videos."""
    return f"{count}{kind} videos are few for a covariance; give {FEW} or more."


def shown_columns(rows: Sequence[Row]) -> list[Column]:
    """Those with a number."""
    return [column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)]


def as_markdown(rows: Sequence[Row], about: Sequence[tuple[str, str]] = ()) -> str:
    """The table, and below it how it was measured."""
    columns = shown_columns(rows)
    titles = [column.title + (f" [{column.unit}]" if column.unit else "") for column in columns]
    lines = [["", *titles], ["---"] * (1 + len(columns))]
    lines += [[str(row["name"]).replace("|", "\\|"), *(_cell(row, column) for column in columns)] for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, *(["\n".join(f"- {name}: {value}" for name, value in about)] if about else [])]) + "\n"


def _cell(row: Row, column: Column) -> str:
    value, low, high = (row.get(column.key + end) for end in ("", "_low", "_high"))
    if value is None:
        return ""
    text = _number(value, column.digits)
    return text if low is None else f"{text} ({_number(low, column.digits)} to {_number(high, column.digits)})"


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def as_csv(rows: Sequence[Row]) -> str:
    """Every value in full; what is missing is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_tables(plan: Plan, rows: Sequence[Row], about: Sequence[tuple[str, str]]) -> None:
    """Writes table.md, table.csv and table.json, of which the last says that all is finished.

    table.json has each method's `fvd_draws`, too: those of any two methods give the interval of their difference.
    """
    scores = {method.name: _kept_score(plan, method) for method in plan.methods}
    draws = {name: list(score.draws) for name, score in scores.items() if score is not None}
    description = {"fingerprint": plan.fingerprint(), "about": dict(about), "rows": list(rows), "fvd_draws": draws}
    paths.write_text(plan.output / MARKDOWN, as_markdown(rows, about))
    paths.write_text(plan.output / CSV, as_csv(rows))
    paths.write_text(plan.output / JSON, strict_json(description, indent=2) + "\n")


def is_finished(plan: Plan, files: Sequence[Path]) -> bool:
    """Whether a table was written for the same plan, and these files are there."""
    try:
        stored = json.loads((plan.output / JSON).read_text())
        return stored["fingerprint"] == plan.fingerprint() and all(file.exists() for file in files)
    except (OSError, ValueError, LookupError, TypeError):
        return False
