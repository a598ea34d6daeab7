"""The exceptions with which programs end in good order."""

from __future__ import annotations

import signal


class UserError(Exception):
    """A mistake in the input, told in one sentence: what was wrong, what was expected, what to do.

    The programs print it without a traceback and exit with status 2. Everything else that is raised is a bug in
    `osv_jax` and keeps its traceback.
    """


class Stopped(Exception):
    """A signal came, and what was finished by then has been saved, which is told in one sentence.

    Attributes:
        exit_status: 128 and the signal's number, as of a process that it killed: schedulers take 143 (SIGTERM) for a
            preemption, shells 130 (SIGINT) for Ctrl-C.
    """

    def __init__(self, message: str, received: signal.Signals):
        super().__init__(message)
        self.exit_status = 128 + received
