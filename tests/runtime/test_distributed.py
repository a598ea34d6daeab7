"""Which environments make a process join others; that joined ones train together is in test_processes.py."""

import signal

import pytest

from osv_jax import train
from osv_jax.errors import Stopped, UserError
from osv_jax.runtime import command_line, distributed


@pytest.fixture
def joined(monkeypatch):
    """The arguments with which the runtime was started, one tuple a call."""
    calls = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *args: calls.append(args))
    return calls


def test_the_three_variables_name_the_others(joined):
    environment = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    distributed.join(environment)
    assert joined == [("host:1234", 4, 3)]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, []),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, []),
        ({"SLURM_NTASKS": "8"}, []),  # In the batch script itself, before srun.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, [()]),
    ],
)
def test_slurm_tasks_join_and_single_processes_do_not(joined, environment, expected):
    distributed.join(environment)
    assert joined == expected


def test_a_tpu_machine_knows_its_slice(joined, monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    distributed.join({})
    assert joined == [()]
    distributed.join({"TPU_SKIP_MDS_QUERY": "1"})  # What JAX sets where it finds no TPU.
    assert joined == [()]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("host:1", "", ""), ["JAX_COORDINATOR_ADDRESS is set", "JAX_NUM_PROCESSES and JAX_PROCESS_ID is not"]),
        (("host:1", "2", "2"), ["JAX_PROCESS_ID=2", "one less"]),
        (("host:1", "two", "0"), ["JAX_NUM_PROCESSES=two"]),
    ],
)
def test_half_an_environment_is_refused(joined, values, words):
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    with pytest.raises(UserError) as error:
        distributed.join(dict(zip(names, values, strict=True)))
    assert all(word in str(error.value) for word in words), error.value
    assert joined == []


def test_a_preempted_program_reports_it(monkeypatch, capsys):
    def preempted(*args, **kwargs):
        raise Stopped("SIGTERM: step 3 is saved.", signal.SIGTERM)

    monkeypatch.setattr(command_line.app, "run", preempted)
    with pytest.raises(SystemExit) as status:
        train.run()
    assert status.value.code == 143
    assert capsys.readouterr().err == "SIGTERM: step 3 is saved.\n"


def test_that_it_will_be_saved_is_said_once(monkeypatch, capfd):
    """A second Ctrl-C reaches the handler, too, if the thread that ends the process for it comes later."""
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # Tests in the background ignore Ctrl-C.
    with distributed.watch_signals() as stop_signal:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert stop_signal(1) == signal.SIGINT
    assert capfd.readouterr().err == "Ctrl-C: saving after this step; once more ends at once.\n"
