"""The comparison with PyTorch runs, and refuses to time what differs."""

import json
import pathlib
import runpy

import numpy as np
import pytest

BENCHMARK = pathlib.Path(__file__).parents[1] / "benchmarks" / "beside_pytorch.py"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARK.parent)
        return runpy.run_path(str(BENCHMARK))


def test_both_sides_are_compared_and_timed(benchmark, tmp_path, capsys):
    output = tmp_path / "new" / "beside.json"
    benchmark["main"](["--size=tiny", "--parts", "dinov2", "--runs=2", f"--output={output}"])
    written = json.loads(output.read_text())
    (row,) = written["rows"]
    assert row["name"] == "dinov2" and row["error"] < 1e-5
    assert row["ours"] > 0 and row["theirs"] > 0 and row["faster"] > 0 and row["compile"] > 0
    # Of each frame's patches and of two layers over its tokens, the class token being one.
    frames, patches, width = 4, 2 * 3, 32
    layer = 12 * 2 * (patches + 1) * width**2 + 2 * 2 * (patches + 1) ** 2 * width
    operations = frames * (2 * patches * 14 * 14 * 3 * width + 2 * layer)
    assert row["tflops"] * 1e12 * row["ours"] == pytest.approx(operations, rel=0.05)
    assert "| dinov2 |" in capsys.readouterr().out


def test_what_differs_is_not_timed(benchmark):
    pair, bench = benchmark["Pair"], benchmark["Steps"](benchmark["SIZES"]["tiny"], "float32", False)
    right = bench.dinov2()
    wrong = pair(right.ours, right.arguments, right.theirs, lambda y: 1.01 * right.compare(y))
    with pytest.raises(SystemExit, match=r"dinov2: the two sides differ by 9\.9e-03, expected less than 1e-03"):
        benchmark["measure"]("dinov2", wrong, 1, 1.0, 1e-3)


@pytest.mark.integration
def test_an_image_becomes_the_same_frames_and_a_file(benchmark, tmp_path):
    """As latents, too: their decoder is compared with diffusers' elsewhere."""
    output = tmp_path / "beside.json"
    benchmark["main"](["--size=tiny", "--parts", "image_to_mp4", "--runs=1", f"--output={output}"])
    (row,) = json.loads(output.read_text())["rows"]
    assert row["name"] == "image_to_mp4" and row["error"] < 1e-4 and row["ours"] > 0 and row["theirs"] > 0


# The step of stage 2 has all that stage 1's has, the teacher's steps and parts of the UNet besides.
@pytest.mark.integration
@pytest.mark.parametrize("part", ["discriminator", "stage2_step"])
def test_training_steps_are_the_same(benchmark, tmp_path, part):
    output = tmp_path / "beside.json"
    benchmark["main"](["--size=tiny", "--parts", part, "--runs=1", f"--output={output}"])
    (row,) = json.loads(output.read_text())["rows"]
    assert row["name"] == part and row["error"] < 2e-4 and row["ours"] > 0 and row["theirs"] > 0


def test_the_part_that_differs_most_counts(benchmark):
    right = {"lora": np.ones(4), "disc": np.ones(100)}
    wrong = {"lora": np.array([1, 1, 1, 1.2]), "disc": np.ones(100)}
    assert benchmark["difference"](wrong, right) == pytest.approx(0.1)
    assert benchmark["difference"](right, right) == 0
