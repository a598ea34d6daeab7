"""The methods beside OSV train, are stopped, continue bit for bit, and are read by what samples and exports."""

import pathlib
import shutil

import micro_stage1
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tool import convert
from toy_unet import toy_training
from workdirs import assert_same, metrics_of, state_of

from osv_jax import train
from osv_jax.convert import weights
from osv_jax.inference.trained import load_trained
from osv_jax.objectives.objective import find
from osv_jax.training.config import read_config

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
STEPS, SAME = 24, 8
# What a method regresses its student by.
FALLING = {"animatelcm": "loss_huber", "sf_v": "loss_huber", "add": "loss_distillation"}


def micro_config(name):
    """`configs/NAME.py:tiny` with the clips and networks of `micro_stage1`, its rates being its own."""
    config, micro = read_config(f"{CONFIGS / name}.py:tiny"), micro_stage1.get_config()
    for key in ("random_networks", "data", "log_every", "lora"):
        config[key] = micro[key]
    config.lora.targets = "all"
    if "discriminator_blocks" in config:
        config.discriminator_blocks = micro.discriminator_blocks
    if "phases" in config:
        # The toy has no spatial transformer.
        config.trainable = ("temporal_transformer",)
        config.phases = ((0, "temporal_transformer", config.phases[1][2]),)
    config.num_steps, config.checkpoint_every, config.picture_every = STEPS, STEPS // 2, STEPS
    return config


# The steps of the two with a discriminator take long to compile.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.integration] * (name != "animatelcm")) for name in FALLING]
)
def test_a_stopped_run_continues_bit_for_bit_its_loss_has_fallen_and_its_student_is_exported(name, tmp_path, capsys):
    config, workdir, stopped, again = micro_config(name), tmp_path / "run", tmp_path / "stopped", tmp_path / "again"
    with toy_training():
        train.train(config, workdir)
        shutil.copytree(workdir, stopped)
        shutil.rmtree(stopped / "checkpoints" / str(STEPS))
        train.train(config, stopped)
        # The first steps' clips, levels and noise once more, for the student that has been trained.
        config.init_from, config.num_steps = str(workdir), SAME
        train.train(config, again)
        assert convert(["merge", str(workdir), str(tmp_path / "merged"), "--ema", "--dtype=float32"]) == 0
        merged = flatten_dict(weights.load_params(tmp_path / "merged", "unet"))
        adapter = convert(["export-lora", str(workdir), str(tmp_path / "adapter"), "--format=peft"])
    assert_same(state_of(stopped, STEPS), state_of(workdir, STEPS))
    rows, after = metrics_of(workdir), metrics_of(again)
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
