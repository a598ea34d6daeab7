"""What a run made of AnimateDiff, opened by diffusers and PEFT: the same noise as here."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_animatediff
import torch
import transformers
from conftest import quick_jit, relative_error
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from exported_runs import python_lines
from flax.traverse_util import flatten_dict, unflatten_dict
from peft import PeftModel
from PIL import Image
from tool import convert as main

from osv_jax.convert.text_to_video import video_unet, video_unet_shapes
from osv_jax.convert.weights import load_config, load_params
from osv_jax.diffusion import ddpm
from osv_jax.inference.bases import PARTS
from osv_jax.inference.trained import load_trained, read_student
from osv_jax.models.lora import init_lora, target_modules
from osv_jax.models.text_unet import TextUNet
from osv_jax.objectives.players import Player, Student, TrainState
from osv_jax.runtime import checkpoint

FRAMES = 3
DATA = {"num_frames": FRAMES, "resolutions": [[0, 16, 24]]}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folders `sd` and `motion`, and `weights` imported from them."""
    folder = tmp_path_factory.mktemp("animatediff")
    tiny_animatediff.save_checkpoint(folder)
    tiny_animatediff.import_all(folder, folder / "weights")
    return folder


@pytest.fixture(scope="module")
def networks(home):
    """The video UNet, compiled, and its parameters as imported."""
    network = TextUNet(*(load_config(home / "weights", part) for part in PARTS))
    return quick_jit(network.apply), video_unet(*(load_params(home / "weights", part) for part in PARTS))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    sample, context = rng.standard_normal((2, FRAMES, 5, 7, 4)), rng.standard_normal((2, 77, 24))
    return sample.astype(np.float32), np.array([999.0, 3.0], np.float32), context.astype(np.float32)


def save_run(workdir, home, student):
    config = {"weights": str(home / "weights"), "lora": {"alpha": 8.0, "rank": 4}, "data": DATA, "student_every": 2}
    checkpoint.write_config(workdir, config)
    with checkpoint.open_checkpoints(workdir, 1) as checkpoints:
        checkpoint.save(checkpoints, 9, TrainState(np.int32(9), {"student": Player(student, {}, (), student)}), {})
    return workdir


@pytest.fixture(scope="module")
def tuned(home, networks):
    """A run that trained all parameters, as AVDM2's does."""
    rng = np.random.default_rng(2)
    changed = jax.tree.map(lambda x: np.asarray(x + 0.05 * rng.standard_normal(x.shape, np.float32)), networks[1])
    return save_run(home / "runs" / "tuned", home, Student(lora={}, tuned=changed)), changed


@pytest.fixture(scope="module")
def lora_run(home, networks):
    """A run that trained a LoRA of every kind of module, alpha twice its rank."""
    rng, params = np.random.default_rng(3), networks[1]
    lora = jax.eval_shape(lambda key: init_lora(key, params, 4, target_modules(params, "all")), jax.random.key(0))
    lora = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape, np.float32)), lora)
    return save_run(home / "runs" / "lora", home, Student(lora=lora, tuned={}))


def theirs(unet, inputs):
    sample, t, context = (torch.tensor(x) for x in inputs)
    with torch.no_grad():
        noise = unet(sample.permute(0, 4, 1, 2, 3), t, context.repeat_interleave(FRAMES, dim=0)).sample
    return noise.permute(0, 2, 3, 4, 1).numpy()


@pytest.mark.integration
def test_a_student_is_opened_by_diffusers(home, networks, tuned, inputs, tmp_path):
    assert main(["export-lora", str(tuned[0]), str(tmp_path / "out"), "--format=unet"]) == 0
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    adapter, loading = MotionAdapter.from_pretrained(tmp_path / "out" / "motion_adapter", output_loading_info=True)
    assert not any(loading.values()), loading
    made = theirs(UNetMotionModel.from_unet2d(unet, adapter).eval(), inputs)
    assert relative_error(made, networks[0]({"params": tuned[1]}, *inputs)) < 1e-4
    # What was opened is what was trained, and not what it began with.
    assert relative_error(made, networks[0]({"params": networks[1]}, *inputs)) > 0.01


@pytest.mark.integration  # Programs of conversion, as the next but one.
def test_merged_weights_are_the_student_with_everything_beside_it(home, tuned, tmp_path):
    assert main(["merge", str(tuned[0]), str(tmp_path / "out"), "--dtype=float32"]) == 0
    merged = flatten_dict(video_unet(*(load_params(tmp_path / "out", part) for part in PARTS)))
    for path, leaf in flatten_dict(tuned[1]).items():
        np.testing.assert_array_equal(merged[path], leaf)
    kept = {"image_vae", "text_encoder", "tokenizer"}
    assert kept <= {folder.name for folder in (tmp_path / "out").iterdir()}
    assert json.loads((tmp_path / "out" / "video.json").read_text()) == {
        "height": 16,
        "width": 24,
        "num_frames": FRAMES,
    }


def test_a_lora_is_peft_of_diffusers_modules(home, networks, lora_run, inputs, tmp_path):
    """Text and frames are many keys: unlike in SVD, cross-attention's q and k take part."""
    assert main(["export-lora", str(lora_run), str(tmp_path / "peft"), "--format=peft"]) == 0
    parts = UNet2DConditionModel.from_pretrained(home / "sd" / "unet"), MotionAdapter.from_pretrained(home / "motion")
    unet = PeftModel.from_pretrained(UNetMotionModel.from_unet2d(*parts), tmp_path / "peft").merge_and_unload()
    modules = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["target_modules"]
    for module in ("attentions.0.transformer_blocks.0.attn2.to_k", "motion_modules.0.transformer_blocks.0.attn2.to_q"):
        assert f"down_blocks.0.{module}" in modules
    merged = load_trained(lora_run).merge_into(networks[1])
    expected = networks[0]({"params": merged}, *inputs)
    assert relative_error(theirs(unet.eval(), inputs), expected) < 1e-4
    assert relative_error(networks[0]({"params": networks[1]}, *inputs), expected) > 0.01


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["unet", "peft"])
def test_the_card_of_an_export_makes_a_video_with_the_students_sampler(
    home, tuned, lora_run, kind, tmp_path, monkeypatch
):
    """Its lines are run as they stand, beside a pipeline of Stable Diffusion and a motion adapter."""
    monkeypatch.chdir(tmp_path)
    source = home / "sd"
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(source / "vae"),
        text_encoder=transformers.CLIPTextModel.from_pretrained(source / "text_encoder"),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(source / "tokenizer", model_max_length=77),
        unet=UNet2DConditionModel.from_pretrained(source / "unet"),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained("sd15")
    shutil.copytree(home / "motion", "motion")
    assert main(["export-lora", str(tuned[0] if kind == "unet" else lora_run), "carded", f"--format={kind}"]) == 0
    card = pathlib.Path("carded", "README.md").read_text()
    assert "pipeline_tag: text-to-video" in card and "Trained from AnimateDiff" in card and "after 9 steps" in card
    assert "Video Diffusion" not in card and not pathlib.Path("carded", "time_travel_scheduler.py").exists()
    loaded = {}
    for lines in python_lines(pathlib.Path("carded", "README.md")):
        exec(lines, loaded)
    with Image.open("cat.gif") as made:
        assert made.size == (24, 16) and made.n_frames == FRAMES
    scheduler = loaded["pipe"].scheduler
    times = ddpm.few_step_times(4)
    assert scheduler.timesteps.tolist() == times.tolist()
    scheduler.set_timesteps(4)
    rng = np.random.default_rng(4)
    x, eps = (rng.standard_normal((1, 4, FRAMES, 8, 12)).astype(np.float32) for _ in range(2))
    for t in times:
        predicted = scheduler.step(torch.tensor(eps), int(t), torch.tensor(x)).denoised.numpy()
        expected = ddpm.remove_noise(x, eps, jnp.array([t]), ddpm.animatediff_schedule())
        assert relative_error(predicted, expected) < 1e-4


@pytest.mark.integration
def test_an_exported_lora_is_read_again(networks, lora_run, tmp_path):
    shapes = flatten_dict(networks[1])
    for kind in ("peft", "diffusers", "kohya"):
        assert main(["export-lora", str(lora_run), str(tmp_path / kind), f"--format={kind}"]) == 0
        path = tmp_path / kind / f"{kind}.safetensors" if kind == "kohya" else tmp_path / kind
        read, notice = read_student(path, False, shapes)
        assert notice == ""
        expected = flatten_dict(load_trained(lora_run).student.lora)
        for name, leaf in flatten_dict(read.student.lora).items():
            np.testing.assert_allclose(leaf, expected.pop(name), rtol=1e-6)
        assert not expected


def test_formats_of_svd_are_refused_in_one_sentence(tuned, lora_run, tmp_path, capsys):
    for run, kind, words in (
        (tuned[0], "single-file", "use --format=unet"),
        (lora_run, "comfyui", "--format=comfyui is for SVD"),
    ):
        assert main(["export-lora", str(run), str(tmp_path / kind), f"--format={kind}"]) == 2
        told = capsys.readouterr().err
        assert words in told and told.count("\n") == 1


def test_shapes_are_those_of_both(home, networks):
    shapes = video_unet_shapes(*(load_config(home / "weights", part) for part in PARTS))
    assert {path: leaf.shape for path, leaf in shapes.items()} == {
        path: leaf.shape for path, leaf in flatten_dict(networks[1]).items()
    }
    assert unflatten_dict(shapes).keys() == networks[1].keys()
