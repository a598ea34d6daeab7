"""The weights that come with the package: whole, small, attributed, and they know the film."""

import pathlib

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from osv_jax import experiment
from osv_jax.convert import lora_files, weights
from osv_jax.convert.architectures import expected_params
from osv_jax.data import demo, video
from osv_jax.distill.autoencoder import frame_psnr
from osv_jax.image_to_video import ImageToVideo, Options
from osv_jax.models import lora
from osv_jax.models.svd_vae import SVDVAE

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


def test_the_vae_knows_pictures():
    """A frame of the film, from another package, at the size it was trained at."""
    frame = video.read_clip(demo.demo_videos() / "bigbuckbunny.mp4", 1.0, 1, 24.0, 64, 96)
    pixels = frame[None].astype(np.float32) / 127.5 - 1
    params = weights.load_params("miniature", "vae", dtype=np.float32)
    output = SVDVAE(weights.load_config("miniature", "vae")).apply({"params": params}, pixels)
    assert float(frame_psnr(output, pixels).mean()) > 22


def test_its_unet_is_the_one_of_its_configuration():
    """That draws the UNet and nothing else."""
    config = experiment.read_config(f"{CONFIGS / 'finetune.py'}:miniature")
    experiment.check_config(config)
    made = experiment.architectures_of(config)
    assert experiment.random_components(config) == {"unet"}
    assert made == {name: weights.load_config("miniature", name) for name in made}
    assert weights.load_video("miniature") == {"height": 64, "width": 96, "num_frames": 14, "fps": 12.0}


def test_its_unet_can_be_adapted_to_other_clips():
    """A LoRA of the stored UNet, not of a random one."""
    config = experiment.read_config(f"{CONFIGS / 'finetune.py'}:miniature_lora")
    experiment.check_config(config)
    assert not experiment.random_components(config)
    assert config.trainable == ("lora",) and config.data.dataset == "runs/demo/latents"


def test_stage_2_begins_with_the_lora_of_stage_1():
    """The configurations of both stages hold together, and what is stored is stage 1's."""
    configs = [experiment.read_config(f"{CONFIGS / name}:miniature") for name in ("stage1.py", "stage2.py")]
    for config in configs:
        experiment.check_config(config)
    networks = experiment.networks_of(configs[1])
    read = experiment.read_lora(pathlib.Path(weights.locate(configs[1].init_from)), configs[1], networks)
    assert not read.notice
    own = lora.target_modules(weights.load_params("miniature", "unet"), configs[0].lora.targets)
    assert set(lora_files.ranks(read.lora)) == set(own)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(read.lora)), "a LoRA that nothing has trained"


def test_the_teacher_keeps_its_picture():
    """Few steps from noise, for a frame of the film that was not trained on."""
    clips, fps = demo.held_out_clips()
    model = ImageToVideo.load("miniature")
    options = model.complete(Options(sampler="euler", steps=6))
    assert (options.height, options.width, options.num_frames, options.fps) == (64, 96, 14, fps)
    frames = model(clips[1, 0], sampler="euler", steps=6)
    first, condition = (x[None, :1].astype(np.float32) / 127.5 - 1 for x in (frames, clips[1]))
    assert float(frame_psnr(first, condition).mean()) > 18
