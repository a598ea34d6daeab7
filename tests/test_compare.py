"""A student beside its teacher: what is sampled, what is measured, what is drawn, and the program."""

import dataclasses
import json

import av
import jax
import numpy as np
import pytest
import synthetic_video
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from osv_jax import compare
from osv_jax.convert import exporters, weights
from osv_jax.data import demo
from osv_jax.errors import UserError
from osv_jax.inference.pipeline import COMPONENTS, ImageToVideo, Options
from osv_jax.models.lora import init_lora, target_modules
from osv_jax.objectives.random_networks import random_frozen

CLIPS, FRAMES, HEIGHT, WIDTH = 3, 4, 16, 24
LATENTS = (1, FRAMES, 2, 3, 4)
TEACHER, ONE_STEP = "teacher, 5 steps", "student, 1 step"
# How far from the teacher's latents the fake models' are, by what is compared.
FACTORS = {
    compare.UNTRAINED: 3.0,
    "student, 1 step": 2.0,
    "student, 1 step + TTS": 1.5,
    "student, 2 steps": 1.0,
}
VIDEO = Options(sampler="euler", steps=5, height=HEIGHT, width=WIDTH, num_frames=FRAMES, fps=8.0)


class FakeModel(ImageToVideo):
    """Makes of noise a multiple of it, and of latents grey frames; remembers what it was asked for."""

    def __init__(self, factors):
        self.factors, self.seen, self.params = factors, [], {}

    def complete(self, options):
        return options

    def noise(self, key, options):
        return np.random.default_rng(np.asarray(jax.random.key_data(key))).standard_normal(LATENTS, np.float32)

    def sample(self, image, noise, options):
        self.seen.append((options.sampler, options.steps, int(image[0, 0, 0])))
        return noise * self.factors[options.sampler, options.steps]

    def decode(self, latents, chunk_size):
        return np.tile(latents[:, :, :1, :1, :1], (1, 1, HEIGHT, WIDTH, 3)).astype(np.float32)


@pytest.fixture
def clips():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (CLIPS, FRAMES, HEIGHT, WIDTH, 3), np.uint8)


@pytest.fixture
def models():
    student = {("consistency", 1): 2.0, ("tts", 1): 1.5, ("consistency", 2): 1.0}
    return FakeModel({("euler", 5): 1.0, ("consistency", 1): 3.0}), {"student": FakeModel(student)}


def test_every_kind_starts_from_the_same_noise_and_the_clips_first_frame(models, clips):
    made = compare.sample_all(*models, clips, VIDEO, seed=1)
    assert list(made) == [TEACHER, *FACTORS]
    teacher = made[TEACHER].latents
    assert teacher.shape == (CLIPS, *LATENTS[1:])
    assert len({clip.tobytes() for clip in teacher}) == CLIPS
    for name, factor in FACTORS.items():
        np.testing.assert_allclose(made[name].latents, factor * teacher, rtol=1e-6)
    first = [int(clip[0, 0, 0, 0]) for clip in clips]
    assert models[0].seen == [(*way, pixel) for pixel in first for way in (("euler", 5), ("consistency", 1))]
    assert [made[name].evaluations for name in made] == [10, 1, 1, 2, 2]


def test_several_students_keep_their_names(models, clips):
    teacher, students = models
    two = {"runs/a": students["student"], "runs/b": FakeModel(students["student"].factors)}
    made = compare.sample_all(teacher, two, clips, VIDEO, seed=1)
    kinds = [f"{name}, {way}" for name in two for way in ("1 step", "1 step + TTS", "2 steps")]
    assert list(made) == [TEACHER, compare.UNTRAINED, *kinds]
    lines = compare.table(compare.measure(made, clips)).splitlines()
    assert len({len(line) for line in lines if "dB" in line}) == 1


def test_what_is_measured(models, clips):
    """(factor - 1)^2 times the noise's mean square; motion and PSNR as they are defined."""
    made = compare.sample_all(*models, clips, VIDEO, seed=1)
    measured = compare.measure(made, clips)
    power = (made[TEACHER].latents ** 2).mean()
    for name, factor in FACTORS.items():
        assert measured[name]["mse"] == pytest.approx((factor - 1) ** 2 * power, rel=1e-5)
    assert measured[TEACHER]["mse"] == 0
    real = clips.astype(float)
    assert measured["real clips"]["motion"] == pytest.approx(abs(real[:, 1:] - real[:, :-1]).mean(), rel=1e-5)
    error = ((made[ONE_STEP].frames[:, 0].astype(float) - real[:, 0]) / 127.5) ** 2
    psnr = (10 * np.log10(4 / error.mean((1, 2, 3)))).mean()
    assert measured[ONE_STEP]["first_frame_psnr"] == pytest.approx(psnr, rel=1e-4)
    # The untrained student's distance is 4 times the power, that of one step the power itself.
    row = next(line for line in compare.table(measured).splitlines() if line.startswith(f"{ONE_STEP}  "))
    assert "4.00 x" in row


def test_samples_that_are_not_finite_are_not_measured(models, clips):
    teacher, students = models
    students["student"].factors["tts", 1] = np.nan
    with pytest.raises(UserError, match="The frames that were made have values that are NaN or infinite"):
        compare.sample_all(teacher, students, clips, VIDEO, seed=1)


def test_pictures_hold_every_kind(models, clips, tmp_path):
    made = compare.sample_all(*models, clips, VIDEO, seed=1)
    compare.draw(tmp_path, clips, {name: samples.frames for name, samples in made.items()}, 8.0)
    with av.open(str(tmp_path / "comparison.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == FRAMES
    # Six columns of frames enlarged 7 times, three rows of clips below the labels.
    assert frames[0].shape[1] >= 6 * 7 * WIDTH and frames[0].shape[0] >= 3 * 7 * HEIGHT
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.size[1] > 2 * 6 * HEIGHT


def test_clips_of_the_package_are_those_of_the_film():
    clips, fps = demo.held_out_clips()
    assert clips.shape == (4, 14, 64, 96, 3) and fps == 12
    own = dataclasses.replace(VIDEO, height=64, width=96, num_frames=14, fps=12.0)
    np.testing.assert_array_equal(compare.read_clips("miniature", 2, own), clips[:2])
    with pytest.raises(UserError, match=r"14 frames of 64 x 96 at 12 fps.*give a folder of videos"):
        compare.read_clips("miniature", 2, VIDEO)


def test_the_program(tmp_path, capsys, monkeypatch):
    """From a weights folder, a LoRA and a folder of videos to pictures and numbers."""
    configs = tiny.CONFIGS | {"unet": tiny.ONE_LEVEL_UNET}
    params = random_frozen({name: configs[name] for name in COMPONENTS}, np.float32)
    for name in COMPONENTS:
        weights.save_component(tmp_path / "weights" / name, name, configs[name], params[name], tmp_path)
    weights.save_video(tmp_path / "weights", {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "fps": 8.0})
    lora = init_lora(jax.random.key(0), params["unet"], 2, target_modules(params["unet"], "attention"))
    rng = np.random.default_rng(0)
    lora = {path: 0.3 * rng.standard_normal(leaf.shape, np.float32) for path, leaf in flatten_dict(lora).items()}
    exporters.export_peft(unflatten_dict(lora), tmp_path / "lora")
    (tmp_path / "videos").mkdir()
    synthetic_video.write_constant(tmp_path / "videos" / "a.mp4", 20, 16)
    arguments = [f"--weights={tmp_path / 'weights'}", f"--lora={tmp_path / 'lora'}", "--clips=2", "--steps=2"]
    # As of frames that are equal, bit by bit.
    monkeypatch.setattr(compare, "first_frame_psnr", lambda frames, condition: np.full(len(frames), np.inf))
    compare.main([*arguments, f"--videos={tmp_path / 'videos'}", f"--output={tmp_path / 'out'}"])
    measured = json.loads((tmp_path / "out" / "measured.json").read_text(), parse_constant=pytest.fail)
    assert measured["clips"] == 2
    samples = measured["samples"]
    assert list(samples) == ["teacher, 2 steps", *FACTORS, "real clips"]
    # The LoRA is what the student differs by.
    assert samples[ONE_STEP]["first_frame_psnr"] is None
    assert samples[ONE_STEP]["mse"] != samples[compare.UNTRAINED]["mse"] > 0
    assert (tmp_path / "out" / "comparison.png").exists() and (tmp_path / "out" / "comparison.mp4").exists()
    assert "2 clips" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--clips=0"], "--clips: 0 must be a whole number of at least 1"),
        (["--seed=-1"], "--seed: -1 must be a whole number from 0 to 4294967295"),
        (["--fps=nan"], "fps=nan must be a number from 0.1 to 240"),
        (["--steps=0"], "steps=0"),
        (["--weights=nowhere"], "nowhere"),
        (["--guidance=3"], "guidance"),
        (["--output=/proc/x"], "/proc/x cannot be written to .*choose another --output"),
        (["--output=clips/compared", "--videos=clips"], "clips/compared lies in clips"),
        (["--output=taken"], "comparison.mp4 is a folder"),
    ],
)
def test_mistakes_are_named(changed, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken" / "comparison.mp4").mkdir(parents=True)
    own = [] if changed[0].startswith("--weights") else ["--weights=miniature"]
    with pytest.raises(UserError, match=message):
        compare.main([*own, "--lora=x", "--videos=miniature", f"--output={tmp_path}", *changed])
