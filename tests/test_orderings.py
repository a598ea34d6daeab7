"""The benchmark of the paper's orderings: what it would train, that it goes on where it was stopped, what it finds."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

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
        names.append(f"table of {config.clips}")
        rows = [{"name": m.name, "mse": float(i), "mse_std": 0.1} for i, m in enumerate(methods)]
        folder = pathlib.Path(config.output)
        folder.mkdir()
        (folder / "table.json").write_text(json.dumps({"rows": rows, "about": {"clips": "2 of the world"}}))

    def other(arguments):
        names.append(arguments[1].split("/")[-1])
        if "--workdir=" in arguments[1]:
            workdir = pathlib.Path(arguments[1].partition("=")[2])
            workdir.mkdir()
            rows = [{"step": step, "loss_huber": 0.1 / step, "loss_disc": None} for step in (1, 2, 3)]
            (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    for program in programs:
        monkeypatch.setitem(programs, program, other)
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
        assert not config.get("level_weights"), "samplers begin at the highest of num_levels"
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
    assert data["resolutions"] == ((0, 32, 48),) and base["data"]["resolutions"] == ((0, 16, 24), (1125, 32, 48))
    assert configs["b"].init_from == "" and configs["c"].objective == configs["g"].objective == "stage1"


def test_a_stopped_run_goes_on_and_a_finished_one_is_left_alone(
    orderings, programs, called, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "made"
    arguments = ["--size=tiny", f"--output={output}"]
    size = orderings.dataclasses.replace(orderings.SIZES["tiny"], clips=(2, 5))
    monkeypatch.setitem(orderings.SIZES, "tiny", size)

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
    assert names[-1] == "table of 5" and len(set(names)) == len(names) and "osv_1" in names and "teacher" not in names
    found = json.loads((output / "orderings.json").read_text())
    assert found["measure"] == "mse" and len(found["lines"]) == 31
    assert all(claim["verdict"] in ("holds", "turned round", "not told apart") for claim in found["claims"])
    markdown = (output / "orderings.md").read_text()
    assert "| 1 | OSV, 1 step + TTS |" in markdown and "- clips: 2 of the world" in markdown
    assert markdown.count("python -m osv_jax.train") == 14
    assert np.ptp(np.asarray(Image.open(output / "orderings.png").convert("L"))) > 200

    del called[:]
    (output / "evaluated" / "table.json").unlink()
    (output / "evaluated").rmdir()
    orderings.main([*arguments, "--clips=3"])
    assert called == ["table of 3"] and json.loads((output / "orderings.json").read_text())["clips"] == 3
    monkeypatch.setitem(orderings.SIZES, "tiny", orderings.dataclasses.replace(size, student_steps=4))
    with pytest.raises(UserError, match=r"was begun with other settings \(animatelcm\): give another --output"):
        orderings.main(arguments)


def measured(ways, values):
    """A table of FVDs, 500 by default. Chance moves all of them by 50 together, and each by 1."""
    rng = np.random.default_rng(0)
    together = rng.normal(0, 50, 40)
    rows, draws = [{"name": "real", "motion": 1.0}], {}
    for way in ways:
        value = values.get(way.name, 500.0)
        rows.append({"name": way.name, "fvd": value, "fvd_low": value - 98, "fvd_high": value + 98})
        draws[way.name] = (value + together + rng.normal(0, 1, 40)).tolist()
    return {"rows": rows, "fvd_draws": draws, "about": {}}


def test_lines_are_means_over_seeds_and_claims_hold_for_each(orderings):
    ways, lines = orderings.plan_rows(2)
    values = {"OSV, 1 step, seed 0": 300.0, "OSV, 1 step, seed 1": 320.0, "SF-V, 1 step": 330.0}
    values |= {"OSV, 1 step + TTS, seed 0": 310.0, "OSV, 1 step + TTS, seed 1": 290.0}
    values |= {"OSV, 2 steps, seed 0": 313.0, "OSV, 2 steps, seed 1": 286.0, "AnimateLCM, 1 step": 320.0}
    found = orderings.results(measured(ways, values), lines, 1024)
    line = next(line for line in found["lines"] if line["name"] == "OSV, 1 step")
    assert (line["value"], line["low"], line["high"], line["paper"]) == (310.0, 202.0, 418.0, 335.36)
    claims = {(claim["better"], claim["worse"]): claim for claim in found["claims"]}
    # The intervals of the lines overlap: what is common to the draws of both is not in that of the difference.
    claim = claims["OSV, 1 step", "SF-V, 1 step"]
    assert claim["verdict"] == "holds" and claim["value"] == 20
    assert 5 < claim["low"] < 10 and 30 < claim["high"] < 35  # Of 10 and 30, the differences from either seed.
    assert claims["SF-V, 1 step", "AnimateLCM, 1 step"]["verdict"] == "turned round"
    # By seed: 3 and -4.
    claim = claims["OSV, 1 step + TTS", "OSV, 2 steps"]
    assert claim["verdict"] == "not told apart" and claim["value"] == -0.5 and claim["low"] > -10 and claim["high"] < 10
    assert claims["5 solver steps", "1 solver step"]["verdict"] == "holds"
    assert claims["no guidance", "guidance 1.5"]["value"] == 200


def test_curves_are_running_means(orderings):
    running_mean = importlib.import_module("orderings_curves").running_mean
    values = [np.nan, np.nan, 3.0, 5.0, np.nan, 1.0]
    expected = [np.nan, np.nan, 3.0, 4.0, 4.0, 3.0]
    np.testing.assert_allclose(running_mean(values, 0.5), expected)
    assert running_mean([2.0, 4.0], 0.05).tolist() == [2.0, 4.0]


def test_errors_are_compared_by_their_standard_errors(orderings):
    ways, lines = orderings.plan_rows(1)
    rows = [{"name": way.name, "mse": 0.5, "mse_std": 0.3} for way in ways]
    next(row for row in rows if row["name"] == "SF-V, 1 step")["mse"] = 0.7
    found = orderings.results({"rows": rows, "about": {}}, lines, 9)
    (claim,) = (claim for claim in found["claims"] if claim["worse"] == "SF-V, 1 step")
    assert found["measure"] == "mse" and claim["verdict"] == "not told apart"
    assert (claim["value"], claim["high"]) == pytest.approx((0.2, 0.2 + 1.96 * 0.1 * 2**0.5))


def test_decoding_workers_do_not_import_jax():
    """They import the file that was started."""
    code = "import sys, orderings; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, check=True)


def test_mistakes_are_named_before_anything_is_made(orderings, tmp_path):
    with pytest.raises(UserError, match="invalid choice: 'huge'"):
        orderings.main(["--size=huge", f"--output={tmp_path / 'x'}"])
    with pytest.raises(UserError, match="nowhere"):
        orderings.main(["--size=tiny", f"--output={tmp_path / 'x'}", "--fvd_weights=nowhere"])
    with pytest.raises(UserError, match="--clips"):
        orderings.main(["--size=tiny", f"--output={tmp_path / 'x'}", "--clips=1"])
    assert not (tmp_path / "x").exists()


@pytest.mark.slow  # Seventeen programs are compiled: minutes.
@pytest.mark.timeout(1800)
def test_the_whole_tiny_run(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "orderings.py"), "--size=tiny", f"--output={tmp_path / 'made'}"]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    for _ in range(2):
        subprocess.run(command, check=True, env=environment)
    found = json.loads((tmp_path / "made" / "orderings.json").read_text())
    assert len(found["lines"]) == 31 and all(line["high"] < float("inf") for line in found["lines"])
