"""The methods beside OSV train, are killed, continue bit for bit, and are read by what samples and exports."""

import signal
import subprocess
import sys

import micro_peers
import numpy as np
import pytest
from conftest import flat
from flax.traverse_util import flatten_dict
from test_documentation import overrides_of
from test_train import environment
from tool import convert
from toy_unet import toy_training
from workdirs import assert_same, metrics_of, state_of

from osv_jax import train
from osv_jax.convert import weights
from osv_jax.inference.trained import load_trained
from osv_jax.objectives.objective import find
from osv_jax.runtime import checkpoint

# (The warning is in ml_collections.)
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")]
STEPS, SAME = micro_peers.STEPS, 8
# What a method regresses its student by.
FALLING = {"animatelcm": "loss_huber", "sf_v": "loss_huber", "add": "loss_distillation"}


@pytest.mark.parametrize("name", FALLING)
def test_a_killed_run_continues_bit_for_bit_its_loss_has_fallen_and_its_student_is_exported(name, tmp_path, capsys):
    config, workdir = micro_peers.get_config(name), tmp_path / "run"
    killed, again = tmp_path / "killed", tmp_path / "again"
    with toy_training():
        train.train(config, workdir)
        # In a process of its own, which takes the compiled step from the cache.
        command = [sys.executable, micro_peers.__file__, name, str(killed)]
        run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert run.returncode == -signal.SIGKILL, run.stderr[-3000:]
        assert checkpoint.latest_step(killed) == STEPS // 2
        capsys.readouterr()
        train.train(config, killed)
        assert f"Resuming from step {STEPS // 2}." in capsys.readouterr().out
        # The first steps' clips, levels and noise once more, for the student that has been trained.
        config.init_from, config.num_steps = str(workdir), SAME
        train.train(config, again)
        assert convert(["merge", str(workdir), str(tmp_path / "merged"), "--ema", "--dtype=float32"]) == 0
        merged = flatten_dict(weights.load_params(tmp_path / "merged", "unet"))
        adapter = convert(["export-lora", str(workdir), str(tmp_path / "adapter"), "--format=peft"])
    assert_same(state_of(killed, STEPS), state_of(workdir, STEPS))
    rows, after = metrics_of(workdir), metrics_of(again)
    assert metrics_of(killed) == rows
    curves = find(name).curves
    assert sorted(rows) == list(range(1, STEPS + 1)) and all(curve in row for row in rows.values() for curve in curves)
    before, after = (np.mean([of[step][FALLING[name]] for step in range(1, SAME + 1)]) for of in (rows, after))
    print(f"{FALLING[name]} of {name}: {before:.4f} in the first steps, {after:.4f} in the same after {STEPS}")
    assert after < 0.9 * before
    trained = load_trained(workdir, ema=True)
    assert trained.step == STEPS and (trained.student.lora if name == "add" else trained.student.tuned)
    # A UNet like the teacher's: what trained without LoRA is in it as it is, and is no adapter.
    for path, leaf in flatten_dict(trained.student.tuned).items():
        np.testing.assert_array_equal(merged[path], leaf)
    assert adapter == (0 if name == "add" else 2)
    assert (
        "trained no LoRA: export the closest one with --rank, or the whole UNet with --format=unet"
        in capsys.readouterr().err
    ) == (name != "add")


@pytest.mark.parametrize("override", overrides_of("SF-V"), ids=lambda override: override[0].removeprefix("--config."))
def test_each_ablation_of_sf_v_trains(override, tmp_path):
    """Of its Tables 2 and 3, and LADD, by the overrides that the page gives: both players move, all is finite."""
    config, workdir = micro_peers.get_config("sf_v", *override), tmp_path / "run"
    config.num_steps, config.checkpoint_every = 2, 1
    with toy_training():
        train.train(config, workdir)
    assert all(np.isfinite(value) for row in metrics_of(workdir).values() for value in row.values())
    before, after = (state_of(workdir, step)["players"] for step in (1, 2))
    for name in ("student", "disc"):
        assert np.isfinite(flat(after[name]["params"])).all()
        assert not np.array_equal(flat(after[name]["params"]), flat(before[name]["params"]))
