"""Curves of several runs over one another, as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

# Of a panel [px of its own].
_WIDTH, _HEIGHT = 420, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 22, 24, 26
# More points of a curve could not be told apart.
_POINTS = 400
# Told apart by people who do not see all colours, too (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#8c510a")
Points = Sequence[tuple[float, float]]


def panel(title: str, curves: Mapping[str, tuple[str, Points]], logarithmic: bool = False) -> str:
    """A metric's curves in one frame.

    Args:
        curves: by run, a colour, and steps and values. Values that are not finite, or of logarithms not above 0, leave
            gaps.
    """
    reduced = {run: (colour, _reduced(points, logarithmic)) for run, (colour, points) in curves.items()}
    finite = [point for _, points in reduced.values() for point in points if math.isfinite(point[1])]
    if not finite:
        return ""
    steps, values = zip(*finite, strict=True)
    x_low, x_high = _wide(min(steps), max(steps))
    y_low, y_high = _wide(min(values), max(values))

    def at(step: float, value: float) -> str:
        x = _LEFT + (step - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - (value - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    drawn = []
    for tick in _ticks(y_low, y_high, 4):
        (x, y), (end, _) = at(x_low, tick).split(","), at(x_high, tick).split(",")
        label = f"{10**tick:.3g}" if logarithmic else f"{tick:.4g}"
        drawn.append(f'<path class="grid" d="M{x},{y}H{end}"/><text x="{_LEFT - 5}" y="{y}" dy="4" text-anchor="end">')
        drawn.append(f"{label}</text>")
    for tick in _ticks(x_low, x_high, 5):
        x, _ = at(tick, y_low).split(",")
        drawn.append(f'<text x="{x}" y="{_HEIGHT - 8}" text-anchor="middle">{tick:.6g}</text>')
    for run, (colour, points) in reduced.items():
        for piece in _pieces(points):
            places = [at(*point) for point in piece]
            path = f"M{'L'.join(places)}" if len(places) > 1 else f"M{places[0]}h0.1"
            drawn.append(
                f'<path class="curve" d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"'
                f' stroke-linecap="round"><title>{html.escape(run)}</title></path>'
            )
    name = html.escape(title)
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}"><text x="{_LEFT}" y="14">{name}'
        f"</text>{''.join(drawn)}</svg></figure>"
    )


def smoothed(points: Points, weight: float) -> list[tuple[float, float]]:
    """A running mean (EMA) of `weight` for what was before, without the pull of its beginning, as TensorBoard's."""
    made, mean, total = [], 0.0, 0.0
    for step, value in points:
        if math.isfinite(value):
            mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
            value = mean / total
        made.append((step, value))
    return made


def _reduced(points: Points, logarithmic: bool) -> list[tuple[float, float]]:
    """At most so many points as can be told apart: means of neighbours, a gap where all of them are one."""
    if logarithmic:
        points = [(step, math.log10(value) if value > 0 else math.nan) for step, value in points]
    size = -(-len(points) // _POINTS)
    if size <= 1:
        return list(points)
    made = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        values = [value for _, value in group if math.isfinite(value)]
        made.append((group[len(group) // 2][0], sum(values) / len(values) if values else math.nan))
    return made


def _pieces(points: Points) -> list[list[tuple[float, float]]]:
    """What lies between gaps."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _wide(low: float, high: float) -> tuple[float, float]:
    """Bounds that differ."""
    room = abs(low) * 0.1 or 0.5
    return (low, high) if high - low > 1e-9 * room else (low - room, high + room)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers in an interval: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]
