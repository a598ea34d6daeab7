"""An objective that the project does not know trains, resumes, draws and is sampled from: one file and one config."""

import shutil

import pytest
import toy_objective_config
from toy_unet import toy_training
from workdirs import assert_same, metrics_of, state_of

from osv_jax import train
from osv_jax.errors import UserError
from osv_jax.inference.trained import load_trained
from osv_jax.objectives.objective import find


@pytest.mark.integration
def test_an_objective_of_ones_own(tmp_path):
    config, workdir = toy_objective_config.get_config(), tmp_path / "run"
    with toy_training():
        train.train(config, workdir)
        stopped = tmp_path / "stopped"
        shutil.copytree(workdir, stopped)
        shutil.rmtree(stopped / "checkpoints" / "4")
        train.train(config, stopped)
    assert_same(state_of(stopped, 4), state_of(workdir, 4))
    rows = metrics_of(workdir)
    assert sorted(rows) == [1, 2, 3, 4] and all("loss" in row for row in rows.values())
    assert (workdir / "losses.png").exists() and (workdir / "pictures" / "samples_0000004.png").exists()
    assert load_trained(workdir).student.lora and load_trained(workdir, ema=True).step == 4


def test_who_may_start_from_whom():
    assert find("stage2").may_start_from("stage1") and find("stage1").may_start_from("regression")
    assert not find("stage1").may_start_from("finetune") and not find("stage1").may_start_from("unknown")
    with pytest.raises(UserError, match=r"config\.objective='ours' is not one of .*stage1, stage2"):
        find("ours")
