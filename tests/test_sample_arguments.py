"""What `osv_jax.sample` is asked for: images, outputs and numbers, and what is wrong with them."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tiny_pipeline
from flax.traverse_util import flatten_dict
from PIL import Image
from test_sample import SIZE

from osv_jax import sample
from osv_jax.convert.time_travel_scheduler import TimeTravelScheduler
from osv_jax.errors import UserError
from osv_jax.inference.pipeline import ImageToVideo


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("svd")
    tiny_pipeline.save_pipeline(folder / "diffusers")
    tiny_pipeline.import_all(folder / "diffusers", folder / "weights")
    return folder / "weights"


@pytest.fixture
def images(tmp_path_factory):
    """A folder with two files."""
    images = tmp_path_factory.mktemp("images")
    for name in ("one.png", "two.png"):
        Image.new("RGB", (50, 70)).save(images / name)
    return images


def test_what_comes_with_the_package_is_found_by_name():
    models = [ImageToVideo.load("miniature", lora) for lora in (None, "miniature/stage1")]
    base, merged = (flatten_dict(model.params["unet"]) for model in models)
    changed = [path for path in base if not np.array_equal(base[path], merged[path])]
    assert changed and all(path[-1] == "kernel" for path in changed)


def test_several_images_make_folders_in_a_folder(images, tmp_path):
    outputs = sample.plan_outputs(sorted(images.iterdir()), str(tmp_path / "out"))
    assert outputs == [tmp_path / "out" / "one", tmp_path / "out" / "two"]
    assert all(output.is_dir() and not list(output.iterdir()) for output in outputs)


def test_a_folders_images_are_its_files_that_are_not_hidden(images, tmp_path):
    """macOS's notes, folders that are called like images, and other files are left out, links are not."""
    for name in ("._one.png", "one.txt"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "LINK.JPG").symlink_to(images / "one.png")
    assert sample.list_images([str(tmp_path), "named.txt"]) == [tmp_path / "LINK.JPG", pathlib.Path("named.txt")]
    (tmp_path / "LINK.JPG").unlink()
    with pytest.raises(UserError, match=r"holds no images: expected files ending in .*\.heic"):
        sample.list_images([str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image=missing.png"], ["missing.png does not exist"]),
        (["--image=corrupt.png"], ["corrupt.png cannot be read as an image"]),
        (["--image=cut.png"], ["cut.png cannot be read as an image"]),
        (["--image=empty"], ["empty holds no images"]),
        ([f"--image={300 * 'x'}"], ["cannot be reached (File name too long)"]),
        (["--output=corrupt.png/clip.mp4"], ["corrupt.png cannot be written to", "--output"]),
        (["--output=empty.mp4"], ["empty.mp4 is a folder", "--output"]),
        (["--output=empty/.mp4"], ["empty/.mp4 has an ending but no name"]),
        (["--output=locked.mp4"], ["locked.mp4 is read-only", "--output"]),
        ([f"--output={300 * 'x'}.mp4"], ["cannot be reached (File name too long)", "another name"]),
        ([f"--output={300 * 'x'}"], ["cannot be reached (File name too long)", "another name"]),
        (["--output=/proc/clips/a.mp4"], ["/proc/clips cannot be written to", "--output"]),
        (["--image=still.gif", "--output=still.gif"], ["--output=still.gif is where still.gif is"]),
        (["--output=other/..", "--image=good.png"], ["is where good.png is"]),
        (["--output=pictures"], ["pictures/001.png is a folder"]),
        (["--output=clip.avi"], ["clip.avi", ".mp4", "PNG"]),
        (["--image", "good.png", "other/good.png", "--output=a.mp4"], ["2 images", "{name}"]),
        (["--image", "good.png", "other/good.png", "--output={name}.mp4"], ["good.mp4", "rename"]),
        (["--height=25"], ["height=25 is not divisible by 2"]),
        (["--width=-8"], ["width=-8"]),
        (["--steps=0"], ["steps=0 must be a whole number from 1 to 1000"]),
        (["--steps=100"], ["steps=100", "at most 99"]),
        (["--steps=many"], ["many", "--steps"]),
        (["--num_frames=0"], ["num_frames=0"]),
        (["--decode_chunk_size=0"], ["decode_chunk_size=0"]),
        (["--fps=0"], ["fps=0"]),
        (["--fps=nan"], ["fps=nan must be a number from 0.1 to 240"]),
        (["--fps=inf"], ["fps=inf"]),
        (["--fps=1e10"], ["fps=10000000000.0"]),
        (["--fps=0.0001"], ["fps=0.0001"]),
        (["--fps=60", "--output=clip.gif"], ["fps=60", "clip.gif", "at most 50"]),
        (["--height=80000000"], ["height=80000000 must be a whole number from 1 to 8192"]),
        (["--num_frames=1000000"], ["num_frames=1000000"]),
        (["--motion_bucket_id=nan"], ["motion_bucket_id=nan must be a number from 0 to 1023"]),
        (["--noise_aug_strength=-1"], ["noise_aug_strength=-1"]),
        (["--noise_aug_strength=inf"], ["noise_aug_strength=inf"]),
        (["--min_guidance_scale=nan"], ["min_guidance_scale=nan must be a finite number"]),
        (["--max_guidance_scale=inf"], ["max_guidance_scale=inf"]),
        (["--seed=-1"], ["--seed: -1 must be a whole number from 0 to 4294967295"]),
        (["--seed=4294967296"], ["--seed: 4294967296"]),
        (["--seed=18446744073709551615"], ["--seed: 18446744073709551615"]),
        (["--sampler=ddim"], ["ddim", "tts", "euler"]),
        (["--decode_dtype=int8"], ["int8", "float16"]),
        (["--decoder=small"], ["small", "tiny"]),
        (["--decoder=tiny"], ["tiny_decoder does not exist", "osv_jax.convert_weights tiny-decoder TAESDV_PTH"]),
        (["--no_such_flag=1"], ["no_such_flag"]),
        (["--weights=nowhere"], ["osv_jax.convert_weights svd"]),
        (["--lora=nowhere"], ["nowhere does not exist"]),
        (["--lora=empty"], ["empty holds no LoRA", "adapter_config.json"]),
        (["--lora=good.png", "--ema"], ["--ema"]),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_compiled(arguments, words, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ImageToVideo, "_run", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.mp4").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "pictures" / "001.png").mkdir(parents=True)
    Image.new("RGB", (200, 100), "red").save("good.png")
    Image.new("RGB", (200, 100), "red").save("still.gif")
    (tmp_path / "locked.mp4").touch(0o444)
    Image.effect_noise((200, 100), 50).save("other/good.png")
    (tmp_path / "corrupt.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "other" / "good.png").read_bytes()[:5000])
    defaults = {"--image": "good.png", "--output": "clip.mp4", "--weights": str(weights)}
    given = {argument.split("=")[0] for argument in arguments}
    defaults = [f"{name}={value}" for name, value in defaults.items() if name not in given]
    with pytest.raises(UserError) as error:
        sample.main([*defaults, *SIZE, *arguments])
    sentence = str(error.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence


def test_the_program_ends_with_status_2_and_one_line(tmp_path):
    command = [sys.executable, "-m", "osv_jax.sample", "--image=x.png", f"--output={tmp_path}/x.mp4", "--weights=w"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert result.returncode == 2
    assert result.stderr == "error: x.png does not exist: give an image file.\n" and result.stdout == ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"seed": -1}, "seed=-1 must be a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"number": -1}, "number=-1"),
        ({"fps": float("inf")}, "fps=inf"),
    ],
)
def test_python_refuses_the_same_numbers(given, words):
    model = ImageToVideo.__new__(ImageToVideo)  # Nothing is loaded for it.
    with pytest.raises(UserError, match=words):
        model(np.zeros((24, 40, 3), np.uint8), **given)


def test_the_scheduler_refuses_what_our_sampler_refuses():
    with pytest.raises(ValueError, match="'euler'"):
        TimeTravelScheduler(sampler="euler")
    with pytest.raises(ValueError, match="'none'"):
        TimeTravelScheduler(boundary="none")
    for steps in (0, 11):
        with pytest.raises(ValueError, match="10 noise levels"):
            TimeTravelScheduler(num_levels=10).set_timesteps(steps)
