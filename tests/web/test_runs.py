"""Runs are read while they are written, whatever state their files are in, and drawn over one another."""

import json
import math
import os
import re

import pytest

from osv_jax.web import curves
from osv_jax.web.runs import Runs


def write(folder, text, **config):
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "config.json").write_text(json.dumps(config))


def test_lines_that_are_damaged_or_half_written_are_left_out(tmp_path):
    rows = [
        '{"step": 1, "loss": 2}',
        "no",
        "[1]",
        '{"step": true}',
        '{"step": "1"}',
        '{"loss": 1}',
        "9" * 5000,
        "[" * 99999,
    ]
    rows += ['{"step": 2, "loss": null, "text": "a", "list": [1], "huge": 1e999}', '{"step": 3, "lo']
    write(tmp_path / "a", "\n".join(rows).encode() + b"\xff\x00", num_steps=10, objective="stage1")
    run = Runs(tmp_path).run("a")
    assert run.rows == [{"step": 1, "loss": 2}, {"step": 2, "loss": None}]
    assert run.step == 2 and run.state == "running" and (run.num_steps, run.objective) == (10, "stage1")
    (first, second) = run.curve("loss")
    assert first == (1, 2) and second[0] == 2 and math.isnan(second[1])


def test_states_order_and_names(tmp_path):
    for age, (name, steps) in enumerate({"deep/er/new": 3, "done": 10, "old": 2}.items()):
        write(tmp_path / name, f'{{"step": {steps}}}\n', num_steps=10)
        os.utime(tmp_path / name / "metrics.jsonl", (2e9 - 1e9 * age,) * 2)
    (tmp_path / "deep" / "link").symlink_to(tmp_path)
    runs = Runs(tmp_path)
    assert runs.names() == ["deep/er/new", "done", "old"]
    assert [runs.run(name).state for name in runs.names()] == ["running", "finished", "stopped"]
    assert runs.run("..") is None and runs.run("other") is None


def test_files_are_read_again_when_they_grow(tmp_path):
    write(tmp_path / "a", '{"step": 1}\n')
    runs = Runs(tmp_path)
    assert runs.run("a").step == 1
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2}\n')
    assert runs.run("a").step == 2


def test_pictures_alone_are_files(tmp_path):
    write(tmp_path / "a", "")
    for name in ("x_0000010.png", "x_0000002.png", ".hidden.png", "notes.txt"):
        (tmp_path / "a" / "pictures" / name).write_text("")
    (tmp_path / "a" / "pictures" / "link.png").symlink_to("/etc/passwd")
    runs = Runs(tmp_path)
    assert runs.run("a").pictures[:2] == ["x_0000002.png", "x_0000010.png"]
    assert runs.file("a/x_0000002.png") == tmp_path / "a" / "pictures" / "x_0000002.png"
    for path in ("a/link.png", "a/notes.txt", "a/../a/x_0000002.png", "b/x_0000002.png", "a/pictures/x_0000002.png"):
        assert runs.file(path) is None


def test_tables_of_evaluations_and_comparisons(tmp_path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "table.json").write_text('{"rows": [{"name": "a", "fvd": 2.5, "mse": null}, 3]}')
    (tmp_path / "e" / "measured.json").write_text('{"samples": {"b": {"mse": 1, "evaluations": 2}}}')
    tables = {tuple(column.key for column in table.columns): table.rows for table in Runs(tmp_path).tables()}
    assert tables == {("fvd",): [{"name": "a", "fvd": 2.5, "mse": None}], ("mse", "evaluations"): [
        {"name": "b", "mse": 1, "evaluations": 2}
    ]}  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "[]", '{"rows": 3}', '{"rows": []}', '{"rows": [{"name": 3}]}', '{"samples": {"a": 1}}']
)
def test_damaged_tables_are_left_out(text, tmp_path):
    (tmp_path / "table.json").write_text(text)
    assert Runs(tmp_path).tables() == []


def test_a_panel_has_a_curve_for_each_run_with_gaps():
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, 4.0), (5, 5.0), (6, math.nan), (7, 7.0)]
    drawn = curves.panel("<loss>", {"a&b": ("red", points), "c": ("blue", [(1, 0.0), (7, 0.0)])})
    assert "&lt;loss&gt;" in drawn and "a&amp;b" in drawn
    assert drawn.count('stroke="red"') == 3 and drawn.count('stroke="blue"') == 1
    # Of a logarithm, zero is a gap.
    assert curves.panel("l", {"c": ("blue", [(1, 0.0), (7, 0.0)])}, logarithmic=True) == ""
    labels = re.findall(r'text-anchor="end">([^<]*)<', curves.panel("l", {"a": ("red", [(1, 0.1), (2, 1000)])}, True))
    assert labels and {float(label) for label in labels} <= {0.1, 1, 10, 100, 1000}


@pytest.mark.parametrize("value", [0.0, 5.0, 1e30, -1e-30])
def test_a_single_or_constant_value_is_drawn(value):
    assert 'class="curve"' in curves.panel("l", {"a": ("red", [(3, value)])})
    assert 'class="curve"' in curves.panel("l", {"a": ("red", [(3, value), (4, value)])})


def test_long_curves_are_reduced_to_means():
    (path,) = re.findall(r' d="(M[^"]*L[^"]*)"', curves.panel("l", {"a": ("red", [(i, i % 2) for i in range(10_000)])}))
    assert path.count("L") < 400


def test_smoothing_is_a_running_mean_without_the_pull_of_its_beginning():
    points = [(1, 4.0), (2, 0.0), (3, math.nan), (4, 4.0)]
    assert curves.smoothed(points, 0.0)[:2] == points[:2]
    made = curves.smoothed(points, 0.5)
    assert made[0] == (1, 4.0) and made[1][1] == pytest.approx(4 / 3) and math.isnan(made[2][1])
