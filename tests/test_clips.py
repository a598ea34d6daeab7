"""Training from prepared datasets: stopped and resumed, with one and with two resolutions, and what does not fit."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import micro_stage1
import micro_stage2
import numpy as np
import pytest
from fake_encoder import FakeEncoder
from small_videos import small_videos
from toy_unet import toy_training
from workdirs import assert_same, metrics_of, state_of

from osv_jax import prepare, train
from osv_jax.data import latents
from osv_jax.data.schemas import Schema
from osv_jax.errors import UserError
from osv_jax.objectives.batches import batch_of_records
from osv_jax.preparation import pipeline
from osv_jax.training import clips, setup
from osv_jax.training.config import phases_of

SIZES = ((16, 24), (24, 16))


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with toy_training() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Datasets of the real clips at both sizes, with values in place of latents."""
    folder = tmp_path_factory.mktemp("prepared")
    configuration = pathlib.Path(micro_stage1.__file__)
    for height, width in SIZES:
        schema = Schema(3, height // 2, width // 2, 4, 8, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "_encoder", lambda *_, schema=schema: FakeEncoder(schema))
            size = [f"--height={height}", f"--width={width}", "--num_augmented=2", "--stride=0.25", "--workers=1"]
            output = folder / f"{height}x{width}"
            prepare.main([f"--source={small_videos()}", f"--output={output}", f"--config={configuration}", *size])
    return folder


def configure(config, prepared, **changes):
    config.data.dataset = f"{prepared}/{{height}}x{{width}}"
    config.discriminator_blocks, config.lora.targets = (0,), "all"
    config.random_networks.dinov2.num_hidden_layers = 1
    config.checkpoint_every, config.num_steps, config.keep_checkpoints = 1, 4, 10
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def stage1(prepared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stage1") / "run"
    train.train(configure(micro_stage1.get_config(), prepared), workdir)
    return workdir


def assert_stopped_run_continues(config, workdir, stop, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    for step in range(stop + 1, config.num_steps + 1):
        shutil.rmtree(copy / "checkpoints" / str(step))
    train.train(config, copy)
    assert_same(state_of(copy, config.num_steps), state_of(workdir, config.num_steps))
    assert metrics_of(copy) == metrics_of(workdir)


@pytest.mark.integration
def test_stage_1_stopped_in_an_epoch_continues_bit_for_bit(prepared, stage1, tmp_path, capsys):
    assert sorted(metrics_of(stage1)) == [1, 2, 3, 4]
    config = configure(micro_stage1.get_config(), prepared)
    assert_stopped_run_continues(config, stage1, 2, tmp_path)
    output = capsys.readouterr().out
    assert "Resuming from step 2." in output and "15 clips of 3 frames" in output


@pytest.mark.integration
def test_stage_2_takes_a_dataset_for_each_resolution(prepared, stage1, tmp_path):
    config = configure(micro_stage2.get_config(), prepared, init_from=str(stage1))
    workdir = tmp_path / "stage2"
    train.train(config, workdir)
    assert sorted(metrics_of(workdir)) == [1, 2, 3, 4]
    positions = [json.loads((workdir / "checkpoints" / str(step) / "data" / "metadata").read_text()) for step in (2, 3)]
    hashes = [latents.open_dataset(prepared / f"{height}x{width}").content_hash for height, width in SIZES]
    assert [position["index_hash"] for position in positions] == hashes and hashes[0] != hashes[1]
    # Where the first resolution ends: the position is one in the first dataset.
    assert_stopped_run_continues(config, workdir, 2, tmp_path)


def test_nothing_is_loaded_to_encode(prepared, one_device):
    config = configure(micro_stage1.get_config(), prepared)
    made = setup.networks_of(config)
    mesh = train.mesh.make_mesh(1, 1)
    frozen = setup.load_frozen(config, made, mesh)
    assert set(frozen) == {"unet", "vae", "dinov2"}
    config.data.dataset = ""
    others = setup.load_frozen(config, made, mesh)
    assert set(others) == {"unet", "vae", "dinov2", "image_encoder"}
    jax.tree.map(np.testing.assert_array_equal, frozen, {name: others[name] for name in frozen})


def test_batches_are_the_records_with_one_augmentation_each(prepared):
    dataset = latents.open_dataset(prepared / "16x24")
    records = next(iter(latents.latent_batches(dataset, 8, seed=0)))
    batch = batch_of_records(records, jax.random.key(0), motion_bucket_id=100)
    np.testing.assert_array_equal(batch.latents, records["latents"].astype(np.float32))
    np.testing.assert_array_equal(batch.cond.image_embedding, records["image_embedding"])
    ids = np.asarray(batch.cond.added_time_ids)
    np.testing.assert_array_equal(ids[:, :2], np.broadcast_to([6.0, 100.0], (8, 2)))
    choices = set()
    for row in range(8):
        (k,) = np.flatnonzero(records["noise_aug_strength"][row] == ids[row, 2])
        np.testing.assert_array_equal(
            batch.cond.image_latents[row], records["image_latents"][row, k].astype(np.float32)
        )
        choices.add(k)
    assert choices == {0, 1}
    assert {leaf.dtype for leaf in jax.tree.leaves(batch)} == {jnp.dtype("float32")}


def refused(config, workdir):
    with pytest.raises(UserError) as error:
        train.train(config, workdir)
    assert not workdir.exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"data.num_frames": 4},
            ["16x24 has num_frames 3, but the configuration needs num_frames 4", "prepare another"],
        ),
        ({"data.fps": 8.0}, ["has fps 7.0, but the configuration needs fps 8.0"]),
        ({"data.resolutions": ((0, 32, 32),)}, ["32x32 is not a dataset", "osv_jax.prepare"]),
        ({"random_networks.unet.cross_attention_dim": 16}, ["was made with other networks"]),
        ({"data.num_workers": -1}, ["config.data.num_workers=-1"]),
    ],
)
def test_datasets_that_do_not_fit_are_refused(prepared, changes, words, tmp_path):
    sentence = refused(configure(micro_stage1.get_config(), prepared, **changes), tmp_path / "run")
    assert all(word in sentence for word in words), sentence


def test_a_dataset_of_another_size_is_refused(prepared, tmp_path):
    config = configure(micro_stage1.get_config(), prepared)
    config.data.dataset = str(prepared / "24x16")
    assert "has height 24, width 16, but the configuration needs height 16, width 24" in refused(
        config, tmp_path / "run"
    )


@pytest.mark.integration
def test_another_dataset_does_not_continue_a_run(prepared, stage1):
    config = configure(micro_stage1.get_config(), prepared)
    opened = clips.open_clips(config, setup.networks_of(config), stage1)
    (phase,) = phases_of(config)
    position = opened.save_position(phase, 3)
    opened.check_position(phase, position)
    with pytest.raises(UserError, match="are not those that the checkpoint was trained on"):
        opened.check_position(phase, position | {"index_hash": "other"})
