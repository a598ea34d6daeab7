"""Training on a dataset, from weights and from another run, all of them in a bucket: the same as on this machine."""

import pathlib

import micro_finetune
import pytest
from bucket import stand_in
from fake_encoder import FakeEncoder
from ml_collections import ConfigDict
from small_videos import small_videos
from tool import convert
from toy_unet import toy_training
from workdirs import assert_same, metrics_of, state_of

from osv_jax import prepare, train
from osv_jax.data.schemas import Schema
from osv_jax.preparation import pipeline
from osv_jax.runtime import paths

pytestmark = pytest.mark.integration


def configure(folder, **changes):
    config = micro_finetune.get_config()
    config.lora.targets, config.data.dataset = "all", str(folder / "dataset")
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A `dataset`, and `weights` that a run on it has made."""
    folder = tmp_path_factory.mktemp("sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_encoder", lambda *_: FakeEncoder(Schema(3, 8, 12, 4, 8, 2)))
        given = [f"--source={small_videos()}", f"--config={pathlib.Path(micro_finetune.__file__)}", "--workers=1"]
        prepare.main([*given, f"--output={folder / 'dataset'}", "--num_augmented=2", "--stride=0.25"])
    config = configure(folder, num_steps=1)
    with toy_training():
        train.train(config, folder / "first")
        assert convert(["merge", str(folder / "first"), str(folder / "weights"), "--dtype=float32"]) == 0
    return folder


def trained(folder, workdir, **changes):
    config = configure(folder, weights=str(folder / "weights"), **changes)
    config.random_networks = ConfigDict()
    train.train(config, workdir)
    return workdir


def test_a_run_in_a_bucket_is_that_of_this_machine(sources, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    stand_in(monkeypatch)
    bucket = paths.as_path("gs://bucket")
    paths.copy_folder(sources, bucket)
    runs = []
    with toy_training():
        for folder, output in ((sources, tmp_path), (bucket, bucket)):
            origin = trained(folder, output / "origin", num_steps=1)
            runs.append(trained(folder, output / "run", init_from=str(origin), num_steps=2))
            assert f"Starting from step 1 of {origin}." in capsys.readouterr().out
        local, run = runs
        assert_same(state_of(run, 2), state_of(local, 2))
        assert metrics_of(run) == metrics_of(local)
        # The same command with a larger number of steps goes on.
        trained(bucket, run, init_from=str(origin), num_steps=3)
        assert "Resuming from step 2." in capsys.readouterr().out and sorted(metrics_of(run)) == [1, 2, 3]
        # A LoRA to start from, in the bucket, too.
        assert convert(["export-lora", str(run), str(bucket / "lora"), "--format=peft"]) == 0
        trained(bucket, bucket / "from_lora", init_from=str(bucket / "lora"), num_steps=1)
        assert f"Starting from the LoRA {bucket / 'lora'}." in capsys.readouterr().out
    assert not list((tmp_path / "here").iterdir())
