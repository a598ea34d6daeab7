"""Sampling that does not wait for the devices, and decodes with a small network."""

import threading
import types

import jax
import numpy as np
import pytest
import tiny_student
from conftest import relative_error
from PIL import Image

from osv_jax import sample
from osv_jax.convert.weights import save_component
from osv_jax.errors import UserError
from osv_jax.inference import clock
from osv_jax.inference.options import CompleteOptions, Options
from osv_jax.inference.pipeline import ImageToVideo
from osv_jax.models.tiny_decoder import TinyDecoderConfig
from osv_jax.objectives.random_networks import random_frozen

HEIGHT, WIDTH, FRAMES = 16, 24, 3
SIZE = [f"--height={HEIGHT}", f"--width={WIDTH}", f"--num_frames={FRAMES}", "--decode_chunk_size=2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The smallest networks, with a tiny decoder."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_student.save(folder, {"fps": 7.0}, ())
    save_tiny_decoder(folder / "weights", TinyDecoderConfig(channels=8, num_upsamples=1))
    return folder / "weights"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for seed, name in enumerate(("one.png", "two.png")):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)).save(folder / name)
    return folder


def save_tiny_decoder(folder, config):
    params = random_frozen({"tiny_decoder": config}, np.float32)["tiny_decoder"]
    save_component(folder / "tiny_decoder", "tiny_decoder", config, params, folder)


def test_the_next_video_is_begun_before_the_last_one_is_waited_for(images):
    events = []

    class Counting(ImageToVideo):
        """Says what is asked of it."""

        def __init__(self):
            self.clock = clock.Clock()

        def noise(self, keys, options):
            return None

        def sample(self, images, noise, options):
            events.append("UNet")
            return events.count("UNet")

        def start_decoding(self, number, chunk_size):
            events.append(f"decode {number}")
            return [np.full((1, 1, 1, 1, 3), number, np.uint8)]

        def pixels(self, decoded):
            events.append(f"frames {decoded[0].min()}")
            return decoded[0]

    three = [images / "one.png", images / "two.png", images / "one.png"]
    options = CompleteOptions(steps=1, height=8, width=8, num_frames=1, fps=7)
    for i, frames, _ in sample.make_videos(Counting(), three, 0, options):
        assert frames.min() == i + 1
        events.append(f"write {i + 1}")
    first = ["UNet", "decode 1", "UNet", "decode 2", "frames 1", "write 1"]
    assert events == [*first, "UNet", "decode 3", "frames 2", "write 2", "frames 3", "write 3"]


def test_parts_are_timed_while_nobody_waits_for_them(monkeypatch):
    released, begun, seconds = threading.Event(), [], {"a": 0.0, "b": 0.0}
    # Both are started before the first is done.
    readings = iter((0.0, 1.0, 5.0, 7.0))
    monkeypatch.setattr(clock, "time", types.SimpleNamespace(perf_counter=lambda: next(readings)))
    timing = clock.Clock()
    timing.add(seconds, "a", types.SimpleNamespace(block_until_ready=released.wait), lambda: begun.append("a"))
    first = timing.last
    timing.add(seconds, "b", np.zeros(1), lambda: begun.append("b"))
    assert not first.done() and not timing.last.done() and "b" not in begun
    released.set()
    timing.last.result()
    assert begun == ["a", "b"] and seconds == {"a": 5.0, "b": 2.0}


@pytest.mark.integration
def test_the_tiny_decoder_decodes(weights, images, tmp_path):
    """Instead of the VAE, in any parts, also in the program."""
    pixels = np.asarray(Image.open(images / "one.png"))
    tiny = ImageToVideo.load(weights, decoder="tiny")
    options = tiny.complete(Options(height=HEIGHT, width=WIDTH, num_frames=FRAMES))
    latents = tiny.sample(pixels[None], tiny.noise(jax.random.key(4)[None], options), options)
    expected, _ = jax.jit(tiny.codec.tiny_decoder.apply)({"params": tiny.params["tiny_decoder"]}, latents)
    for chunk_size in (FRAMES, 2):
        assert relative_error(tiny.decode(latents, chunk_size), expected) <= 1e-5
    arguments = [f"--weights={weights}", *SIZE, "--decoder=tiny", "--decode_dtype=bfloat16"]
    sample.main([*arguments, f"--image={images}/one.png", f"--output={tmp_path}/clip"])
    written = [np.asarray(Image.open(tmp_path / "clip" / f"{i:03d}.png")) for i in range(FRAMES)]
    rough = ImageToVideo.load(weights, decoder="tiny", decode_dtype="bfloat16")
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "decode_chunk_size": 2}
    np.testing.assert_array_equal(written, rough(pixels, **size))


def test_a_tiny_decoder_must_fit_the_vae(weights, tmp_path):
    for name in ("unet", "vae", "image_encoder"):
        (tmp_path / name).symlink_to(weights / name)
    save_tiny_decoder(tmp_path, TinyDecoderConfig(channels=8))
    with pytest.raises(UserError, match="makes 8 x 8 pixels of a latent of 4 channels, but the VAE 2 x 2 of 4"):
        ImageToVideo.load(tmp_path, decoder="tiny")
