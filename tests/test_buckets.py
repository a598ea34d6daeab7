"""The programs with everything in a bucket: prepared, trained, stopped and resumed, exported, sampled."""

import concurrent.futures

import micro_finetune
import numpy as np
import pytest
import tiny_openvid
from bucket import stand_in
from fake_encoder import FakeEncoder
from PIL import Image
from small_videos import small_videos
from test_prepare import ARGUMENTS
from tool import convert
from toy_unet import ToyUNet, toy_training
from workdirs import assert_same, metrics_of, state_of

from osv_jax import prepare, sample, train
from osv_jax.convert import weights
from osv_jax.data import latents
from osv_jax.preparation import pipeline, shards, stored
from osv_jax.preparation.decoding import Decoder
from osv_jax.runtime import checkpoint, paths

STEPS = 4
BUCKET = paths.as_path


@pytest.fixture(scope="module", autouse=True)
def bucket(tmp_path_factory):
    """Everything in a bucket, and no local folder called `gs:` afterwards."""
    here = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as patch, toy_training():
        patch.chdir(here)
        stand_in(patch)
        # Other processes would know nothing of the stand-in.
        patch.setattr(Decoder, "_new_pool", lambda self, count: concurrent.futures.ThreadPoolExecutor(count))
        yield paths.as_path("gs://bucket")
    assert not list(here.iterdir())


@pytest.fixture(scope="module")
def openvid(bucket, tmp_path_factory):
    folder = tmp_path_factory.mktemp("openvid")
    tiny_openvid.write_openvid(folder, num_videos=9)
    paths.copy_folder(folder, bucket / "openvid")
    return folder


@pytest.fixture
def fake_networks(monkeypatch):
    """Returns what the encoder is asked for: the clips' noise keys."""
    asked = []
    monkeypatch.setattr(pipeline, "_read_config", lambda name: None)
    monkeypatch.setattr(pipeline, "_networks", lambda *_: ("", {}))
    monkeypatch.setattr(pipeline, "_fingerprint", lambda *_: "fake")
    monkeypatch.setattr(pipeline, "_encoder", lambda *_: FakeEncoder(on_call=lambda keys: asked.extend(keys.tolist())))
    return asked


def prepared(source, output, *arguments):
    prepare.main([f"--source=openvid:{source}", f"--output={output}", *ARGUMENTS, *arguments])


def records_of(dataset):
    return [stored.read_records(file) for file in sorted(dataset.glob("*.array_record-*"))]


def test_a_dataset_is_prepared_stopped_resumed_and_merged(bucket, openvid, fake_networks, tmp_path, monkeypatch):
    prepared(openvid, tmp_path / "local")
    count = len(fake_networks)
    fake_networks.clear()
    # The end of a machine, at any moment: here after the third batch.
    commit, commits = shards.commit_batch, []

    def commit_and_end(*args):
        commit(*args)
        commits.append(args)
        if len(commits) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "commit_batch", commit_and_end)
        prepared(bucket / "openvid", bucket / "whole")
    assert not (bucket / "whole" / "dataset_info.json").exists()
    before = len(fake_networks)
    prepared(bucket / "openvid", bucket / "whole")
    # Only the batch that was being encoded is encoded again.
    assert before < count and len(fake_networks) - count <= 8
    for i in range(2):
        prepared(bucket / "openvid", bucket / f"part{i}", f"--shard={i}/2")
    prepare.main(["--merge", str(bucket / "part0"), str(bucket / "part1"), f"--output={bucket / 'merged'}"])

    local = latents.open_dataset(tmp_path / "local")
    for name in ("whole", "merged"):
        dataset = latents.open_dataset(bucket / name)
        assert dataset.content_hash == local.content_hash
        assert records_of(bucket / name) == records_of(tmp_path / "local")
        assert not paths.files_below(bucket / name / shards.UNFINISHED)
        batches = [next(iter(latents.latent_batches(which, 2, seed=0))) for which in (dataset, local)]
        assert_same(*batches)
    assert Image.open((bucket / "whole" / "contact_sheet.png").open("rb")).size[1] > 8 * 24


def finetune_config(**changes):
    config = micro_finetune.get_config()
    config.lora.targets, config.num_steps = "all", STEPS
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def run(bucket):
    """A run in the bucket, on videos in the bucket."""
    paths.copy_folder(small_videos(), bucket / "videos")
    train.train(finetune_config(**{"data.videos": str(bucket / "videos")}), bucket / "run")
    return bucket / "run"


@pytest.mark.integration
def test_a_stopped_run_continues_bit_for_bit(run, bucket, tmp_path, capsys):
    train.train(finetune_config(), tmp_path / "local")
    expected = state_of(tmp_path / "local", STEPS)
    assert_same(state_of(run, STEPS), expected)
    # The machine went away while the last checkpoint was being written, and step 3's metrics had been uploaded.
    stopped = bucket / "stopped"
    paths.copy_folder(run, stopped)
    (stopped / "checkpoints" / str(STEPS) / "commit_success.txt").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    paths.write_text(stopped / "metrics.jsonl", "".join(lines[:3]) + lines[3][:9])
    assert checkpoint.latest_step(stopped) == 2
    train.train(finetune_config(**{"data.videos": str(bucket / "videos")}), stopped)
    assert "Resuming from step 2." in capsys.readouterr().out
    assert_same(state_of(stopped, STEPS), expected)
    assert metrics_of(stopped) == metrics_of(run) == metrics_of(tmp_path / "local")
    written = {name.split("/")[0] for name in paths.files_below(stopped)}
    assert written >= {"config.json", "clips.json", "losses.png", "metrics.jsonl", "pictures", "tensorboard"}


@pytest.mark.integration
def test_what_was_trained_is_exported_and_sampled(run, bucket, monkeypatch, capsys):
    monkeypatch.setattr("osv_jax.inference.pipeline.SVDUNet", ToyUNet)
    for name in ("merge", "peft"):
        command = ["merge"] if name == "merge" else ["export-lora", f"--format={name}"]
        assert convert([*command, str(run), str(bucket / name), "--dtype=float32"]) == 0
        assert convert([*command, str(run), str(bucket / name), "--dtype=float32"]) == 2
    assert "exists: choose another output" in capsys.readouterr().err
    assert convert(["pack", str(bucket / "merge"), str(bucket / "packed"), "--dtype=float32"]) == 0
    assert_same(weights.load_params(bucket / "packed", "unet"), weights.load_params(bucket / "merge", "unet"))
    # The other networks are copied within the bucket.
    assert convert(["merge", str(run), str(bucket / "again"), f"--weights={bucket / 'packed'}"]) == 0
    assert weights.load_config(bucket / "again", "vae") == weights.load_config(bucket / "merge", "vae")

    with paths.new_file(bucket / "images" / "cat.png") as file:
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(file, "PNG")
    options = [f"--image={bucket / 'images'}", f"--weights={bucket / 'packed'}", "--sampler=consistency"]
    for lora, output in (("run", "{name}.mp4"), ("peft", "pictures")):
        sample.main([*options, f"--lora={bucket / lora}", f"--output={bucket / 'made' / output}"])
    assert list(paths.files_below(bucket / "made")) == ["cat.mp4", *(f"pictures/{i:03d}.png" for i in range(3))]
