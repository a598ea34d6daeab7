"""What a run measures of its student while it trains."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import toy_objective_config
from tiny_networks import NUM_FRAMES, save
from toy_unet import toy_training

from osv_jax import train
from osv_jax.data import latents
from osv_jax.data.schemas import Schema
from osv_jax.diffusion.edm import EDMBackbone
from osv_jax.errors import UserError
from osv_jax.inference.trained import load_trained
from osv_jax.runtime.metrics import read_metrics
from osv_jax.training import clips as training_clips
from osv_jax.training import setup
from osv_jax.training.clips import held_out_clips
from osv_jax.training.config import phases_of
from osv_jax.training.sampling import Sampler

MEASURED = {"eval_mse", "eval_motion", "eval_fvd", "eval_fvd_low", "eval_fvd_high"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """VideoMAE's weights."""
    return save(tmp_path_factory.mktemp("weights"), "videomae")


def config_of(folder, **changes):
    """Evaluations of three clips, in batches of two, at steps 2 and 3."""
    config = toy_objective_config.get_config()
    config.data.num_frames, config.data.fps = NUM_FRAMES, 15.0
    config.num_steps, config.eval_every = 3, 2
    config.evaluation.update(videos=config.data.videos, clips=3, teacher_steps=2, protocol="cd-fvd", bootstrap=2)
    config.evaluation.fvd_weights = str(folder)
    config.update_from_flattened_dict(changes)
    return config


def evaluations(workdir):
    rows = {row["step"]: row for row in read_metrics(workdir / "metrics.jsonl") if "eval_mse" in row}
    return {step: {name: value for name, value in row.items() if name in MEASURED} for step, row in rows.items()}


@pytest.mark.integration
def test_a_run_is_measured(folder, tmp_path):
    """At the steps that are asked for and at the end, the same whether the run was stopped; nothing else changes."""
    with toy_training() as mesh:
        train.train(config_of(folder), tmp_path / "run")
        shutil.copytree(tmp_path / "run", tmp_path / "stopped")
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "3")
        train.train(config_of(folder), tmp_path / "stopped")
        train.train(config_of(folder, eval_every=0), tmp_path / "other")
        frozen, sampler, clips = parts_of(config_of(folder), tmp_path / "run", mesh)
    measured = evaluations(tmp_path / "run")
    assert list(measured) == [2, 3] and evaluations(tmp_path / "stopped") == measured
    assert evaluations(tmp_path / "other") == {}
    assert all(set(row) == MEASURED and row["eval_fvd_low"] <= row["eval_fvd"] for row in measured.values())
    assert measured[2]["eval_mse"] != measured[3]["eval_mse"] > 0
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("run", "other")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    board = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"eval_fvd" in b"".join(file.read_bytes() for file in board)

    # By a plain loop over the clips.
    config, student, errors = config_of(folder), load_trained(tmp_path / "run").student, []
    for number, chosen in enumerate(([0, 1], [2, 2])):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), number))
        cond, noise = sampler.encode(frozen, clips.batch(chosen), *keys)
        teacher = EDMBackbone(sampler.objective.networks.unet_with({"params": frozen["unet"]}), cond)
        bare = dataclasses.replace(teacher, cond=cond.unconditional())
        x, weight = noise * np.sqrt(700.0**2 + 1), np.linspace(1, 3, NUM_FRAMES)[:, None, None, None]
        for sigma, lower in ((700.0, 0.002), (0.002, 0.0)):
            levels = np.full(2, sigma, np.float32)
            x0 = (1 - weight) * bare(x, levels) + weight * teacher(x, levels)
            x = x + (lower - sigma) / sigma * (x - x0)
        network = sampler.objective.networks.unet_with(student.variables(frozen["unet"]))
        sampled = EDMBackbone(network, cond)(700.0 * noise, np.full(2, 700.0, np.float32))
        errors += np.asarray(((sampled - x) ** 2).mean(axis=(1, 2, 3, 4))).tolist()
    assert measured[3]["eval_mse"] == pytest.approx(np.mean(errors[:3]), rel=1e-3)


def parts_of(config, workdir, mesh):
    """Of a run: frozen parameters, a sampler, and the clips it was measured on."""
    networks = setup.networks_of(config)
    frozen = setup.load_frozen(config, networks, mesh)
    clips = held_out_clips(config, networks, workdir, phases_of(config)[0])
    return frozen, Sampler(config, setup.objective_of(config, networks), mesh), clips


def test_clips_of_a_dataset_are_those_of_its_test_split(folder, tmp_path, monkeypatch):
    """As a training step takes them."""
    record = {name: np.full(2, number) for number, name in enumerate(Schema.for_training)} | {"caption": "x"}
    schema = Schema(NUM_FRAMES, 8, 12, 4, 8, 1)
    dataset, opened = latents.LatentDataset(tmp_path, schema, {}, (("a", 2), ("b", 3))), []
    monkeypatch.setattr(training_clips, "_open_dataset", lambda *given: opened.append(given[-1]) or dataset)
    monkeypatch.setattr(latents.LatentDataset, "read", lambda _, number: record | {"fps": np.float32(number)})
    config = config_of(folder)
    networks, phase = setup.networks_of(config), phases_of(config)[0]
    config.data.dataset = "latents"
    clips = held_out_clips(config, networks, tmp_path, phase)
    assert opened == ["test"] and clips.chosen == (0, 2, 4)
    batch = clips.batch([0, 2])
    assert set(batch) == set(Schema.for_training) and batch["fps"].tolist() == [0, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation.videos": ""}, "config.eval_every needs config.evaluation.videos"),
        ({"evaluation.videos": "nowhere"}, "nowhere does not exist"),
        ({"evaluation.protocol": "fid"}, "config.evaluation.protocol='fid' is not one of stylegan-v"),
        ({"evaluation.fvd_weights": "nowhere"}, "nowhere"),
        ({"data.num_frames": 9}, "takes clips of 10 frames, not of 9"),
        ({"evaluation.clips": 0}, "config.evaluation.clips=0 must be a whole number of at least 1"),
    ],
)
def test_mistakes_are_named(changes, message, folder, tmp_path):
    with toy_training(), pytest.raises(UserError, match=message):
        train.train(config_of(folder, **changes), tmp_path / "run")
