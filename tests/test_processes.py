"""Training in several processes: killed, restarted on other numbers of processes and devices, and preempted."""

import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from small_videos import small_videos
from test_train import environment
from workdirs import metrics_of

from osv_jax.runtime import checkpoint

pytestmark = pytest.mark.integration
SCRIPT = pathlib.Path(__file__).with_name("toy_train.py")
STEPS, BATCH = 12, 8


def start(workdir, devices, processes=1, seconds=0.0):
    """Starts the processes of a run, each with so many devices."""
    workdir.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for number in range(processes):
        variables = environment()
        if processes > 1:
            variables |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
            variables["JAX_PROCESS_ID"] = str(number)
        arguments = [str(argument) for argument in (workdir, small_videos(), STEPS, devices, seconds)]
        command = [sys.executable, str(SCRIPT), *arguments]
        with (workdir / f"log_{number}").open("w") as log:
            started.append(subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT))
    return started


def logs(workdir):
    return "\n".join(file.read_text()[-3000:] for file in sorted(workdir.glob("log_*")))


def wait_for(condition, processes, workdir):
    deadline = time.monotonic() + 200
    while not condition():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            kill(processes)
            pytest.fail(logs(workdir))
        time.sleep(0.01)


def kill(processes):
    for process in processes:
        process.kill()
        process.wait()


def read_of(workdir):
    """The clips of every step, in order."""
    steps = {}
    for file in sorted(workdir.glob("read_*.jsonl")):
        for line in file.read_text().splitlines():
            number, clips = json.loads(line)
            steps.setdefault(number, []).extend(clips)
    return {number: sorted(clips) for number, clips in steps.items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of one process with eight devices that nothing stopped."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    (process,) = start(workdir, devices=8)
    assert process.wait(300) == 0, logs(workdir)
    return workdir


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run of two processes with four devices each, of which one was killed after a checkpoint; and that one."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    processes = start(workdir, devices=4, processes=2, seconds=0.3)
    wait_for(lambda: checkpoint.latest_step(workdir), processes, workdir)
    processes[1].send_signal(signal.SIGKILL)
    time.sleep(0.5)
    kill(processes)
    return workdir, checkpoint.latest_step(workdir)


def assert_same_run(workdir, straight, last):
    """Up to a step, the losses and the clips are those of the run that nothing stopped."""
    rows, expected = metrics_of(workdir), metrics_of(straight)
    assert sorted(rows) == list(range(1, last + 1))
    for step in rows:
        assert rows[step].keys() == expected[step].keys()
        for name, value in rows[step].items():
            np.testing.assert_allclose(value, expected[step][name], rtol=1e-5, err_msg=f"{name} of step {step}")
    read, wanted = read_of(workdir), read_of(straight)
    assert all(read[step] == wanted[step] for step in range(1, last + 1))


def test_every_clip_is_read_once_an_epoch(straight):
    read = read_of(straight)
    clips = [clip for step in sorted(read) for clip in read[step]]
    epoch = len(set(clips))
    assert BATCH < epoch < STEPS * BATCH
    whole_steps = epoch // BATCH * BATCH
    assert len(set(clips[:whole_steps])) == whole_steps


def copied(killed, tmp_path):
    """The workdir as the killed run left it, but for what it wrote and read after its last checkpoint."""
    workdir, step = killed
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    for file in copy.glob("read_*.jsonl"):
        lines = [line for line in file.read_text().splitlines() if json.loads(line)[0] <= step]
        file.write_text("".join(f"{line}\n" for line in lines))
    rows = (copy / "metrics.jsonl").read_text().splitlines()[:step]
    (copy / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    return copy


def test_a_killed_run_of_two_processes_continues_in_one(killed, straight, tmp_path):
    workdir = copied(killed, tmp_path)
    (process,) = start(workdir, devices=8)
    assert process.wait(300) == 0, logs(workdir)
    assert "Resuming from step" in (workdir / "log_0").read_text()
    assert_same_run(workdir, straight, STEPS)


def test_sigterm_to_one_process_ends_both_with_a_checkpoint_of_the_same_step(killed, straight, tmp_path):
    workdir, before = copied(killed, tmp_path), killed[1]
    processes = start(workdir, devices=2, processes=2, seconds=0.3)
    wait_for(lambda: before + 1 in metrics_of(workdir), processes, workdir)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(100) for process in processes] == [143] * 2, logs(workdir)
    last = checkpoint.latest_step(workdir)
    assert before < last < STEPS
    assert_same_run(workdir, straight, last)
    # Only process 0 speaks.
    assert "Resuming" in (workdir / "log_0").read_text() and "Resuming" not in (workdir / "log_1").read_text()
