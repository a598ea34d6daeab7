"""How programs end: with a line on stderr that says why, and an exit status. Imports no JAX, for `osv_jax.prepare`."""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

import absl.logging

from osv_jax.errors import Stopped, UserError

# What the machine may refuse to any program that writes files: room, and all else.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG, errno.ENAMETOOLONG, errno.EISDIR)
# What a bucket refuses is told by exceptions of gcsfs and of what it speaks through, by an OSError of gcsfs' that has
# no number, and by those of Google's clients in C++, with which TensorStore writes.
_BUCKET_MODULES = ("gcsfs", "aiohttp", "requests", "google.auth", "google.api_core")
_BUCKET_WORDS = re.compile(r"Forbidden: |PERMISSION_DENIED: |UNAUTHENTICATED: ")


def run(main: Callable[[], object]) -> None:
    """Runs a program and exits with its status, see `exit_status`, unless that is 0; after Ctrl-C with status 130."""
    # The process that Python starts to remove semaphores left behind, as they are below, need not tell of them.
    sys.warnoptions.append("ignore:resource_tracker")
    try:
        status = exit_status(main)
    except KeyboardInterrupt:
        sys.stdout.flush()
        print("Ended by Ctrl-C.", file=sys.stderr, flush=True)
        # XLA crashes when the interpreter is taken down while it still computes.
        os._exit(128 + signal.SIGINT)
    if status:
        sys.exit(status)


def exit_status(main: Callable[[], object]) -> int:
    """Runs a program, to be called in the main thread.

    Ctrl-C (SIGINT) raises KeyboardInterrupt, unless the program handles that itself; a second one ends the process at
    once, whatever it is doing.

    Returns:
        0, or after a line on stderr: 2 for what the user can fix, which is `UserError` or that the machine or a bucket
        refuses a file, a full disk for example; or what `Stopped` says. Any other exception is raised.
    """
    # Orbax warns of files that it does not need, and logs hundreds of lines about an error, which it raises, too.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # It is only slower without.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    with _ending_at_second_interrupt(), _quiet_threads():
        try:
            main()
            return 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except Stopped as stop:
            print(stop, file=sys.stderr)
            return stop.exit_status
        except Exception as error:
            sentence = _refusal(error)
            if sentence is None:
                raise
            print(f"error: {sentence}", file=sys.stderr)
            return 2


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """What is started inside, threads and processes, never receives Ctrl-C: this process ends them in good order."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """To be called in a worker process, which would wait for work for ever if its parent were killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is no worker process"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _ending_at_second_interrupt() -> Iterator[None]:
    """Python's handlers of signals wait until the main thread comes back from C, from a compilation for example."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.SIG_IGN:  # As shells start what is in the background.
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    interrupts = 0

    def watch() -> None:
        nonlocal interrupts
        with open(reader, "rb", buffering=0) as signals:
            while received := signals.read(1):
                interrupts += received[0] == signal.SIGINT
                if interrupts > 1:
                    os._exit(128 + signal.SIGINT)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        watcher.join()
        # Ending takes a moment, in which another one must not cause a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL if interrupts else handler)


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """After an error of TensorStore's, which is raised, its threads complain that their event loop is closed."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda error: before(error) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    finally:
        sys.unraisablehook = before


def _refusal(error: BaseException) -> str | None:
    """A sentence about what the machine or a bucket refused, if that is what an exception comes from."""
    for cause in _causes(error):
        is_full = isinstance(cause, OSError) and cause.errno in _FULL
        # Libraries in C++ and Rust raise their own, with the operating system's words in it.
        if is_full or any(os.strerror(number) in str(cause) for number in _FULL):
            file = getattr(cause, "filename", None)
            where = f" in {pathlib.Path(os.fsdecode(file)).parent}" if file else ""
            return (
                f"There is no room left{where}: make some, and give the same command again; what had been saved is"
                " intact."
            )
        if _is_of_bucket(cause):
            reason = (str(cause).splitlines() or [type(cause).__name__])[0]
            return (
                f"A bucket cannot be read or written ({reason[:300]}): check the network, that you are logged in"
                " (`gcloud auth application-default login`) and what you may do there, and give the same command"
                " again; what had been saved is intact."
            )
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return f"{error.filename or 'A file'} cannot be read or written ({error.strerror})."
    return None


def _is_of_bucket(error: BaseException) -> bool:
    module = type(error).__module__
    is_clients = any(f"{module}.".startswith(f"{name}.") for name in _BUCKET_MODULES)
    return is_clients or (isinstance(error, OSError | ValueError) and _BUCKET_WORDS.match(str(error)) is not None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, those that it was raised from or while handling, and those of a group."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            waiting += [found.__context__, found.__cause__, *getattr(found, "exceptions", ())]
            yield found
