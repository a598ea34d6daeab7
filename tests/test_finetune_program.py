"""The training program's fine-tuning: stopped and resumed, continued, read back, and merged into a teacher."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import signal

import jax
import micro_finetune
import micro_stage1
import numpy as np
import pytest
from conftest import relative_error
from flax.traverse_util import flatten_dict, unflatten_dict
from tool import convert as main
from toy_unet import ToyUNet, toy_training
from workdirs import assert_same, metrics_of, state_of

from osv_jax import train
from osv_jax.convert import weights
from osv_jax.convert.architectures import ARCHITECTURES, expected_params
from osv_jax.errors import Stopped, UserError
from osv_jax.inference.options import Options
from osv_jax.inference.pipeline import ImageToVideo
from osv_jax.inference.trained import load_trained
from osv_jax.objectives.random_networks import fill_randomly
from osv_jax.runtime import checkpoint, ending
from osv_jax.training import origins, setup
from osv_jax.training.config import check_config

STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with toy_training() as mesh:
        yield mesh


def finetune_config(**changes):
    config = micro_finetune.get_config()
    config.lora.targets = "all"
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing stopped, of LoRA and the temporal transformer."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    train.train(finetune_config(num_steps=STEPS), workdir)
    return workdir


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run in which every layer trained, and no LoRA."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train.train(finetune_config(num_steps=2, trainable=("all",)), workdir)
    return workdir


@pytest.mark.integration
def test_a_stopped_run_continues_bit_for_bit(straight, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    train.train(finetune_config(num_steps=STEPS), workdir)
    assert "Resuming from step 2." in capsys.readouterr().out
    assert_same(state_of(workdir, STEPS), state_of(straight, STEPS))
    assert metrics_of(workdir) == metrics_of(straight)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_last_finished_step(sent, straight, tmp_path, monkeypatch, capsys):
    workdir, write = tmp_path / "run", train.metrics.MetricsWriter.write
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)

    def write_and_signal(self, step, row):
        write(self, step, row)
        if step == 1:  # The host knows of a step's metrics when two more are under way.
            os.kill(os.getpid(), sent)

    with monkeypatch.context() as patch:
        patch.setattr(train.metrics.MetricsWriter, "write", write_and_signal)
        with pytest.raises(Stopped, match=rf"{sent.name}: step 3 is saved\. The same command continues") as stop:
            train.train(finetune_config(num_steps=STEPS, checkpoint_every=10), workdir)
    assert stop.value.exit_status == {signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
    assert signal.getsignal(signal.SIGTERM) is before[1]
    assert signal.signal(signal.SIGINT, before[0]) is signal.default_int_handler
    assert checkpoint.latest_step(workdir) == 3 and sorted(metrics_of(workdir)) == [1, 2, 3]
    train.train(finetune_config(num_steps=STEPS), workdir)
    assert "Resuming from step 3." in capsys.readouterr().out
    assert_same(state_of(workdir, STEPS), state_of(straight, STEPS))
    assert metrics_of(workdir) == metrics_of(straight)


def test_a_full_disk_loses_nothing_that_was_saved(straight, small_disk, capfd):
    workdir, filler = small_disk / "run", small_disk / "filler"
    shutil.copytree(straight, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    filler.write_bytes(bytes(filler.stat().st_size - 50_000))  # Room for metrics, but not for a checkpoint.
    capfd.readouterr()
    assert ending.exit_status(lambda: train.train(finetune_config(num_steps=STEPS), workdir)) == 2
    told = capfd.readouterr().err.splitlines()
    assert told[-1].startswith("error: There is no room left") and len(told) <= 2, told
    assert checkpoint.latest_step(workdir) == 2
    filler.unlink()
    assert ending.exit_status(lambda: train.train(finetune_config(num_steps=STEPS), workdir)) == 0
    assert_same(state_of(workdir, STEPS), state_of(straight, STEPS))
    assert metrics_of(workdir) == metrics_of(straight)


def test_what_a_run_writes(straight):
    state = state_of(straight, STEPS)
    assert list(state["players"]) == ["student"]
    student = state["players"]["student"]["params"]
    assert flatten_dict(student["lora"]) and flatten_dict(student["tuned"])
    rows = metrics_of(straight)
    assert sorted(rows) == list(range(1, STEPS + 1))
    bands = {f"loss/sigma_{name}" for name in ("low", "mid", "high")}
    for row in rows.values():
        assert all(math.isfinite(value) for value in row.values())
        # Two clips cannot lie in three bands: a band without a clip is left out, and does not stop the run.
        assert 1 <= len(bands & row.keys()) <= 2
        assert row.keys() - bands == {"step", "loss", "grad_norm/student", "param_norm/student"}
    assert (straight / "losses.png").stat().st_size > 1000


@pytest.mark.integration
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    sentence = refused(finetune_config(**{"optimizer.learning_rate": 1e30}), tmp_path / "run")
    assert "Step 1: " in sentence and "param_norm/student is inf" in sentence and "Lower the learning rates" in sentence


@pytest.mark.parametrize(("network", "module"), [("unet", "conv_out"), ("vae", "quant_conv")])
def test_weights_that_are_not_finite_are_named(network, module, tmp_path, monkeypatch):
    load_frozen = setup.load_frozen

    def damaged(*arguments):
        frozen = load_frozen(*arguments)
        frozen[network][module]["bias"] = frozen[network][module]["bias"].at[0].set(np.nan)
        return frozen

    monkeypatch.setattr(setup, "load_frozen", damaged)
    sentence = refused(finetune_config(), tmp_path / "run")
    assert sentence.startswith(f"The weights are damaged: {network}/{module}/bias has values that are NaN or infinite")


@pytest.mark.integration
def test_a_run_continues_another(straight, tmp_path, capsys):
    """With more layers, which start as they are in the base."""
    config = finetune_config(init_from=str(straight), num_steps=1, trainable=("lora", "all"))
    config.optimizer.learning_rate = 0.0
    train.train(config, tmp_path / "run")
    assert f"Starting from step {STEPS} of {straight}." in capsys.readouterr().out
    states = state_of(straight, 4), state_of(tmp_path / "run", 1)
    before, after = (flatten_dict(state["players"]["student"]["params"]) for state in states)
    assert len(after) > len(before)
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg="/".join(path))


def refused(config, workdir):
    with pytest.raises(UserError) as error:
        train.train(config, workdir)
    assert not list(workdir.glob("checkpoints/*"))
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("trainable", (), ["config.trainable is empty", "temporal_transformer"]),
        ("sigma.log_std", 0.0, ["config.sigma.log_std=0"]),
        ("min_snr_gamma", -1.0, ["config.min_snr_gamma=-1"]),
        ("dropout.both", 0.9, ["config.dropout", "at most 1"]),
        ("dropout.latents", -0.1, ["config.dropout", "-0.1"]),
        ("objective", "tune", ["tune", "finetune"]),
    ],
)
def test_values_are_checked_before_anything_is_compiled(key, value, words, tmp_path):
    sentence = refused(finetune_config(**{key: value}), tmp_path / "run")
    assert all(word in sentence for word in words), sentence


def test_lora_of_the_other_run_must_not_be_dropped(straight, tmp_path):
    config = finetune_config(init_from=str(straight), trainable=("temporal_transformer",))
    sentence = refused(config, tmp_path / "run")
    assert "trained the groups lora" in sentence and "config.trainable" in sentence


def test_settings_of_lora_do_not_matter_where_there_is_none(straight, tmp_path):
    origin = tmp_path / "origin"
    shutil.copytree(straight, origin)
    before = json.loads((origin / "config.json").read_text())
    (origin / "config.json").write_text(json.dumps(before | {"trainable": ["all"], "lora": {"rank": 99}}))
    origins.check_origin(origin, finetune_config(init_from=str(origin), trainable=("all",)))
    sentence = refused(finetune_config(init_from=str(origin), trainable=("all", "lora")), tmp_path / "run")
    assert "config.lora is" in sentence and "99" in sentence


def test_distillation_does_not_continue_finetuning_but_says_what_to_do(straight, tmp_path):
    config = micro_stage1.get_config()
    config.init_from = str(straight)
    sentence = refused(config, tmp_path / "run")
    assert f"osv_jax.convert_weights merge {straight} OUTPUT" in sentence and "config.weights" in sentence


def denoise_with(params, lora=None):
    """What a UNet with these parameters says about some inputs."""
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape, np.float32) for shape in ((1, 3, 2, 3, 8), (1,), (1, 8), (1, 3))]
    variables = {"params": params} | ({"lora": lora} if lora else {})
    return ToyUNet(ARCHITECTURES["unet"].config()).apply(variables, *inputs)


@pytest.mark.integration
@pytest.mark.parametrize(("run", "ema"), [("straight", False), ("whole", True)])
def test_merged_weights_are_the_student(run, ema, request, tmp_path, one_device):
    workdir, output = request.getfixturevalue(run), tmp_path / "merged"
    flags = ["--ema"] if ema else []
    assert main(["merge", str(workdir), str(output), "--dtype=float32", *flags]) == 0
    assert sorted(file.name for file in output.iterdir()) == ["dinov2", "image_encoder", "unet", "vae", "video.json"]

    # Stage 1 takes them for its teacher.
    config = micro_stage1.get_config()
    config.random_networks, config.weights = {}, str(output)
    check_config(config)
    frozen = setup.load_frozen(config, setup.networks_of(config), one_device)
    base_config = finetune_config()
    base = setup.load_frozen(base_config, setup.networks_of(base_config), one_device)
    for name in ("vae", "image_encoder"):
        assert_same(frozen[name], base[name])

    student = load_trained(workdir, ema).student
    variables = student.variables(base["unet"])
    expected = denoise_with(variables["params"], variables["lora"])
    assert relative_error(denoise_with(frozen["unet"]), expected) < 1e-5
    assert relative_error(denoise_with(base["unet"]), expected) > 1e-4


@pytest.mark.integration
def test_packed_weights_are_the_same_weights(straight, tmp_path, one_device, capsys):
    """One file a network, for `config.weights`, `merge` and `pack` alike."""
    assert main(["merge", str(straight), str(tmp_path / "merged")]) == 0
    assert main(["pack", str(tmp_path / "merged"), str(tmp_path / "packed")]) == 0
    assert "unet, vae, image_encoder, dinov2 as bfloat16" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "packed" / "unet").iterdir()} == {"config.json", "params.safetensors"}
    frozen = {}
    for folder in ("merged", "packed"):
        config = micro_stage1.get_config()
        config.random_networks, config.weights = {}, str(tmp_path / folder)
        networks = setup.networks_of(config)
        frozen[folder] = setup.load_frozen(config, networks, one_device)
        for name in ("unet", "vae", "image_encoder", "dinov2"):
            loaded = weights.load_params(tmp_path / folder, name)
            assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded)} <= {"bfloat16", "float32"}
            assert weights.load_config(tmp_path / folder, name) == getattr(networks, name).config
    assert_same(frozen["packed"], jax.tree.map(lambda x: x.astype("bfloat16").astype(x.dtype), frozen["merged"]))

    assert main(["pack", str(tmp_path / "packed"), str(tmp_path / "again"), "--dtype=float32"]) == 0
    assert_same(weights.load_params(tmp_path / "again", "vae"), frozen["packed"]["vae"])
    assert weights.load_video(tmp_path / "again") == weights.load_video(tmp_path / "merged") != {}
    (tmp_path / "packed" / "vae" / "params.safetensors").write_bytes(b"half")
    assert main(["pack", str(tmp_path / "packed"), str(tmp_path / "third")]) == 2
    assert "incomplete" in capsys.readouterr().err
    assert main(["pack", str(straight / "checkpoints"), str(tmp_path / "third")]) == 2
    assert "no weights folder" in capsys.readouterr().err


def test_a_new_unet_on_a_trained_vae(straight, tmp_path, one_device):
    """Networks that `random_networks` names are drawn, the others are those of `weights`; merging knows which."""
    assert main(["merge", str(straight), str(tmp_path / "base"), "--dtype=float32"]) == 0
    shutil.rmtree(tmp_path / "base" / "unet")
    shutil.rmtree(tmp_path / "base" / "image_encoder")
    random = finetune_config()
    config = finetune_config()
    config.weights = str(tmp_path / "base")
    del config.random_networks.vae
    # Another VAE than the random one.
    vae = jax.tree.map(lambda x: 2 * np.asarray(x), weights.load_params(config.weights, "vae"))
    made = weights.load_config(config.weights, "vae")
    shutil.rmtree(tmp_path / "base" / "vae")
    weights.save_component(tmp_path / "base" / "vae", "vae", made, vae, pathlib.Path("doubled"))

    frozen, expected = (setup.load_frozen(c, setup.networks_of(c), one_device) for c in (config, random))
    assert_same(frozen["vae"], vae)
    for name in ("unet", "image_encoder"):
        assert_same(frozen[name], expected[name])

    # What `straight` trained, had it been trained on this VAE.
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    assert main(["merge", str(workdir), str(tmp_path / "merged"), "--dtype=float32"]) == 0
    written = sorted(file.name for file in (tmp_path / "merged").iterdir())
    assert written == ["dinov2", "image_encoder", "unet", "vae", "video.json"]
    assert_same(weights.load_params(tmp_path / "merged", "vae"), vae)
    assert main(["merge", str(straight), str(tmp_path / "plain"), "--dtype=float32"]) == 0
    for name in ("unet", "image_encoder"):
        assert_same(*(weights.load_params(tmp_path / folder, name) for folder in ("merged", "plain")))


def test_merging_says_what_it_needs(straight, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    assert main(["merge", str(straight), str(tmp_path / "there")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "there"), str(tmp_path / "out")]) == 2
    assert "config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_merging_onto_a_weights_folder_copies_the_other_networks(straight, tmp_path, capsys):
    """Twice the same student: the folder that is merged into is the first's result."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["merge", str(straight), str(first)]) == 0
    shutil.rmtree(first / "dinov2")
    assert main(["merge", str(straight), str(second), f"--weights={first}", "--dtype=float16"]) == 0
    assert "unet, vae, image_encoder" in capsys.readouterr().out
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(weights.load_params(second, "unet"))}
    assert dtypes == {"float16"}
    assert_same(weights.load_params(second, "vae"), weights.load_params(first, "vae"))


@pytest.mark.integration
def test_a_run_without_lora_has_none_to_export(whole, tmp_path, capsys):
    assert main(["export-lora", str(whole), str(tmp_path / "out"), "--format=peft"]) == 2
    assert "trained no LoRA" in capsys.readouterr().err
    assert not load_trained(whole).student.lora


def test_a_finetuned_model_is_sampled_from_as_it_was_trained(straight, tmp_path, monkeypatch):
    """Merged beforehand, or read from the workdir: the same UNet."""
    monkeypatch.setattr("osv_jax.inference.pipeline.SVDUNet", ToyUNet)
    assert main(["merge", str(straight), str(tmp_path / "merged"), "--dtype=float32"]) == 0
    # The random networks that the run began with, as a weights folder.
    base = tmp_path / "base"
    shutil.copytree(tmp_path / "merged", base)
    shutil.rmtree(base / "unet")
    config = finetune_config()
    made = setup.architectures_of(config)
    shapes = {"unet": unflatten_dict(expected_params("unet", made["unet"]))}
    params = fill_randomly(shapes, np.float32)["unet"]
    weights.save_component(base / "unet", "unet", made["unet"], params, pathlib.Path("random"))

    merged = ImageToVideo.load(tmp_path / "merged", dtype="float32")
    read = ImageToVideo.load(base, lora=straight, dtype="float32")
    for (path, actual), expected in zip(
        jax.tree.leaves_with_path(read.params["unet"]), jax.tree.leaves(merged.params["unet"]), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))
    assert read.boundary == "svd"
    # Both make videos like the clips of the run.
    data = config.data
    _, height, width = data.resolutions[-1]
    for model in (merged, read):
        options = model.complete(Options())
        chosen = (options.height, options.width, options.num_frames, options.fps)
        assert chosen == (height, width, data.num_frames, data.fps)
