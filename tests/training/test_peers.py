"""The methods beside OSV train, are stopped, continue bit for bit, and are read by what samples and exports."""

import shutil

import micro_stage1
import pytest
from toy_unet import toy_training
from workdirs import assert_same, metrics_of, state_of

from osv_jax import train
from osv_jax.inference.trained import load_trained
from osv_jax.objectives.objective import find
from osv_jax.training.config import default_config

OPTIONS = {
    "animatelcm": {"trainable": ("temporal_transformer",), "phases": ((0, "temporal_transformer", 1e-2),)},
    "sf_v": {},
    "add": {"trainable": ("temporal_transformer",), "discriminator_blocks": (0,)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_stopped_run_continues_bit_for_bit(name, tmp_path):
    config, micro = default_config(name), micro_stage1.get_config()
    for key in ("weights", "random_networks", "data", "batch_size", "dtype", "remat", "log_every"):
        config[key] = micro[key]
    config.update(OPTIONS[name])
    config.num_steps, config.checkpoint_every, config.picture_every = 4, 2, 4
    workdir, stopped = tmp_path / "run", tmp_path / "stopped"
    with toy_training():
        train.train(config, workdir)
        shutil.copytree(workdir, stopped)
        shutil.rmtree(stopped / "checkpoints" / "4")
        train.train(config, stopped)
    assert_same(state_of(stopped, 4), state_of(workdir, 4))
    rows = metrics_of(workdir)
    curves = find(name).curves
    assert sorted(rows) == [1, 2, 3, 4] and all(curve in row for row in rows.values() for curve in curves)
    trained = load_trained(workdir, ema=True)
    assert trained.step == 4 and trained.student.tuned
