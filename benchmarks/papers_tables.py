"""OSV's Tables 1 and 2: their lines with the paper's FVD, what its text claims, and whether that was found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from osv_jax.evaluation.frechet import Score, difference

# Of a normal distribution, within which 95 % lie [standard deviations].
_NORMAL_95 = 1.96


@dataclasses.dataclass(frozen=True)
class Way:
    """A row of the evaluation: a student (or the teacher) and how it is sampled."""

    name: str
    student: str = ""
    sampler: str = "consistency"
    steps: int = 1
    guidance: float = 3.0


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the tables: its name, the ways whose mean it is, and the paper's FVD, if it is in the paper."""

    table: str
    name: str
    ways: tuple[str, ...]
    paper: float | None


def plan_rows(seeds: int) -> tuple[list[Way], list[Line]]:
    """What is evaluated, and the lines of both tables, with the paper's numbers."""
    ways: list[Way] = []
    lines: list[Line] = []

    def add(table: str, name: str, paper: float | None, *of: Way) -> None:
        ways.extend(way for way in of if way not in ways)
        lines.append(Line(table, name, tuple(way.name for way in of), paper))

    for steps, paper in ((25, 156.94), (8, 229.94), (2, 1015.25), (1, 1177.34)):
        add("1", f"teacher, {_steps(steps)}", paper, Way(f"teacher, {_steps(steps)}", "", "euler", steps))
    # What every student begins as: that it is better shows that something was learned.
    add("1", "untrained student, 1 step", None, Way("untrained student, 1 step"))
    for steps, paper in ((8, 184.79), (4, 405.80), (2, 575.33), (1, 997.94)):
        name = f"AnimateLCM, {_steps(steps)}"
        add("1", name, paper, Way(name, "animatelcm", steps=steps))
    add("1", "SF-V, 1 step", 425.68, Way("SF-V, 1 step", "sf_v"))
    kinds = {"1 step": ("consistency", 1), "1 step + TTS": ("tts", 1), "2 steps": ("consistency", 2)}
    osv = {
        kind: [Way(f"OSV, {kind}, seed {seed}", f"osv_{seed}", *how) for seed in range(seeds)]
        for kind, how in kinds.items()
    }
    for (kind, of), paper in zip(osv.items(), (335.36, 171.15, 181.95), strict=True):
        add("1", f"OSV, {kind}", paper, *of)
    # Table 2's baselines are OSV of the first seed, by TTS; (f) has no TTS.
    tts, plain = osv["1 step + TTS"][0], osv["1 step"][0]

    def ablation(letter: str, name: str, paper: float, student: str = "", **how: Any) -> None:
        how = {"sampler": "tts", **how}
        add(f"2{letter}", name, paper, Way(f"({letter}) {name}", student or letter, **how))

    ablation("a", "1 solver step", 332.25)
    add("2a", "5 solver steps", 171.15, tts)
    ablation("b", "without stage 1", 221.75)
    add("2b", "with stage 1", 171.15, tts)
    # ("All settings have the same NFE": two.)
    ablation("c", "without stage 2, 2 steps instead of TTS", 298.35, sampler="consistency", steps=2)
    ablation("c", "without stage 2", 234.13)
    add("2c", "with stage 2", 171.15, tts)
    ablation("d", "without adversarial training", 405.41)
    add("2d", "with adversarial training", 171.15, tts)
    ablation("e", "VAE decoder", 232.25)
    add("2e", "no VAE decoder", 171.15, tts)
    ablation("f", "guidance 3", 531.23, "osv_0", sampler="euler", guidance=3.0)
    ablation("f", "guidance 1.5", 426.71, "osv_0", sampler="euler", guidance=1.5)
    add("2f", "no guidance", 335.36, plain)
    ablation("g", "stage 1 at the low resolution", 455.35)
    add("2g", "stage 1 at the high resolution", 388.86, Way("(c) without stage 2", "c", "tts"))
    ablation("h", "stage 2 at the high resolution", 173.14)
    add("2h", "stage 2 at both resolutions", 171.15, tts)
    return ways, lines


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"


# What the paper claims: in a table the first line is better than the second.
CLAIMS = (
    ("1", "teacher, 25 steps", "OSV, 1 step"),
    ("1", "OSV, 1 step + TTS", "OSV, 2 steps"),
    ("1", "OSV, 1 step + TTS", "OSV, 1 step"),
    ("1", "OSV, 2 steps", "OSV, 1 step"),
    ("1", "OSV, 1 step", "SF-V, 1 step"),
    ("1", "SF-V, 1 step", "AnimateLCM, 1 step"),
    ("2a", "5 solver steps", "1 solver step"),
    ("2b", "with stage 1", "without stage 1"),
    ("2c", "with stage 2", "without stage 2"),
    ("2c", "without stage 2", "without stage 2, 2 steps instead of TTS"),
    ("2d", "with adversarial training", "without adversarial training"),
    ("2e", "no VAE decoder", "VAE decoder"),
    ("2f", "no guidance", "guidance 1.5"),
    ("2f", "guidance 1.5", "guidance 3"),
    ("2g", "stage 1 at the high resolution", "stage 1 at the low resolution"),
    ("2h", "stage 2 at both resolutions", "stage 2 at the high resolution"),
)


def results(table: Mapping[str, Any], lines: Sequence[Line], clips: int) -> dict[str, Any]:
    """The lines of both tables, measured, and whether each claim holds.

    A line's value is the mean over its ways (seeds), its interval the least that holds all of theirs. FVD's are those
    of the bootstrap, the squared error's the mean's +- 1.96 standard errors. A claim is decided by the difference of
    its two lines: of the same seed's student where both are of one, else of every pair of ways. The interval is the
    least that holds all of theirs, so that what holds does so for every seed.

    Args:
        table: table.json of `osv_jax.evaluate table`.
        clips: in it.
    """
    measure = "fvd" if "fvd" in table["rows"][-1] else "mse"
    scores = _fvd(table) if measure == "fvd" else _mse(table, clips)
    measured, claims = [], []
    for line in lines:
        of = [scores[name] for name in line.ways]
        entry = {"table": line.table, "name": line.name, **_together(of)}
        measured.append(entry | {"seeds": [score.value for score in of], "paper": line.paper})
    by_name = {(line.table, line.name): line.ways for line in lines}
    for name, better, worse in CLAIMS:
        pairs = _pairs(by_name[name, worse], by_name[name, better])
        more = _together([_difference(scores[a], scores[b], measure) for a, b in pairs])
        claims.append({"table": name, "better": better, "worse": worse, **more, "verdict": verdict(more)})
    return {"measure": measure, "clips": clips, "lines": measured, "claims": claims, "about": table["about"]}


def _fvd(table: Mapping[str, Any]) -> dict[str, Score]:
    return {
        row["name"]: Score(row["fvd"], row["fvd_low"], row["fvd_high"], tuple(table["fvd_draws"][row["name"]]))
        for row in table["rows"]
        if "fvd" in row
    }


def _mse(table: Mapping[str, Any], clips: int) -> dict[str, Score]:
    errors = {row["name"]: _NORMAL_95 * row["mse_std"] / clips**0.5 for row in table["rows"] if "mse" in row}
    values = {row["name"]: row["mse"] for row in table["rows"]}
    return {name: Score(values[name], values[name] - error, values[name] + error) for name, error in errors.items()}


def _pairs(ways: Sequence[str], others: Sequence[str]) -> list[tuple[str, str]]:
    """Those of the same seed where both lines have one way for each, else every pair."""
    if len(ways) == len(others):
        return list(zip(ways, others, strict=True))
    return [(way, other) for way in ways for other in others]


def _difference(score: Score, other: Score, measure: str) -> Score:
    if measure == "fvd":
        return difference(score, other)
    value = score.value - other.value
    error = math.hypot(_interval(score)[1] - score.value, _interval(other)[1] - other.value)
    return Score(value, value - error, value + error)


def _together(scores: Sequence[Score]) -> dict[str, float]:
    """Their mean, and the least interval that holds all of theirs."""
    lows, highs = zip(*map(_interval, scores), strict=True)
    return {"value": sum(score.value for score in scores) / len(scores), "low": min(lows), "high": max(highs)}


def _interval(score: Score) -> tuple[float, float]:
    assert score.low is not None and score.high is not None, "made without draws, or of one clip"
    return score.low, score.high


def verdict(more: Mapping[str, float]) -> str:
    """Whether one line is better than another by what the other has more, as far as its interval says."""
    if more["low"] > 0:
        return "holds"
    return "turned round" if more["high"] < 0 else "not told apart"


def as_markdown(found: Mapping[str, Any], commands: Sequence[str]) -> str:
    """Tables, claims, how it was measured, and every command."""
    title, digits = {"fvd": ("FVD", 1), "mse": ("MSE to the teacher", 4)}[found["measure"]]
    text = [f"| table | | {title} | 95 % interval | of each seed | FVD in the paper |", "|---|---|---|---|---|---|"]
    for line in found["lines"]:
        seeds = ", ".join(f"{value:.{digits}f}" for value in line["seeds"]) if len(line["seeds"]) > 1 else ""
        interval = f"{line['low']:.{digits}f} to {line['high']:.{digits}f}"
        paper = "" if line["paper"] is None else f"{line['paper']:.2f}"
        cells = (line["table"], line["name"], f"{line['value']:.{digits}f}", interval, seeds, paper)
        text.append(f"| {' | '.join(cells)} |")
    text += ["", f"| table | better, says the paper | worse | its {title} is more by | here |", "|---|---|---|---|---|"]
    for claim in found["claims"]:
        more = f"{claim['value']:.{digits}f} ({claim['low']:.{digits}f} to {claim['high']:.{digits}f})"
        text.append(f"| {claim['table']} | {claim['better']} | {claim['worse']} | {more} | {claim['verdict']} |")
    text += ["", *(f"- {name}: {value}" for name, value in found["about"].items()), "", "```bash", *commands, "```"]
    return "\n".join(text) + "\n"
