"""The weights that come with the package: whole, small, attributed, and a UNet can be trained on them."""

import pathlib

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from osv_jax import experiment
from osv_jax.convert import weights
from osv_jax.convert.architectures import expected_params
from osv_jax.data import demo, video
from osv_jax.distill.autoencoder import frame_psnr
from osv_jax.errors import UserError
from osv_jax.models.svd_vae import SVDVAE

FOLDER = pathlib.Path(weights.locate("miniature"))
CONFIG = f"{pathlib.Path(__file__).parents[1] / 'configs' / 'finetune.py'}:miniature"


@pytest.mark.parametrize("name", ["vae", "image_encoder", "dinov2"])
def test_the_networks_are_whole(name):
    params = flatten_dict(weights.load_params("miniature", name))
    expected = expected_params(name, weights.load_config("miniature", name))
    assert {path: leaf.shape for path, leaf in params.items()} == {path: x.shape for path, x in expected.items()}
    assert {str(leaf.dtype) for leaf in params.values()} == {"bfloat16"}
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in params.values())


def test_it_is_small_and_names_the_film():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 12e6
    text = (FOLDER / "ATTRIBUTION.txt").read_text()
    assert "Blender Foundation" in text and "CC-BY 3.0" in text


def test_the_vae_knows_pictures():
    """A frame of the film, from another package, at the size it was trained at."""
    frame = video.read_clip(demo.demo_videos() / "bigbuckbunny.mp4", 1.0, 1, 24.0, 64, 96)
    pixels = frame[None].astype(np.float32) / 127.5 - 1
    params = weights.load_params("miniature", "vae", dtype=np.float32)
    output = SVDVAE(weights.load_config("miniature", "vae")).apply({"params": params}, pixels)
    assert float(frame_psnr(output, pixels).mean()) > 22


def test_a_unet_is_trained_on_it():
    """Its configuration draws the UNet and nothing else; packed beside the others it is at most 12 MB."""
    config = experiment.read_config(CONFIG)
    experiment.check_config(config)
    made = experiment.architectures_of(config)
    assert experiment.random_components(config) == {"unet"}
    assert made["vae"] == weights.load_config("miniature", "vae")
    assert made["unet"].cross_attention_dim == made["image_encoder"].projection_dim
    size = 2 * sum(np.prod(x.shape) for x in expected_params("unet", made["unet"]).values())
    others = sum((FOLDER / name / "params.safetensors").stat().st_size for name in ("vae", "image_encoder", "dinov2"))
    assert size + others < 11.9e6


def test_what_is_not_there_yet_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "locate", lambda folder: weights.epath.Path(tmp_path))
    with pytest.raises(UserError, match=r"no unet yet.*docs/miniature.md"):
        weights.load_config("miniature", "unet")
