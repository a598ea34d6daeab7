"""Programs in processes of their own, to which Ctrl-C is sent as a terminal does: to all that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

import pytest


class Program:
    """A program under way; at the end of a `with` block it is killed."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]):
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Tests in the background have it ignored, and children.
        try:
            self._process = subprocess.Popen(
                command,
                env=environment | {"PYTHONUNBUFFERED": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        self._read = {"stdout": b"", "stderr": b""}
        self._readers = [threading.Thread(target=self._follow, args=(name,), daemon=True) for name in self._read]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for reader in self._readers:
            reader.join()
        self._process.stdout.close()
        self._process.stderr.close()

    def _follow(self, name: str) -> None:
        while read := os.read(getattr(self._process, name).fileno(), 65536):
            self._read[name] += read

    @property
    def printed(self) -> dict[str, str]:
        """What has come of stdout and of stderr by now."""
        return {name: read.decode(errors="replace") for name, read in self._read.items()}

    def wait_until(self, condition: Callable[[], bool], seconds: float = 200) -> None:
        """Fails if it ends, or time runs out, before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or self._process.poll() is not None:
                pytest.fail(f"too late, status {self._process.poll()}: {self.printed}")
            time.sleep(0.005)

    def wait_for(self, words: str) -> None:
        """The same until it has printed some words."""
        self.wait_until(lambda: any(words in text for text in self.printed.values()))

    def press(self) -> None:
        """Ctrl-C."""
        os.killpg(self._process.pid, signal.SIGINT)

    def ended(self, seconds: float = 60) -> int:
        """Its status, once it and all that could have printed something are gone."""
        status = self._process.wait(seconds)
        for reader in self._readers:
            reader.join(10)
        assert not any(reader.is_alive() for reader in self._readers), "a process that it started is left"
        return status

    def last_lines(self) -> list[str]:
        """What it has printed on stderr beside its bars of progress, in lines."""
        lines = self.printed["stderr"].replace("\r", "\n").splitlines()
        return [line for line in lines if line.strip() and "%|" not in line and "it/s" not in line]
