"""Ctrl-C in whole programs, in every phase: a line or two, status 130, nothing half made, and they can go on."""

import os
import pathlib
import signal
import sys

import av
import numpy as np
import pytest
import synthetic_video
import tiny_pipeline
import tiny_student
from interrupts import Program
from PIL import Image
from small_videos import small_videos
from test_train import environment
from tool import convert
from workdirs import metrics_of

from osv_jax.convert import weights
from osv_jax.data import latents
from osv_jax.preparation import shards, stored
from osv_jax.runtime import checkpoint

TESTS = pathlib.Path(__file__).parent
ENDED = ["Ended by Ctrl-C."]
SAVING = "Ctrl-C: saving after this step; once more ends at once."


def module(name, *arguments, **variables):
    return Program([sys.executable, "-m", f"osv_jax.{name}", *map(str, arguments)], environment() | variables)


def files_in(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


# As pip writes the programs' scripts; and as it is when the package's own imports have begun, and last for a while.
SCRIPT = "from osv_jax.sample import run\nrun()\n"
SLOW_IMPORT = 'print("importing", flush=True)\nimport time\ntime.sleep(60)\n'


@pytest.mark.parametrize("started_as", ["module", "script"])
def test_while_a_program_is_imported_it_ends_without_a_word(started_as, tmp_path):
    (tmp_path / "jax.py").write_text(SLOW_IMPORT)
    script = tmp_path / "osv-sample"
    script.write_text(SCRIPT)
    command = {"module": ["-m", "osv_jax.sample"], "script": [str(script)]}[started_as]
    path = os.pathsep.join([str(tmp_path), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    with Program([sys.executable, *command], os.environ | {"PYTHONPATH": path}) as program:
        program.wait_for("importing")
        program.press()
        assert program.ended() == -signal.SIGINT
        assert program.printed["stderr"] == ""


def toy_training(workdir, seconds):
    arguments = [workdir, small_videos(), 1000, 2, seconds]
    return Program([sys.executable, str(TESTS / "toy_train.py"), *map(str, arguments)], environment())


@pytest.mark.integration
def test_training_saves_the_step_and_goes_on_and_a_second_one_ends_it_at_once(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with toy_training(workdir, seconds=0.1) as program:
        program.wait_for("step 2/1000")
        program.press()
        assert program.ended() == 130
        saved = checkpoint.latest_step(workdir)
        told = program.last_lines()
    assert told == [SAVING, f"SIGINT: step {saved} is saved. The same command continues from there."]
    assert sorted(metrics_of(workdir)) == list(range(1, saved + 1))

    with toy_training(workdir, seconds=10) as program:
        program.wait_for(f"Resuming from step {saved}.")
        # What follows the step that is under way takes ten seconds more.
        program.wait_until(lambda: saved + 1 in metrics_of(workdir))
        program.press()
        program.wait_for(SAVING)
        program.press()
        assert program.ended(8) == 130
        assert program.last_lines() == [SAVING]
    assert checkpoint.latest_step(workdir) == saved


# Says when XLA itself begins: the other programs before that are compiled by plain calls.
COMPILING = """
import functools, sys
import jax
compiled = jax.stages.Lowered.compile
def told(*args, **options):
    print("XLA compiles", flush=True)
    return compiled(*args, **options)
jax.stages.Lowered.compile = told
"""


def driven(code, *arguments):
    """A program of which some code tells, or makes last, a moment; what is to be compiled must not be in the cache."""
    variables = {"JAX_ENABLE_COMPILATION_CACHE": "0"} if code.startswith(COMPILING) else {}
    return Program([sys.executable, "-c", code, *map(str, arguments)], environment() | variables)


@pytest.mark.integration
def test_training_that_compiles_ends_with_a_line(tmp_path):
    run = "import toy_train\nfrom osv_jax.runtime import ending\nending.run(lambda: toy_train.main(sys.argv[1:]))"
    with driven(COMPILING + run, tmp_path, small_videos(), 4, 2, 0) as program:
        program.wait_for("XLA compiles")
        program.press()
        assert program.ended(20) == 130
        assert program.last_lines() == ENDED
        assert "Compiled in" not in program.printed["stdout"]
    assert checkpoint.latest_step(tmp_path) is None and not list((tmp_path / "checkpoints").iterdir())


# The second video's writing takes for ever.
WRITING = """
import sys, time
from osv_jax.runtime import media
write, started = media._write_mp4, []
def slowly(path, *video):
    started.append(path)
    if len(started) == 2:
        path.write_bytes(b"half")
        print("half a video", flush=True)
        time.sleep(60)
    write(path, *video)
media._write_mp4 = slowly
"""


@pytest.mark.integration
def test_sampling_leaves_whole_videos_and_nothing_else(tmp_path):
    tiny_student.save(tmp_path, {"height": 16, "width": 24, "num_frames": 2, "fps": 8.0}, ("lora",))
    (tmp_path / "images").mkdir()
    for name in "abc":
        Image.fromarray(np.full((16, 24, 3), 90, np.uint8)).save(tmp_path / "images" / f"{name}.png")
    arguments = [f"--image={tmp_path / 'images'}", f"--weights={tmp_path / 'weights'}", f"--lora={tmp_path / 'lora'}"]
    arguments += [f"--output={tmp_path / 'made' / '{name}.mp4'}"]
    run = "from osv_jax import sample\nsample.run()"
    for code, words, left in ((COMPILING, "XLA compiles", []), (WRITING, "half a video", ["a.mp4"])):
        with driven(code + run, *arguments) as program:
            program.wait_for(words)
            program.press()
            assert program.ended(20) == 130
            assert program.last_lines() == ENDED
        assert files_in(tmp_path / "made") == left
    with av.open(str(tmp_path / "made" / "a.mp4")) as video:
        assert len(list(video.decode(video=0))) == 2


@pytest.mark.integration
def test_preparing_ends_without_a_word_of_its_workers_and_goes_on(tmp_path):
    videos, output = tmp_path / "videos", tmp_path / "dataset"
    videos.mkdir()
    for number in range(8):
        synthetic_video.write_constant(videos / f"{number}.mp4", 46, 10)
    arguments = [f"--config={TESTS / 'micro_stage1.py'}", f"--source={videos}", f"--output={output}", "--workers=2"]
    arguments += ["--batch_size=1", "--stride=0.2", "--min_motion=0"]

    def batches():
        return list(output.glob(f"{shards.UNFINISHED}/*/*.array_record"))

    with module("prepare", *arguments) as program:
        program.wait_for("2 decoding processes")  # Which import, now.
        program.press()
        assert program.ended() == 130
        assert program.last_lines() == ENDED
    with module("prepare", *arguments) as program:
        program.wait_until(batches)
        program.press()
        assert program.ended() == 130
        assert program.last_lines() == ENDED
    kept = {file: stored.read_batch(file)[1] for file in batches()}
    assert kept and not (output / "dataset_info.json").exists()
    with module("prepare", *arguments) as program:
        assert program.ended(200) == 0, program.printed
    assert len(latents.open_dataset(output)) > 8 * 10
    assert not [name for name in files_in(output) if name.endswith(".tmp")]


# The component is written, but has not yet the place of the one before.
CONVERTING = """
import time
from osv_jax import convert_weights
from osv_jax.convert import importers
save = importers.save_component
def slowly(*component):
    save(*component)
    print("a component", flush=True)
    time.sleep(60)
importers.save_component = slowly
convert_weights.run()
"""


@pytest.mark.integration
def test_a_conversion_leaves_what_was_there(tmp_path):
    tiny_pipeline.save_dinov2(tmp_path / "dinov2")
    output = tmp_path / "weights"
    assert convert(["dinov2", str(tmp_path / "dinov2"), str(output)]) == 0
    before = {name: (output / name).read_bytes() for name in files_in(output)}
    with driven(CONVERTING, "dinov2", tmp_path / "dinov2", output, "--overwrite") as program:
        program.wait_for("a component")
        program.press()
        assert program.ended() == 130
        assert program.last_lines() == ENDED
    assert {name: (output / name).read_bytes() for name in files_in(output)} == before
    assert weights.load_params(output, "dinov2")
