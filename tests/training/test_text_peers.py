"""The programs of AVDM2 and of its teacher: they train, are stopped, and continue bit for bit."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from small_videos import small_videos
from workdirs import assert_same, metrics_of, state_of

from osv_jax import train
from osv_jax.inference.trained import load_trained
from osv_jax.models.text_unet import MotionConfig, TextUNetConfig
from osv_jax.objectives import avdm2
from osv_jax.planning import compiling
from osv_jax.training import setup
from osv_jax.training.config import check_config, phases_of, read_config

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "avdm2.py"
TEACHER = CONFIG.with_name("animatediff.py")
STEPS = 8
UNET = TextUNetConfig(
    block_out_channels=(32,),
    layers_per_block=1,
    num_attention_heads=(1,),
    has_attention=(False,),
    cross_attention_dim=8,
)


def micro_config():
    """`configs/avdm2.py:tiny` with a UNet of one level and the smallest of the others."""
    config = read_config(f"{CONFIG}:tiny")
    motion = MotionConfig(UNET.block_out_channels, 1, 1)
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    config.random_networks = ConfigDict(
        {
            "unet_2d": dataclasses.asdict(UNET),
            "motion_adapter": dataclasses.asdict(motion),
            "image_vae": {"block_out_channels": (32, 32)},
            "text_encoder": text | {"max_position_embeddings": 5},
        }
    )
    config.data.videos, config.data.num_frames = str(small_videos()), 3
    config.data.resolutions = ((0, 16, 24),)
    config.sdm_frames, config.discriminator_width = 2, 8
    config.num_steps, config.checkpoint_every, config.picture_every, config.log_every = STEPS, STEPS // 2 + 1, STEPS, 1
    return config


@pytest.mark.integration
def test_a_stopped_run_continues_bit_for_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.mesh, "make_mesh", lambda *sizes: tiny.one_device_mesh())
    config, workdir, stopped = micro_config(), tmp_path / "run", tmp_path / "stopped"
    train.train(config, workdir)
    output = capsys.readouterr().out
    assert "M of the student" in output and (workdir / "losses.png").is_file()
    shutil.copytree(workdir, stopped)
    shutil.rmtree(stopped / "checkpoints" / str(STEPS))
    train.train(config, stopped)
    # From step 5 on, an odd number: the student's turn is remembered, too.
    assert "Resuming from step 5." in capsys.readouterr().out
    assert_same(state_of(stopped, STEPS), state_of(workdir, STEPS))
    rows = metrics_of(workdir)
    missing = set(avdm2.AVDM2.may_be_missing)
    assert all(missing & set(row) == (missing if number % 2 == 0 else set()) for number, row in rows.items())
    assert {"loss_disc", "loss_fake_score"} <= set(rows[1])
    trained = load_trained(workdir)
    assert (
        not trained.is_teacher
        and trained.step == STEPS
        and set(trained.student.tuned) >= {"down_blocks_0", "mid_block"}
    )


@pytest.mark.integration
@pytest.mark.parametrize("part", ["unet", "motion"])
def test_a_teacher_is_trained_part_by_part_and_stopped(part, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.mesh, "make_mesh", lambda *sizes: tiny.one_device_mesh())
    config, workdir, stopped = (
        read_config(f"{CONFIG.with_name('animatediff.py')}:tiny"),
        tmp_path / "run",
        tmp_path / "s",
    )
    micro = micro_config()
    for key in ("random_networks", "data", "checkpoint_every", "picture_every", "log_every", "num_steps"):
        config[key] = micro[key]
    config.part, config.frames = part, 2
    train.train(config, workdir)
    assert list((workdir / "pictures").iterdir()) and "frozen    unet_2d" in capsys.readouterr().out
    shutil.copytree(workdir, stopped)
    shutil.rmtree(stopped / "checkpoints" / str(STEPS))
    train.train(config, stopped)
    assert_same(state_of(stopped, STEPS), state_of(workdir, STEPS))
    trained = load_trained(workdir, ema=True)
    assert trained.is_teacher and not trained.student.lora
    has_motion = any("motion_modules_0" in path for path in flatten_dict(trained.student.tuned))
    assert has_motion == (part == "motion") and ("conv_in" in trained.student.tuned) == (part == "unet")


@pytest.mark.integration
def test_the_step_is_planned():
    config = micro_config()
    config.mesh.data, config.mesh.fsdp = 1, 1
    check_config(config)
    plan = compiling.plan_step(config, phases_of(config)[0], tiny.one_device_mesh())
    assert plan.total > 0


def test_records_need_no_text_encoder_and_a_video_is_given_the_empty_prompt():
    config = micro_config()
    networks = setup.networks_of(config)
    videos = setup.frozen_shapes(config, networks)
    assert list(videos) == ["unet_2d", "motion_adapter", "image_vae", "text_encoder"]
    embedded = jax.jit(networks.embed_empty, static_argnums=1)(
        setup.load_frozen(config, networks, tiny.one_device_mesh())["text_encoder"], 3
    )
    assert embedded.shape == (3, 5, 8) and np.all(embedded[0] == embedded[2])
    config.data.dataset = "latents"
    assert list(setup.frozen_shapes(config, networks)) == ["unet_2d", "motion_adapter", "image_vae"]
