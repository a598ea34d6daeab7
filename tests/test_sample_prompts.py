"""From a prompt to a video: parity with diffusers' pipeline, the program, and what it says about bad input."""

import json
import shutil

import av
import jax
import numpy as np
import pytest
import tiny_animatediff
import torch
from conftest import relative_error
from PIL import Image

from osv_jax import sample
from osv_jax.diffusion import ddpm
from osv_jax.errors import UserError
from osv_jax.inference.text_options import TextOptions
from osv_jax.inference.text_to_video import TextNoise, TextToVideo

# Odd sizes of latents, which the UNet halves: 3 x 5.
SIZE = {"height": 24, "width": 40}
ARGUMENTS = ["--height=24", "--width=40", "--num_frames=2", "--steps=1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("animatediff")
    return folder, tiny_animatediff.save_checkpoint(folder, levels=4)


@pytest.fixture(scope="module")
def weights(checkpoint):
    tiny_animatediff.import_all(checkpoint[0], checkpoint[0] / "weights")
    return checkpoint[0] / "weights"


@pytest.fixture(scope="module")
def model(weights):
    return TextToVideo.load(weights)


@pytest.mark.integration
def test_ddim_is_the_pipeline_of_diffusers(checkpoint, model):
    """Two prompts, one of them too long and with a negative prompt, 16 frames of an odd size, with guidance."""
    prompts, negative = ["the cat on the car", "and then the cat " * 30], ["", "it's 25 cars"]
    options = model.complete(TextOptions(steps=3, guidance_scale=6.0, decode_chunk_size=5, **SIZE))
    assert (options.num_frames, options.num_evaluations) == (16, 6)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(2, 4, 16, 3, 5, generator=generator)
    expected = tiny_animatediff.pipeline(*checkpoint)(
        prompts,
        negative_prompt=negative,
        num_inference_steps=3,
        guidance_scale=6.0,
        latents=noise,
        output_type="np",
        **SIZE,
    ).frames
    latents = noise.permute(0, 2, 3, 4, 1).numpy()
    cond = model.embed(prompts, negative)
    made = model.sample(cond, TextNoise(latents, jax.random.split(jax.random.key(0))), options)
    decoded = np.concatenate(model.start_decoding(made, options.decode_chunk_size), axis=1)
    frames = (decoded / 2 + 0.5).clip(0, 1)
    assert frames.shape == (2, 16, 24, 40, 3)
    assert frames.std() > 0.02, "the frames show something"
    assert relative_error(frames, expected) < 1e-3


@pytest.mark.integration
def test_the_student_is_sampled_in_four_steps_without_guidance(model):
    options = model.complete(TextOptions(sampler="few-step", num_frames=2, **SIZE))
    assert (options.steps, options.num_evaluations, options.guided) == (4, 4, False)
    noise = model.noise(jax.random.split(jax.random.key(1), 1), options)
    seen = []

    def denoise(part, component, function, x, t, cond, weight, progress):
        seen.append((int(t[0]), weight))
        return 0.5 * x

    watched = type("Watched", (), {"_run": staticmethod(denoise), "_denoise": None})()
    nothing = np.zeros((1, 77, 24), np.float32)
    latents = TextToVideo.sample(watched, ddpm.TextConditioning(nothing, nothing), noise, options)
    assert seen == [(t, None) for t in (999, 749, 499, 249)]
    schedule = ddpm.animatediff_schedule()
    expected = ddpm.few_step(lambda x, t: 0.5 * x, noise.latents, ddpm.few_step_times(4), schedule, noise.keys)
    np.testing.assert_array_equal(latents, expected)


@pytest.mark.integration  # The program, twice: the test before has the numbers.
def test_the_program_makes_what_python_makes(weights, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("The cat\n\n" + "and then " * 60 + "the cat\n")
    arguments = [f"--weights={weights}", "--seed=3", *ARGUMENTS]
    sample.main([f"--prompts={file}", f"--output={tmp_path}/out/{{name}}.mp4", "--negative_prompt=car", *arguments])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["001-the-cat.mp4", "002-and-then-and-then-and-then-and-then-and.mp4"]
    with av.open(str(tmp_path / "out" / names[0])) as video:
        assert video.streams.video[0].frames == 2 and video.streams.video[0].average_rate == 8
    printed = capsys.readouterr().out
    assert "ddim, 1 step(s), 2 network evaluations" in printed
    assert "longer than the 77 tokens of the text encoder" in printed and "the cat'." in printed
    again = ["--prompt", "The cat", f"--output={tmp_path}/pictures", "--negative_prompt=car", *arguments]
    sample.main(again)
    made = TextToVideo.load(weights)("The cat", seed=3, negative_prompt="car", steps=1, num_frames=2, **SIZE)
    for i, frame in enumerate(made):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "pictures" / f"{i:03d}.png")), frame)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Give one of --image, --prompt and --prompts"),
        (["--prompt=a", "--image=a.png"], "Give one of --image, --prompt"),
        (["--prompt", "a", " "], "A prompt is empty"),
        (["--prompt", "a \udcff"], "is not UTF-8: type it anew"),
        (["--prompt=a", "--negative_prompt", "\udcff"], "is not UTF-8: type it anew"),
        (["--prompts=missing.txt"], "missing.txt cannot be read"),
        (["--prompts=blank.txt"], "blank.txt holds no prompts"),
        (["--prompts=bytes.txt"], "bytes.txt cannot be read"),
        (["--prompt=a", "--decoder=tiny"], "--decoder has no meaning for --prompt"),
        (["--prompt=a", "--motion_bucket_id=9"], "--motion_bucket_id has no meaning for --prompt"),
        (["--image=a.png", "--negative_prompt=a"], "--negative_prompt has no meaning for --image"),
        (["--image=a.png", "--guidance_scale=2"], "--guidance_scale has no meaning for --image"),
        (["--prompt=a", "--sampler=tts"], "sampler='tts' is not one of ddim, few-step"),
        (["--prompt=a", "--sampler=few-step", "--guidance_scale=2"], "sampled without guidance"),
        (["--prompt=a", "--sampler=few-step", "--negative_prompt=b"], "--negative_prompt needs guidance"),
        (["--prompt=a", "--steps=501"], "steps=501 is too many for ddim: at most 500"),
        (["--prompt=a", "--num_frames=33"], "num_frames=33 is too many for this motion adapter, .* 32"),
        (["--prompt=a", "--height=25"], "height=25 is not divisible by 8"),
        (["--prompt", "a", "b", "--output=one.mp4"], "there are 2 prompts"),
        (["--prompt=a", "--weights=svd"], "makes videos of images: give --image"),
        (["--prompt=a", "--weights=nowhere"], "convert_weights sd SD_FOLDER nowhere"),
        (["--prompt=a", "--lora=nowhere"], "nowhere does not exist"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_compiled(arguments, words, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TextToVideo, "_run", None)
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "svd" / "unet").mkdir(parents=True)
    defaults = {"--output": "out/{name}.mp4", "--weights": str(weights)}
    given = {argument.split("=")[0] for argument in arguments}
    with pytest.raises(UserError, match=words) as error:
        sample.main([*(f"{name}={value}" for name, value in defaults.items() if name not in given), *arguments])
    assert "\n" not in str(error.value)


def test_networks_of_different_models_are_refused(weights, tmp_path):
    """Weights folders are put together from several imports; each pair that must agree is compared."""
    for component, changes, words in [
        ("motion_adapter", {"block_out_channels": [16, 64]}, "use one for Stable Diffusion"),
        ("text_encoder", {"hidden_size": 32}, "attends to texts of 24 channels"),
        ("text_encoder", {"vocab_size": 7}, "a tokenizer of .* tokens and a text encoder of 7"),
    ]:
        folder = tmp_path / words[:12].strip()
        shutil.copytree(weights, folder)
        file = folder / component / "config.json"
        description = json.loads(file.read_text())
        description["config"] |= changes
        file.write_text(json.dumps(description))
        with pytest.raises(UserError, match=words) as error:
            TextToVideo.load(folder)
        assert "\n" not in str(error.value)
