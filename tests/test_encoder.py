"""What is stored of real clips equals what diffusers' and transformers' encoders make of the same frames."""

import argparse
import copy

import jax
import numpy as np
import pytest
import tiny_pipeline
import torch
from conftest import relative_error
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from flax.traverse_util import flatten_dict, unflatten_dict

from osv_jax import prepare
from osv_jax.data import demo, video
from osv_jax.errors import UserError
from osv_jax.preparation import pipeline as preparation
from osv_jax.preparation.encoder import augmentation, noise_key

SIZE = {"num_frames": 3, "fps": 7.0, "height": 32, "width": 48}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("svd")
    made = tiny_pipeline.save_pipeline(folder / "diffusers")
    tiny_pipeline.import_all(folder / "diffusers", folder / "weights")
    return made, str(folder / "weights")


@pytest.fixture(scope="module")
def encoder(checkpoint):
    _, networks = preparation._networks(argparse.Namespace(weights=checkpoint[1]), None)
    settings = {**SIZE, "num_augmented": 2, "batch_size": 8, "dtype": "float32"}
    return preparation._encoder(checkpoint[1], None, networks, settings)


@pytest.fixture(scope="module")
def clips():
    """Real ones."""
    names = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
    return np.stack([video.read_clip(demo.demo_videos() / name, 1.0, **SIZE) for name in names])


def to_torch(pixels):
    return torch.from_numpy(np.asarray(pixels, np.float32)).movedim(-1, -3)


@pytest.mark.integration
def test_real_clips_are_encoded_as_the_originals_do(checkpoint, encoder, clips):
    reference, _ = checkpoint
    keys = np.stack([noise_key(5, "a.mp4", number) for number in range(len(clips))])
    encoded = encoder(clips, keys)

    def mode(pixels):
        return reference.vae.encode(to_torch(pixels)).latent_dist.mode().movedim(1, -1)

    pixels = clips.astype(np.float32) / 127.5 - 1
    with torch.no_grad():
        for i, frames in enumerate(pixels):
            expected = mode(frames) * reference.vae.config.scaling_factor
            assert relative_error(encoded["latents"][i], expected) <= TOLERANCE

            # As in the pipeline's _encode_image.
            resized = (_resize_with_antialiasing(to_torch(frames[:1]), (224, 224)) + 1) / 2
            normalised = reference.feature_extractor(
                images=resized,
                do_normalize=True,
                do_center_crop=False,
                do_resize=False,
                do_rescale=False,
                return_tensors="pt",
            ).pixel_values
            expected = reference.image_encoder(normalised).image_embeds[0]
            assert relative_error(encoded["image_embedding"][i], expected) <= TOLERANCE

            strengths, noise_keys = augmentation(keys[i], 2)
            np.testing.assert_allclose(encoded["noise_aug_strength"][i], strengths, rtol=1e-6)
            assert 0.005 < strengths.min() < strengths.max() < 0.5 and strengths[0] != strengths[1]
            for k in range(2):
                noise = np.asarray(jax.random.normal(noise_keys[k], frames[0].shape))
                expected = mode((frames[0] + np.asarray(strengths)[k] * noise)[None])[0]
                assert relative_error(encoded["image_latents"][i, k], expected) <= TOLERANCE


@pytest.mark.integration
def test_a_clip_does_not_depend_on_its_batch(encoder, clips):
    keys = np.stack([noise_key(0, "a.mp4", number) for number in range(8)])
    many = encoder(np.concatenate([clips[1:], clips, clips]), keys)
    alone = encoder(clips[1:2], keys[:1])
    for name, value in alone.items():
        np.testing.assert_array_equal(many[name][:1], value)


@pytest.mark.integration
def test_clip_alone_is_computed_in_bfloat16(checkpoint, encoder, clips):
    _, networks = preparation._networks(argparse.Namespace(weights=checkpoint[1]), None)
    settings = {**SIZE, "num_augmented": 2, "batch_size": 8, "dtype": "bfloat16"}
    half = preparation._encoder(checkpoint[1], None, networks, settings)
    keys = np.stack([noise_key(0, "a.mp4", number) for number in range(len(clips))])
    exact, rounded = encoder(clips, keys), half(clips, keys)
    for name in ("latents", "image_latents"):
        np.testing.assert_array_equal(rounded[name], exact[name])
    assert 1e-4 < relative_error(rounded["image_embedding"], exact["image_embedding"]) < 0.05


@pytest.mark.integration
def test_latents_that_are_not_finite_are_not_stored(encoder, clips):
    params = flatten_dict(encoder.params)
    name = ("vae", "quant_conv", "bias")
    params[name] = params[name].at[0].set(np.nan)
    damaged = copy.copy(encoder)
    damaged.params = unflatten_dict(params)
    with pytest.raises(UserError, match="The weights are damaged: vae/quant_conv/bias has values"):
        damaged(clips[:1], np.stack([noise_key(0, "a.mp4", 0)]))


def test_noise_depends_on_seed_video_and_number():
    keys = {noise_key(seed, name, number).tobytes() for seed in (0, 1) for name in "ab" for number in (0, 1)}
    assert len(keys) == 8
    np.testing.assert_array_equal(noise_key(3, "a b.mp4", 12), noise_key(3, "a b.mp4", 12))


def test_a_configuration_is_checked_before_anything_is_written(tmp_path):
    (tmp_path / "config.py").write_text(
        "import micro_stage1\n\n\ndef get_config():\n"
        "    config = micro_stage1.get_config()\n    config.data.fps = float('nan')\n    return config\n"
    )
    base = [f"--source={tmp_path}", f"--output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"config\.data\.fps=nan must be a number"):
        prepare.main([*base, f"--config={tmp_path / 'config.py'}"])
    assert not (tmp_path / "out").exists()
