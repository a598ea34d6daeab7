"""The weights that come with the package: whole, small, attributed, and they know the film."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from osv_jax.convert import lora_files, weights
from osv_jax.convert.architectures import expected_params
from osv_jax.data import demo, video
from osv_jax.inference.options import Options
from osv_jax.inference.pipeline import ImageToVideo
from osv_jax.models import lora
from osv_jax.models.svd_vae import SVDVAE
from osv_jax.objectives.autoencoder import frame_psnr
from osv_jax.objectives.random_networks import random_components
from osv_jax.runtime.media import to_float, to_uint8
from osv_jax.training import origins, setup
from osv_jax.training.config import check_config, read_config

FOLDER = pathlib.Path(weights.locate("miniature"))
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("name", ["unet", "vae", "image_encoder", "dinov2"])
def test_the_networks_are_whole(name):
    params = flatten_dict(weights.load_params("miniature", name))
    expected = expected_params(name, weights.load_config("miniature", name))
    assert {path: leaf.shape for path, leaf in params.items()} == {path: x.shape for path, x in expected.items()}
    assert {str(leaf.dtype) for leaf in params.values()} == {"bfloat16"}
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in params.values())


def test_it_is_small_and_names_the_film():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.safetensors")) <= 12e6
    text = (FOLDER / "ATTRIBUTION.txt").read_text()
    assert "Blender Foundation" in text and "CC-BY 3.0" in text


@pytest.mark.integration
def test_the_vae_knows_pictures():
    """A frame of the film, from another package, at the size it was trained at."""
    frame = video.read_clip(demo.demo_videos() / "bigbuckbunny.mp4", 1.0, 1, 24.0, 64, 96)
    pixels = frame[None].astype(np.float32) / 127.5 - 1
    params = weights.load_params("miniature", "vae", dtype=np.float32)
    output = jax.jit(SVDVAE(weights.load_config("miniature", "vae")).apply)({"params": params}, pixels)
    assert float(frame_psnr(output, pixels).mean()) > 22


def test_its_unet_is_the_one_of_its_configuration():
    """That draws the UNet and nothing else."""
    config = read_config(f"{CONFIGS / 'finetune.py'}:miniature")
    check_config(config)
    made = setup.architectures_of(config)
    assert random_components(config) == {"unet"}
    assert made == {name: weights.load_config("miniature", name) for name in made}
    assert weights.load_video("miniature") == {"height": 64, "width": 96, "num_frames": 14, "fps": 12.0}


def test_its_unet_can_be_adapted_to_other_clips():
    """A LoRA of the stored UNet, not of a random one."""
    config = read_config(f"{CONFIGS / 'finetune.py'}:miniature_lora")
    check_config(config)
    assert not random_components(config)
    assert config.trainable == ("lora",) and config.data.dataset == "runs/demo/latents"


def test_stage_2_begins_with_the_lora_of_stage_1():
    """The configurations of both stages hold together, and what is stored is stage 1's."""
    configs = [read_config(f"{CONFIGS / name}:miniature") for name in ("stage1.py", "stage2.py")]
    for config in configs:
        check_config(config)
    networks = setup.networks_of(configs[1])
    read = origins.read_lora(pathlib.Path(weights.locate(configs[1].init_from)), configs[1], networks)
    assert not read.notice
    own = lora.target_modules(weights.load_params("miniature", "unet"), configs[0].lora.targets)
    assert set(lora_files.ranks(read.lora)) == set(own)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(read.lora)), "a LoRA that nothing has trained"


# Of every way to sample a clip that was not trained on: mean squared error of its latents to the teacher's, and their
# mean absolute difference from frame to frame. Measured, of the stored weights; processors differ in the seventh digit.
MEASURED = {
    "teacher": (0.0, 0.118638),
    "untrained": (0.200144, 0.0855735),
    "one step": (0.111556, 0.0512059),
    "two steps": (0.112735, 0.0516525),
    "time travel": (0.111898, 0.0538155),
    "euler": (0.111692, 0.0536116),
}


@pytest.fixture(scope="module")
def sampled():
    """A clip that was not trained on, the teacher, and latents by the teacher in a few steps and by the student."""
    clips, fps = demo.held_out_clips()
    teacher, student = (ImageToVideo.load("miniature", lora) for lora in (None, "miniature/stage2"))
    options = teacher.complete(Options(sampler="euler", steps=5))
    assert (options.height, options.width, options.num_frames, options.fps) == (64, 96, 14, fps)
    noise = teacher.noise(jax.random.key(0)[None], options)
    ways = {
        "teacher": (teacher, {}),
        "untrained": (teacher, {"sampler": "consistency", "steps": 1}),
        "one step": (student, {"sampler": "consistency", "steps": 1}),
        "two steps": (student, {"sampler": "consistency", "steps": 2}),
        "time travel": (student, {"sampler": "tts", "steps": 1}),
        "euler": (student, {"steps": 3, "max_guidance_scale": 1.0}),
    }
    latents = {
        name: np.asarray(model.sample(clips[1, :1], noise, dataclasses.replace(options, **chosen)))
        for name, (model, chosen) in ways.items()
    }
    return clips[1], teacher, latents


@pytest.mark.integration
def test_the_teacher_keeps_its_picture(sampled):
    """Few steps from noise, for a frame of the film that was not trained on."""
    clip, teacher, latents = sampled
    first = to_float(to_uint8(teacher.decode(latents["teacher"][:, :2], 2))[:, :1])
    assert float(frame_psnr(first, to_float(clip[None, :1])).mean()) > 18


@pytest.mark.integration
def test_the_stored_student_comes_to_its_teacher_by_every_sampler(sampled):
    _, _, latents = sampled
    error = {name: ((made - latents["teacher"]) ** 2).mean() for name, made in latents.items()}
    assert error["one step"] < error["untrained"] / 1.5
    # It has learnt the second level, too, which the other samplers visit.
    assert max(error["two steps"], error["time travel"]) < 1.02 * error["one step"]


@pytest.mark.integration
@pytest.mark.parametrize("way", MEASURED)
def test_every_sampler_makes_of_the_stored_weights_what_it_made_of_them(sampled, way):
    """A tolerance of 3e-5: what tells time travel's mean of two noises from either of them alone is five times that."""
    _, _, latents = sampled
    error = ((latents[way] - latents["teacher"]) ** 2).mean()
    motion = np.abs(np.diff(latents[way], axis=1)).mean()
    assert (error, motion) == pytest.approx(MEASURED[way], rel=3e-5)
