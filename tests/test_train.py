"""The training program: exact resume after a kill, and what it says about bad input."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import micro_stage1
import pytest
import tiny
from workdirs import assert_same, metrics_of, state_of

from osv_jax import train
from osv_jax.errors import UserError
from osv_jax.runtime import checkpoint, command_line
from osv_jax.training import clips

TESTS = pathlib.Path(__file__).parent
PROGRAM = [sys.executable, "-m", "osv_jax.train", f"--config={TESTS / 'micro_stage1.py'}"]


def environment() -> dict[str, str]:
    """One CPU device, the compilation cache of the tests, and no PyTorch, which training must not need."""
    cache = jax.config.jax_compilation_cache_dir
    path = os.pathsep.join([str(TESTS / "without_torch"), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": path}


def run_program(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*PROGRAM, *arguments], env=environment(), capture_output=True, text=True, timeout=500)


def steps_of(workdir: pathlib.Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def micro_config(**changes):
    config = micro_stage1.get_config()
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture
def one_device(monkeypatch):
    """Programs of this process run on as many devices as those that the tests start."""
    monkeypatch.setattr(train.mesh, "make_mesh", lambda *sizes: tiny.one_device_mesh())


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory) -> tuple[pathlib.Path, int]:
    """A run killed with SIGKILL some time after its second checkpoint, and its last checkpoint."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    process = subprocess.Popen(
        [*PROGRAM, f"--workdir={workdir}", "--config.num_steps=1000000"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 400
    while len(steps_of(workdir)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0].decode()
    assert len(steps_of(workdir)) >= 2, output
    return workdir, steps_of(workdir)[-1]


@pytest.fixture(scope="module")
def resumed_run(killed_run, tmp_path_factory) -> tuple[pathlib.Path, int, str]:
    """The run as a kill before its last checkpoint would have left it, taken up again to that step and no further."""
    killed, last = killed_run
    workdir = tmp_path_factory.mktemp("resumed") / "run"
    shutil.copytree(killed, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(last))
    result = run_program(f"--workdir={workdir}", f"--config.num_steps={last}")
    assert result.returncode == 0, result.stderr
    return workdir, last, result.stdout


@pytest.mark.integration
def test_a_killed_run_continues_bit_for_bit(killed_run, resumed_run):
    killed, _ = killed_run
    resumed, last, output = resumed_run
    assert f"Resuming from step {steps_of(killed)[-2]}." in output
    # What the first run had got to on its own.
    expected = state_of(killed, last)
    assert len(jax.tree.leaves(expected)) > 100
    assert_same(state_of(resumed, last), expected)
    # The losses of every step depend on which clips it saw: equal losses mean an equal order.
    before, after = metrics_of(killed), metrics_of(resumed)
    assert sorted(after) == list(range(1, last + 1))
    assert after == {step: before[step] for step in after}
    positions = [
        json.loads((workdir / "checkpoints" / str(last) / "data" / "metadata").read_text())
        for workdir in (resumed, killed)
    ]
    assert positions[0] == positions[1] and positions[0]["position"] == 2 * last


@pytest.mark.integration
def test_training_writes_what_it_promises(resumed_run):
    workdir, last, output = resumed_run
    assert (workdir / "losses.png").stat().st_size > 1000
    assert list((workdir / "pictures").glob(f"samples_{last:07d}.png"))
    assert list((workdir / "tensorboard").iterdir())
    assert all(str(workdir / name) in output for name in ("metrics.jsonl", "checkpoints", "pictures"))
    assert f"step {last}/{last}" in output and "ETA" in output and "clips/s" in output
    row = metrics_of(workdir)[last]
    for player in ("student", "disc"):
        assert row[f"grad_norm/{player}"] > 0 and row[f"param_norm/{player}"] > 0
    for kind in ("spatial", "temporal"):
        assert f"logits_real/{kind}" in row and f"logits_fake/{kind}" in row


@pytest.mark.integration
def test_a_finished_run_ends_at_once(resumed_run, one_device, capsys):
    workdir, last, _ = resumed_run
    train.train(micro_config(num_steps=last), workdir)
    output = capsys.readouterr().out
    assert "Compiling" not in output and f"Done: {last} steps." in output


@pytest.mark.integration
def test_a_damaged_checkpoint_is_named(killed_run, one_device, tmp_path):
    killed, step = killed_run
    workdir = tmp_path / "run"
    shutil.copytree(killed, workdir)
    damaged = workdir / "checkpoints" / str(step)
    shutil.rmtree(damaged / "state")
    with pytest.raises(UserError, match=re.escape(f"The checkpoint {damaged} is damaged; delete that folder")):
        train.train(micro_config(num_steps=step + 3), workdir)


@pytest.mark.integration
def test_a_save_that_was_cut_short_is_not_taken_for_a_checkpoint(killed_run, one_device, tmp_path, capsys):
    killed, step = killed_run
    workdir = tmp_path / "run"
    shutil.copytree(killed, workdir)
    cut_short = workdir / "checkpoints" / f"{step + 3}.orbax-checkpoint-tmp"
    # The kill itself may have left one there, empty or not.
    shutil.copytree(workdir / "checkpoints" / str(step), cut_short, dirs_exist_ok=True)
    train.train(micro_config(num_steps=step), workdir)
    assert f"Resuming from step {step}." in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # in ml_collections
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.no_such_key=1"], ["no_such_key", "no key"]),
        (["--config.num_steps=many"], ["num_steps", "many"]),
        (["--no_such_flag=1"], ["no_such_flag"]),
    ],
)
def test_the_command_line_is_checked(arguments, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*PROGRAM[2:], "--workdir=run", *arguments])
    with pytest.raises(UserError) as error:
        command_line.parse(sys.argv)
    sentence = str(error.value)
    assert all(word in sentence for word in words) and "\n" not in sentence, sentence


def test_the_config_file_must_exist(tmp_path):
    command = [sys.executable, "-m", "osv_jax.train", "--config=nowhere.py", f"--workdir={tmp_path}"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and "nowhere.py" in result.stderr


def refused(config, workdir) -> str:
    """The sentence with which a configuration is refused; nothing may have been written or compiled."""
    with pytest.raises(UserError) as error:
        train.train(config, workdir)
    assert not (workdir / "checkpoints").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.resolutions", ((0, 50, 64),), ["50 x 64", "divisible by 8"]),
        ("data.resolutions", ((0, 64, 0),), ["((0, 64, 0),)", "heights and widths a whole number from 1 to 8192"]),
        (
            "data.resolutions",
            ((0, 64, float("inf")),),
            ["config.data.resolutions=((0, 64, inf),)", "heights and widths a whole number"],
        ),
        ("data.resolutions", ((0, 64.0, 64),), ["heights and widths"]),
        ("data.resolutions", ((0, 64),), ["config.data.resolutions", "triples"]),
        ("data.resolutions", ((5, 64, 64),), ["begin with step 0"]),
        ("trainable", ("lora", "some"), ["config.trainable", "temporal_transformer"]),
        ("init_from", "nowhere", ["config.init_from=nowhere", "stage 1"]),
        ("batch_size", 0, ["config.batch_size=0"]),
        ("lora.rank", 0, ["config.lora.rank=0"]),
        ("data.fps", 0.0, ["config.data.fps=0"]),
        ("data.fps", float("nan"), ["config.data.fps=nan must be a number from 0.1 to 240"]),
        ("seed", 2**32, ["config.seed=4294967296"]),
        ("optimizer.learning_rate", float("inf"), ["config.optimizer.learning_rate=inf"]),
        ("mesh.fsdp", 0, ["config.mesh.fsdp=0", "or -1"]),
        ("objective", "stage9", ["stage9", "stage1"]),
        ("lora.targets", "some", ["config.lora.targets", "attention"]),
        ("dtype", "float8", ["config.dtype", "bfloat16"]),
        ("dtype", "float16", ["config.dtype='float16'", "bfloat16"]),
        ("remat", "half", ["config.remat", "full"]),
        ("attention", "flash", ["config.attention", "cudnn"]),
        ("boundary", "soft", ["config.boundary", "exact"]),
        ("discriminator_blocks", (0, 7), ["discriminator_blocks", "7"]),
        ("discriminator_blocks", (), ["config.discriminator_blocks=()", "one block of DINOv2 or more"]),
        ("discriminator_blocks", (0, 0), ["config.discriminator_blocks=(0, 0)", "each once"]),
        ("discriminator_frames", 15, ["config.discriminator_frames=15", "1 .. 3"]),
        ("mesh.data", 3, ["config.mesh", "there are 8"]),
        ("batch_size", 3, ["config.batch_size=3", "8 devices"]),
        ("weights", "also", ["config.weights", "config.random_networks"]),
    ],
)
def test_values_are_checked_before_anything_is_compiled(key, value, words, tmp_path):
    config = micro_stage1.get_config()
    config.update_from_flattened_dict({key: value})
    sentence = refused(config, tmp_path / "run")
    assert all(word in sentence for word in words), sentence


def test_a_clip_s_rows_must_split_over_the_context(tmp_path):
    config = micro_config(batch_size=1)
    config.mesh.context, config.data.resolutions = 8, ((0, 24, 24),)
    sentence = refused(config, tmp_path / "run")
    assert "config.mesh.context=8 does not divide the 12 rows" in sentence and "a divisor of 12" in sentence


def test_missing_weights_name_the_command_that_makes_them(tmp_path):
    config = micro_stage1.get_config()
    config.random_networks, config.weights = {}, str(tmp_path / "nowhere")
    assert "osv_jax.convert_weights svd" in refused(config, tmp_path / "run")


def test_a_folder_that_holds_no_weights_is_refused(tmp_path):
    (tmp_path / "unet").mkdir()
    config = micro_stage1.get_config()
    config.random_networks, config.weights = {}, str(tmp_path)
    assert str(tmp_path / "unet") in refused(config, tmp_path / "run")


def test_video_folders_are_checked(tmp_path):
    config = micro_stage1.get_config()
    config.data.videos = str(tmp_path / "missing")
    assert "does not exist" in refused(config, tmp_path / "run")
    (tmp_path / "empty").mkdir()
    config.data.videos = str(tmp_path / "empty")
    assert "holds no videos" in refused(config, tmp_path / "run")
    (tmp_path / "empty" / "broken.mp4").write_text("not a video")
    assert "broken.mp4" in refused(config, tmp_path / "run")


def test_a_corrupt_video_among_good_ones_is_skipped_and_counted(tmp_path, capsys):
    from osv_jax.data.demo import demo_videos

    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(next(demo_videos().glob("carphone*.mp4")), folder / "good.mp4")
    (folder / "broken.mp4").write_bytes(b"\0" * 1000)
    config = micro_stage1.get_config()
    config.data.videos = str(folder)
    index = clips.index_videos(config, tmp_path)
    assert len(index.clips) > 1
    captured = capsys.readouterr().err
    assert "1 videos were left out" in captured and "broken.mp4" in captured


def test_a_workdir_of_another_configuration_is_refused(tmp_path):
    config = micro_stage1.get_config()
    before = config.copy_and_resolve_references()
    before.lora.rank = 99
    before.num_steps = 7
    config.data.num_frames, config.random_networks.unet.num_frames = 0, 25
    (tmp_path / "config.json").write_text(json.dumps(before.to_dict()))
    checkpoint.check_workdir(tmp_path, config.to_dict())  # It never came to a checkpoint.
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    checkpoint.check_workdir(tmp_path, config.to_dict())
    (tmp_path / "checkpoints" / "3").mkdir()
    with pytest.raises(UserError) as error:
        train.train(config, tmp_path)
    sentence = str(error.value)
    assert "lora.rank (was 99, is 4)" in sentence and "data.num_frames (was 3, is 25)" in sentence
    assert "num_steps" not in sentence


@pytest.mark.parametrize("made", ["run", "run/pictures", "run/tensorboard"])
def test_files_where_folders_should_be_are_named(made, tmp_path):
    (tmp_path / made).parent.mkdir(exist_ok=True)
    (tmp_path / made).touch()
    assert f"{made} cannot be written to (it is a file)" in refused(micro_stage1.get_config(), tmp_path / "run")


@pytest.mark.parametrize("made", ["config.json", "metrics.jsonl", "losses.png"])
def test_folders_where_files_should_be_are_named(made, tmp_path):
    (tmp_path / "run" / made).mkdir(parents=True)
    assert f"{made} is a folder" in refused(micro_stage1.get_config(), tmp_path / "run")
