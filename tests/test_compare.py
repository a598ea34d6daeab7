"""A student beside its teacher: the program, what it writes, and how numbers are shown."""

import json
import shutil

import av
import numpy as np
import pytest
import synthetic_video
import tiny_student
from conftest import Stopped, stop
from PIL import Image
from safetensors.numpy import load_file, save_file

from osv_jax import compare
from osv_jax.convert import weights
from osv_jax.errors import UserError

FRAMES, HEIGHT, WIDTH = 4, 16, 24
WAYS = ["1 step", "1 step + TTS", "2 steps"]
ROW = {"evaluations": 1, "mse": 0.5, "mse_std": 0.1, "motion": 2.0, "flicker": 1.0, "first_frame_psnr": 20.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`weights`, two `lora`s and `videos`."""
    folder = tmp_path_factory.mktemp("compare")
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "fps": 8.0}
    tiny_student.save(folder, size, ("a", "b"))
    (folder / "videos").mkdir()
    synthetic_video.write_constant(folder / "videos" / "a.mp4", 20, 16)
    return folder


@pytest.mark.integration
def test_the_program(folder, tmp_path, capsys):
    """From a weights folder, two LoRAs and a folder of videos to pictures and numbers."""
    loras = [str(folder / name) for name in ("a", "b")]
    arguments = [f"--weights={folder / 'weights'}", "--lora", *loras, f"--videos={folder / 'videos'}"]
    compare.main([*arguments, "--clips=2", "--steps=2", f"--output={tmp_path}"])
    measured = json.loads((tmp_path / "measured.json").read_text(), parse_constant=pytest.fail)
    assert (measured["clips"], measured["lora"]) == (2, loras)
    samples = measured["samples"]
    ways = [f"{lora}, {way}" for lora in loras for way in WAYS]
    assert list(samples) == ["real", "teacher, 2 steps", compare.UNTRAINED, *ways]
    assert [row["evaluations"] for row in list(samples.values())[1:]] == [4, 1, *([1, 2, 2] * 2)]
    assert samples["teacher, 2 steps"]["mse"] == 0
    # The LoRA is what a student differs by.
    one_step = [samples[name]["mse"] for name in (compare.UNTRAINED, f"{loras[0]}, 1 step", f"{loras[1]}, 1 step")]
    assert len(set(one_step)) == 3 and min(one_step) > 0
    assert set(samples["real"]) == {"motion", "flicker"} and samples["real"]["motion"] > 0
    printed = capsys.readouterr().out
    assert "2 clips" in printed and compare.table(samples) in printed
    with av.open(str(tmp_path / "comparison.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == FRAMES
    # Nine columns of frames enlarged 7 times, two rows of clips below the labels.
    assert frames[0].shape[1] >= 9 * 7 * WIDTH and frames[0].shape[0] >= 2 * 7 * HEIGHT
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.size[1] > 2 * 9 * HEIGHT


def test_numbers_are_shown_beside_those_of_the_untrained_student():
    rows = {"real": {"motion": 2.5, "flicker": 1.0}, compare.UNTRAINED: ROW, "student, 1 step": {**ROW, "mse": 0.125}}
    lines = compare.table(rows).splitlines()
    assert "4.00 x" in lines[3] and "2.50" in lines[1] and len({len(line) for line in lines[2:]}) == 1
    assert " - " in compare.table({compare.UNTRAINED: ROW, "teacher": {**ROW, "mse": 0.0}})


def test_videos_that_are_left_out_are_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "generate", stop)
    # Nor are they refused there: only `evaluate table` writes films.
    videos = tmp_path / "films"
    shutil.copytree(folder / "videos", videos)
    (videos / "damaged.mp4").write_bytes(b"no video")
    arguments = [f"--weights={folder / 'weights'}", "--lora", str(folder / "a"), f"--videos={videos}"]
    with pytest.raises(Stopped):
        compare.main([*arguments, f"--output={tmp_path}"])
    assert "skipped: damaged.mp4 " in capsys.readouterr().out


@pytest.mark.integration
def test_weights_that_are_not_finite_are_named_and_nothing_is_written(folder, tmp_path):
    """Of a student when they are read, of the teacher when its videos are not finite."""
    lora, teacher, output = tmp_path / "lora", tmp_path / "weights", tmp_path / "out"
    shutil.copytree(folder / "a", lora)
    tensors = load_file(lora / "adapter_model.safetensors")
    next(iter(tensors.values()))[0] = np.nan
    save_file(tensors, lora / "adapter_model.safetensors")
    shutil.copytree(folder / "weights", teacher)
    params = weights.load_params(teacher, "unet")
    params["conv_out"]["bias"] = np.full_like(params["conv_out"]["bias"], np.nan)
    shutil.rmtree(teacher / "unet")
    weights.save_component(teacher / "unet", "unet", weights.load_config(folder / "weights", "unet"), params, teacher)
    for arguments, words in (
        ([f"--weights={folder / 'weights'}", f"--lora={lora}"], rf"{lora}.* has values that are NaN or infinite"),
        ([f"--weights={teacher}", f"--lora={folder / 'a'}"], "unet/conv_out/bias has values that are NaN or infinite"),
    ):
        with pytest.raises(UserError, match=words):
            compare.main([*arguments, f"--videos={folder / 'videos'}", "--clips=1", "--steps=1", f"--output={output}"])
        assert not any((output / name).exists() for name in compare._FILES)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--clips=0"], "--clips: 0 must be a whole number of at least 1"),
        (["--seed=-1"], "--seed: -1 must be a whole number from 0 to 4294967295"),
        (["--fps=nan"], "fps=nan must be a number from 0.1 to 240"),
        (["--steps=0"], "--steps: 0 must be a whole number from 1 to 1000"),
        (["--weights=nowhere"], "nowhere"),
        (["--guidance=3"], "guidance"),
        (["--output=/proc/x"], "/proc/x cannot be written to .*choose another --output"),
        (["--output=clips/compared", "--videos=clips"], "clips/compared lies in clips"),
        (["--output=taken"], "comparison.mp4 is a folder"),
        (["--lora", "x", "x"], "Two methods are called 'x, 1 step'|x does not exist"),
    ],
)
def test_mistakes_are_named(changed, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken" / "comparison.mp4").mkdir(parents=True)
    own = [] if changed[0].startswith("--weights") else ["--weights=miniature"]
    with pytest.raises(UserError, match=message):
        compare.main([*own, "--lora=x", "--videos=miniature", f"--output={tmp_path}", *changed])
