"""The benchmark of the paper's orderings: what it would train, that it goes on where it was stopped, what it finds."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from osv_jax import evaluate
from osv_jax.errors import UserError
from osv_jax.evaluation.options import methods_of, read_options
from osv_jax.runtime import command_line
from osv_jax.training.config import check_config

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # in ml_collections
BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def orderings(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("orderings")


@pytest.fixture
def programs(orderings):
    """What the benchmark calls, by name."""
    return importlib.import_module("programs_in_steps").PROGRAMS


@pytest.fixture
def called(programs, monkeypatch):
    """Names of what is trained, prepared and evaluated, by programs that do nothing else."""
    names = []

    def table(arguments):
        assert arguments[0] == "table"
        config = command_line.read_config(arguments[1:])
        methods = methods_of(read_options(config))
        names.append("table")
        rows = [{"name": m.name, "mse": float(i), "mse_std": 0.1} for i, m in enumerate(methods)]
        folder = pathlib.Path(config.output)
        folder.mkdir()
        (folder / "table.json").write_text(json.dumps({"rows": rows, "about": {"clips": "2 of the world"}}))

    for program in programs:
        monkeypatch.setitem(programs, program, lambda arguments: names.append(arguments[1].split("/")[-1]))
    monkeypatch.setattr(evaluate, "main", table)
    return names


def configurations(orderings, name, folder):
    """Every step, and the configuration of those that train."""
    steps = {step.name: step for step in orderings.plan_steps(orderings.SIZES[name], folder)}
    configs = {
        step.name: command_line.read_config([a for a in step.arguments if not a.startswith("--workdir")])
        for step in steps.values()
        if step.program == "train"
    }
    return steps, configs


@pytest.mark.parametrize("name", ["tiny", "full"])
def test_every_row_is_trained_by_a_configuration_that_holds(orderings, name, tmp_path):
    size = orderings.SIZES[name]
    steps, configs = configurations(orderings, name, tmp_path)
    for config in configs.values():
        check_config(config)
    before = list(steps)
    assert all(set(step.after) <= set(before[: before.index(step.name)]) for step in steps.values())
    students = {n: c for n, c in configs.items() if n not in ("teacher", *(s for s in configs if s[:6] == "stage1"))}
    ways, _ = orderings.plan_rows(size.seeds)
    assert {way.student for way in ways} - {""} == set(students)
    for student, config in students.items():
        start = pathlib.Path(config.init_from).name
        steps_of_all_stages = config.num_steps + (configs[start].num_steps if start else 0)
        clips = steps_of_all_stages * config.batch_size
        assert clips == size.student_steps, f"{student} sees more clips than others, or fewer"
        assert config.weights == str(tmp_path / "weights")
        assert not start or (start in steps[student].after and configs[start].batch_size == config.batch_size)


def test_ablations_change_one_thing(orderings, tmp_path):
    _, configs = configurations(orderings, "full", tmp_path)
    base = configs["osv_0"].to_dict()
    changed = {
        letter: {key: value for key, value in configs[letter].to_dict().items() if value != base[key]}
        for letter in "adeh"
    }
    data = changed["h"].pop("data")
    assert changed == {
        "a": {"solver_steps": 1},
        "d": {"adversarial_weight": 0.0},
        "e": {"discriminator_input": "decoded"},
        "h": {},
    }
    assert data["resolutions"] == ((0, 32, 48),) and base["data"]["resolutions"] == ((0, 16, 24), (375, 32, 48))
    assert configs["b"].init_from == "" and configs["c"].objective == configs["g"].objective == "stage1"


def test_a_stopped_run_goes_on_and_a_finished_one_is_left_alone(
    orderings, programs, called, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "made"
    arguments = ["--size=tiny", f"--output={output}"]

    def stop(arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(programs, "merge", stop)
        with pytest.raises(KeyboardInterrupt):
            orderings.main(arguments)
    assert called == ["16x24", "32x48", "teacher"]
    orderings.main(arguments)
    printed = capsys.readouterr().out
    assert "teacher is done." in printed and printed.count("python -m osv_jax.train") > 10
    names = called[3:]
    assert names[-1] == "table" and len(set(names)) == len(names) and "osv_1" in names and "teacher" not in names
    found = json.loads((output / "orderings.json").read_text())
    assert found["measure"] == "mse" and len(found["lines"]) == 30
    assert all(claim["verdict"] in ("holds", "turned round", "not told apart") for claim in found["claims"])
    markdown = (output / "orderings.md").read_text()
    assert "| 1 | OSV, 1 step + TTS |" in markdown and "- clips: 2 of the world" in markdown
    assert markdown.count("python -m osv_jax.train") == 14

    del called[:]
    (output / "evaluated" / "table.json").unlink()
    (output / "evaluated").rmdir()
    orderings.main(arguments)
    assert called == ["table"]
    size = orderings.SIZES["tiny"]
    monkeypatch.setitem(orderings.SIZES, "tiny", orderings.dataclasses.replace(size, student_steps=4))
    with pytest.raises(UserError, match=r"was begun with other settings \(animatelcm\): give another --output"):
        orderings.main(arguments)


def test_lines_are_means_over_seeds_and_claims_need_intervals_apart(orderings):
    ways, lines = orderings.plan_rows(2)
    rows = {way.name: {"name": way.name, "fvd": 500.0, "fvd_low": 490.0, "fvd_high": 510.0} for way in ways}
    for seed, value in enumerate((300.0, 320.0)):
        rows[f"OSV, 1 step, seed {seed}"] = {"fvd": value, "fvd_low": value - 5, "fvd_high": value + 5}
    rows["SF-V, 1 step"] = {"fvd": 600.0, "fvd_low": 590.0, "fvd_high": 610.0}
    table = {"rows": [{**row, "name": name} for name, row in rows.items()], "about": {}}
    found = orderings.results(table, lines, 1024)
    line = next(line for line in found["lines"] if line["name"] == "OSV, 1 step")
    assert (line["value"], line["low"], line["high"], line["paper"]) == (310.0, 295.0, 325.0, 335.36)
    verdicts = {(c["better"], c["worse"]): c["verdict"] for c in found["claims"]}
    assert verdicts["OSV, 1 step", "SF-V, 1 step"] == "holds"
    assert verdicts["SF-V, 1 step", "AnimateLCM, 1 step"] == "turned round"
    assert verdicts["5 solver steps", "1 solver step"] == "not told apart"


def test_mistakes_are_named_before_anything_is_made(orderings, tmp_path):
    with pytest.raises(UserError, match="invalid choice: 'huge'"):
        orderings.main(["--size=huge", f"--output={tmp_path / 'x'}"])
    with pytest.raises(UserError, match="nowhere"):
        orderings.main(["--size=tiny", f"--output={tmp_path / 'x'}", "--fvd_weights=nowhere"])
    assert not (tmp_path / "x").exists()


@pytest.mark.slow  # Seventeen programs are compiled: minutes.
@pytest.mark.timeout(1800)
def test_the_whole_tiny_run(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "orderings.py"), "--size=tiny", f"--output={tmp_path / 'made'}"]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    for _ in range(2):
        subprocess.run(command, check=True, env=environment)
    found = json.loads((tmp_path / "made" / "orderings.json").read_text())
    assert len(found["lines"]) == 30 and all(line["high"] < float("inf") for line in found["lines"])
