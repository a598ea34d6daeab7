"""Several processes as one run: joining the others at the start, and ending in good order when the machine is taken."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import signal
from collections.abc import Callable, Iterator, Mapping

import jax
from jax.experimental import multihost_utils

from osv_jax.errors import UserError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of the run, if the environment tells of any; call it before anything uses a device.

    Three ways to say so: the variables JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID; a SLURM step of several tasks (`srun`); a TPU machine, which knows its slice by itself.

    Raises:
        UserError: when only some of the variables are set, or they are no numbers.
    """
    given = [name for name in _VARIABLES if environment.get(name)]
    if given:
        missing = [name for name in _VARIABLES if name not in given]
        if missing:
            raise UserError(f"{' and '.join(given)} is set, but {' and '.join(missing)} is not; set all three or none.")
        address, *numbers = (environment[name] for name in _VARIABLES)
        if not all(number.isdigit() for number in numbers) or not int(numbers[1]) < int(numbers[0]):
            raise UserError(
                f"JAX_NUM_PROCESSES={numbers[0]} and JAX_PROCESS_ID={numbers[1]} must be numbers, the second from 0 to"
                " one less than the first."
            )
        jax.distributed.initialize(address, int(numbers[0]), int(numbers[1]))
    elif _is_slurm_step(environment) or _is_tpu_machine(environment):
        jax.distributed.initialize()


def _is_slurm_step(environment: Mapping[str, str]) -> bool:
    return int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment


def _is_tpu_machine(environment: Mapping[str, str]) -> bool:
    if "TPU_SKIP_MDS_QUERY" in environment:
        return False
    return importlib.util.find_spec("libtpu") is not None and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*"))


@contextlib.contextmanager
def quiet_but_first() -> Iterator[None]:
    """Only process 0 prints, or a pod's every line would come from all of its hosts; errors are shown by each."""
    with contextlib.ExitStack() as stack:
        if jax.process_index() != 0:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


@contextlib.contextmanager
def watch_signals() -> Iterator[Callable[[int], signal.Signals | None]]:
    """Inside, neither SIGTERM nor Ctrl-C (SIGINT) ends the process, unless that comes again; see `ending.exit_status`.

    Yields:
        `stop_signal(step)`, to be asked once after every step: the signal for which to save now and leave, if there is
        one. With several processes there is one for the same step in all of them, whichever received it.
    """
    is_alone = jax.process_count() == 1
    received: list[signal.Signals] = []

    def note(number: int, frame: object) -> None:
        is_new = number not in received
        received.append(signal.Signals(number))
        # A second one may come here, too, before the thread that ends the process for it.
        if number == signal.SIGINT and is_new:
            # `print` cannot be called again from within itself.
            os.write(2, b"Ctrl-C: saving after this step; once more ends at once.\n")
            if not is_alone:
                os.kill(os.getpid(), signal.SIGTERM)  # Of which JAX tells the others.

    def stop_signal(step: int) -> signal.Signals | None:
        own = received[0] if received else None
        if is_alone:
            return own
        return (own or signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else None

    watched = [signal.SIGINT] if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN else []
    watched += [signal.SIGTERM] if is_alone else []
    before = {number: signal.signal(number, note) for number in watched}
    try:
        yield stop_signal
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
