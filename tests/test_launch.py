"""The launch scripts, with stand-ins for the schedulers' commands."""

import os
import pathlib
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"


@pytest.fixture
def run(tmp_path):
    """Runs a script; `python`, `srun` and the others write down what they were called with."""

    def run(script, *arguments, statuses=(0,), **variables):
        (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        for name in ("python", "srun", "scontrol", "gcloud", "xpk"):
            command = tmp_path / "bin" / name
            command.parent.mkdir(exist_ok=True)
            command.write_text(
                f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/calls\n'
                f"status=$(head -n 1 {tmp_path}/statuses); sed -i 1d {tmp_path}/statuses; exit ${{status:-0}}\n"
            )
            command.chmod(0o755)
        environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"} | variables
        result = subprocess.run(
            [LAUNCH / script, *arguments], env=environment, capture_output=True, text=True, timeout=60
        )
        calls = tmp_path / "calls"
        return result, calls.read_text() if calls.exists() else ""

    return run


def test_gpu_host_trains(run):
    result, calls = run("gpu_host.sh", "--config=a", "--workdir=b c")
    assert result.returncode == 0 and calls == "python -m osv_jax.train --config=a --workdir=b c\n"


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (143, True), (2, False)])
def test_slurm_queues_a_preempted_job_again_and_no_other(run, status, requeued, tmp_path):
    variables = {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(tmp_path)}
    result, calls = run("slurm.sh", "--config=a", statuses=(status, 0), **variables)
    assert "osv_jax.train --config=a" in calls.splitlines()[0]
    assert ("scontrol requeue 17" in calls) == requeued
    assert result.returncode == (0 if requeued else status)


def test_tpu_pod_runs_on_all_workers(run):
    where = {"NAME": "osv", "ZONE": "z"}
    result, calls = run("tpu_pod.sh", "train", "--workdir=a b", **where)
    assert result.returncode == 0, result.stderr
    assert "tpu-vm ssh osv --zone=z --worker=all" in calls and r"osv_jax.train --workdir=a\ b" in calls
    result, calls = run("tpu_pod.sh", "create", **where, TYPE="v5litepod-16", SPOT="1")
    assert "queued-resources create osv" in calls and "--accelerator-type=v5litepod-16" in calls and "--spot" in calls
    result, _ = run("tpu_pod.sh", "destroy", **where)
    assert result.returncode == 2 and "destroy is none of" in result.stderr
    result, _ = run("tpu_pod.sh", "status")
    assert result.returncode != 0 and "the name of the slice" in result.stderr


def test_xpk_restarts_the_job(run):
    result, calls = run("xpk.sh", "stage1", "--config=a", CLUSTER="c", TYPE="v5litepod-16", IMAGE="i")
    assert result.returncode == 0, result.stderr
    assert "workload create --cluster=c --workload=stage1 --tpu-type=v5litepod-16" in calls
    assert "--max-restarts=100" in calls and "python -m osv_jax.train --config=a" in calls
