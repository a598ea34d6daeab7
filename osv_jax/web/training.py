"""The page that shows runs while they train."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import gradio as gr

from osv_jax.evaluation.page import Column
from osv_jax.web import curves
from osv_jax.web.runs import Run, Runs, Table

# Where the server has pictures of runs.
PICTURES = "pictures"
# Between two looks at the runs [s].
_LOOK = 5
_SHOWN_AT_FIRST = 3
# Not drawn unless asked for.
_PLAIN = ("seconds_per_step", "clips_per_second")


def make_page(runs: Runs) -> gr.Blocks:
    """The page. What it asks the server for is read from files; nothing is ever written."""
    with gr.Blocks(title="osv_jax: runs", analytics_enabled=False) as page:
        gr.Markdown("# Runs")
        with gr.Row():
            chosen = gr.CheckboxGroup([], label="Runs", elem_id="runs", scale=3)
            with gr.Column(scale=1, min_width=240):
                metrics = gr.Dropdown([], multiselect=True, label="Metrics (none: all)", elem_id="metrics")
                smoothing = gr.Slider(0, 0.99, 0, step=0.01, label="Smoothing", elem_id="smoothing")
                logarithmic = gr.Checkbox(False, label="Logarithmic", elem_id="logarithmic")
        overview = gr.HTML(elem_id="overview")
        panels = gr.HTML(elem_id="panels")
        gr.Markdown("## Pictures")
        back = gr.Slider(0, 20, 0, step=1, label="So many pictures before the last", elem_id="back")
        pictures = gr.HTML(elem_id="pictures")
        gr.Markdown("## Evaluations")
        tables = gr.HTML(elem_id="tables")
        # What is chosen is only changed here where it has to be: who looks may be choosing at that moment.
        known, timer = gr.State([]), gr.Timer(_LOOK, active=False)

        def draw(
            names: list[str], metrics: list[str], smoothing: float, logarithmic: bool, back: int
        ) -> tuple[str, str, str, str]:
            read = [run for name in names if (run := runs.run(name)) is not None]
            return (
                overview_table(read),
                draw_panels(read, metrics, smoothing, logarithmic),
                draw_pictures(read, int(back)),
                "".join(map(draw_table, runs.tables())),
            )

        def begin() -> tuple[Any, ...]:
            names = runs.names()
            shown = gr.CheckboxGroup(names, value=names[:_SHOWN_AT_FIRST])
            return shown, gr.Dropdown(choices=_metrics(runs, names)), names

        def refresh(names: list[str], *options: Any) -> tuple[Any, ...]:
            *drawn, before = options
            there = runs.names()
            kept = [name for name in names if name in there]
            boxes = gr.skip() if sorted(there) == sorted(before) else gr.CheckboxGroup(there)
            if kept != names:
                boxes = gr.CheckboxGroup(there, value=kept)
            return boxes, gr.Dropdown(choices=_metrics(runs, there)), there, *draw(kept, *drawn)

        quick: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        inputs: list[Any] = [chosen, metrics, smoothing, logarithmic, back]
        outputs = [overview, panels, pictures, tables]
        first = page.load(begin, outputs=[chosen, metrics, known], **quick).then(draw, inputs, outputs, **quick)
        first.then(lambda: gr.Timer(active=True), outputs=timer, **quick)
        for control in inputs:
            control.input(draw, inputs, outputs, **quick)
        timer.tick(refresh, [*inputs, known], [chosen, metrics, known, *outputs], **quick)
    return page


def _metrics(runs: Runs, names: list[str]) -> list[str]:
    """Of all runs, in alphabetical order."""
    read = [run for name in names if (run := runs.run(name)) is not None]
    return sorted({name for run in read for row in run.rows for name in row} - {"step"})


def overview_table(runs: list[Run]) -> str:
    """How far each run is, and what was last measured of it, with the colour of its curves."""
    if not runs:
        return '<p class="empty">No run is chosen.</p>'
    measured = sorted({name for run in runs for row in run.rows for name in row if name.startswith("eval_")})
    head = ["Run", "Objective", "State", "Step", *measured]
    lines = []
    for number, run in enumerate(runs):
        mark = f'<i style="background:{_colour(number)}"></i>'
        step = f"{run.step}" + (f" of {run.num_steps}" if run.num_steps else "")
        last = [run.curve(name)[-1:] for name in measured]
        values = [f"{curve[0][1]:.4g}" if curve and math.isfinite(curve[0][1]) else "" for curve in last]
        cells = [html.escape(text) for text in (run.name, run.objective, run.state, step, *values)]
        lines.append([mark + cells[0], *cells[1:]])
    return _table(head, lines, "key")


def draw_panels(runs: list[Run], metrics: list[str], smoothing: float, logarithmic: bool) -> str:
    """A panel for each metric, in which all runs' curves lie over one another."""
    known = {name: None for run in runs for row in run.rows for name in row if name not in ("step", *_PLAIN)}
    made = []
    for name in metrics or known:
        drawn: dict[str, tuple[str, curves.Points]] = {
            run.name: (_colour(number), curves.smoothed(points, smoothing))
            for number, run in enumerate(runs)
            if (points := run.curve(name))
        }
        made.append(curves.panel(name, drawn, logarithmic))
    return f'<div class="panels">{"".join(made)}</div>'


def draw_pictures(runs: list[Run], back: int) -> str:
    """Of each run a picture, so many before its last."""
    figures = []
    for run in runs:
        if run.pictures:
            name = run.pictures[max(0, len(run.pictures) - 1 - back)]
            source = quote(f"{PICTURES}/{run.name}/{name}")
            caption = html.escape(f"{run.name}: {name}")
            figures.append(
                f"<figure><figcaption>{caption}</figcaption>"
                f'<img src="{source}" alt="{caption}" loading="lazy"></figure>'
            )
    return f'<div class="pictures">{"".join(figures)}</div>'


def draw_table(table: Table) -> str:
    """What was evaluated, as it was written."""
    head = ["", *(column.title + (f" [{column.unit}]" if column.unit else "") for column in table.columns)]
    lines = [[html.escape(row["name"]), *(_cell(row, column) for column in table.columns)] for row in table.rows]
    return f"<h3>{html.escape(table.name)}</h3>{_table(head, lines)}"


def _cell(row: Mapping[str, Any], column: Column) -> str:
    values = [row.get(column.key + end) for end in ("", "_low", "_high")]
    texts = [
        f"{value:.{column.digits}f}" if isinstance(value, int | float) and math.isfinite(value) else ""
        for value in values
    ]
    return f"{texts[0]} ({texts[1]} to {texts[2]})" if texts[1] and texts[2] else texts[0]


def _table(head: list[str], lines: list[list[str]], kind: str = "") -> str:
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f'<div class="scroll {kind}"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _colour(number: int) -> str:
    return curves.COLOURS[number % len(curves.COLOURS)]
