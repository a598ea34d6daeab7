"""Image conditioning against the internals of diffusers' SVD pipeline."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from conftest import relative_error
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing

from osv_jax.diffusion.conditioning import Conditioning, added_time_ids, clip_pixels, condition_on_image

FPS, BUCKET, AUG = 7, 127, 0.02


@pytest.fixture(scope="module")
def pipeline():
    """diffusers' own pipeline around tiny random networks."""
    torch.manual_seed(0)
    clip = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=32,
        initializer_factor=5.0,
    )
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=(32,) * 4, layers_per_block=1
    )
    unet = UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 32),
        layers_per_block=1,
        num_attention_heads=2,
        cross_attention_dim=24,
    )
    return StableVideoDiffusionPipeline(
        vae=vae.eval(),
        image_encoder=transformers.CLIPVisionModelWithProjection(clip).eval(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        # SVD's preprocessor_config.json says the same.
        feature_extractor=transformers.CLIPImageProcessorPil(),
    )


@pytest.fixture(scope="module")
def pictures():
    """Two pictures, larger than CLIP's input in one direction and smaller in the other."""
    noise = np.random.default_rng(1).integers(0, 256, (2, 200, 328, 3), np.uint8)
    # Half noise, half a ramp: all frequencies, and a mean that is not grey.
    ramp = np.linspace(0, 255, 328)[None, None, :, None] * np.array([1.0, 0.6, 0.2])
    return ((noise + ramp) / 2).astype(np.uint8)


@pytest.fixture(scope="module")
def images(pictures):
    return jnp.asarray(pictures, jnp.float32) / 127.5 - 1


def channels_first(x):
    return torch.from_numpy(np.array(x)).movedim(-1, 1)


@pytest.mark.parametrize("size", [(320, 571), (576, 1024), (224, 224), (225, 90), (97, 1300), (2, 3)])
def test_clip_pixels_are_diffusers_resized_pixels(size, rng):
    image = rng.uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    resized = _resize_with_antialiasing(channels_first(image), (224, 224)).movedim(1, -1).numpy()
    processor = transformers.CLIPImageProcessorPil()
    expected = ((resized + 1) / 2 - np.array(processor.image_mean)) / np.array(processor.image_std)
    assert relative_error(clip_pixels(jnp.asarray(image)), expected) <= 1e-5


def test_clip_pixels_resize_to_other_sizes(rng):
    image = rng.uniform(-1, 1, (1, 80, 111, 3)).astype(np.float32)
    expected = _resize_with_antialiasing(channels_first(image), (28, 28)).movedim(1, -1)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    assert relative_error((clip_pixels(jnp.asarray(image), 28) * std + mean) * 2 - 1, expected) <= 1e-5


def test_an_axis_of_one_pixel_is_repeated():
    line = jnp.linspace(-1, 1, 5 * 3).reshape(1, 1, 5, 3)
    pixels = clip_pixels(line, 8)
    assert jnp.allclose(pixels, clip_pixels(jnp.repeat(line, 3, axis=1), 8), atol=1e-6)


def test_matches_the_pipeline(pipeline, pictures, images, rng):
    noise = rng.standard_normal(images.shape, dtype=np.float32)
    photos = [PIL.Image.fromarray(picture) for picture in pictures]
    with torch.no_grad():
        # What `StableVideoDiffusionPipeline.__call__` does before the first step.
        embedding = pipeline._encode_image(photos, "cpu", 1, True)
        preprocessed = pipeline.video_processor.preprocess(photos, height=200, width=328)
        noisy = preprocessed + AUG * channels_first(noise)
        latents = pipeline._encode_vae_image(noisy, "cpu", 1, True)
        ids = pipeline._get_add_time_ids(FPS - 1, BUCKET, AUG, torch.float32, 2, 1, True)

    def encode_image(pixels):
        with torch.no_grad():
            return jnp.asarray(pipeline.image_encoder(channels_first(pixels)).image_embeds.numpy())

    def encode_mode(image):
        with torch.no_grad():
            mode = pipeline.vae.encode(channels_first(image)).latent_dist.mode()
        return jnp.asarray(mode.movedim(1, -1).numpy())

    actual = condition_on_image(encode_image, encode_mode, images, jnp.asarray(noise), jnp.full(2, AUG), FPS, BUCKET)
    # The pipeline stacks the unconditional half first; its embedding has an axis of one key.
    assert relative_error(actual.image_embedding, embedding[2:, 0]) <= 2e-5
    assert relative_error(actual.image_latents, latents[2:].movedim(1, -1)) <= 2e-5
    assert relative_error(actual.added_time_ids, ids[2:]) <= 1e-6
    dropped = actual.unconditional()
    np.testing.assert_array_equal(dropped.image_embedding, embedding[:2, 0])
    np.testing.assert_array_equal(dropped.image_latents, latents[:2].movedim(1, -1))
    assert relative_error(dropped.added_time_ids, ids[:2]) <= 1e-6


def test_every_clip_has_its_own_strength_and_only_the_vae_sees_the_noise(rng):
    image, noise = (jnp.asarray(rng.uniform(-1, 1, (2, 16, 24, 3)), jnp.float32) for _ in range(2))
    strength = jnp.array([0.0, 0.5])

    def encode_image(pixels):
        return pixels.reshape(2, -1)

    def encode_mode(image):
        return jnp.pad(image, ((0, 0), (0, 0), (0, 0), (0, 1)))

    actual = condition_on_image(encode_image, encode_mode, image, noise, strength, jnp.array([7, 25]), 127, 8)
    np.testing.assert_array_equal(actual.image_embedding, clip_pixels(image, 8).reshape(2, -1))
    np.testing.assert_array_equal(actual.image_latents[0, ..., :3], image[0])
    np.testing.assert_allclose(actual.image_latents[1, ..., :3], image[1] + 0.5 * noise[1], atol=1e-5)
    np.testing.assert_allclose(actual.added_time_ids, [[6, 127, 0], [24, 127, 0.5]])


def test_added_time_ids_are_float32_one_row_a_clip():
    strengths = jnp.array([0.1, 0.2, 0.3], jnp.bfloat16)
    ids = added_time_ids(7, jnp.array([30, 127, 200]), strengths)
    assert ids.dtype == jnp.float32
    np.testing.assert_array_equal(ids, np.stack([[6, 6, 6], [30, 127, 200], strengths.astype(jnp.float32)], axis=1))


def test_conditioning_is_a_pytree():
    conditioning = Conditioning(jnp.ones((1, 2)), jnp.ones((1, 3, 5, 4)), jnp.ones((1, 3)))
    doubled = jax.jit(lambda c: jax.tree.map(lambda x: 2 * x, c))(conditioning)
    assert {field.name for field in dataclasses.fields(doubled)} == {
        "image_embedding",
        "image_latents",
        "added_time_ids",
    }
    assert all(float(leaf.max()) == 2 for leaf in jax.tree.leaves(doubled))
