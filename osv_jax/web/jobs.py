"""One computation at a time, for any number of people: they queue, see how far it is, and can cancel."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from typing import Any

from osv_jax.errors import UserError

# Who has not looked for so long [s] has gone away, and nothing is computed for nobody.
PATIENCE = 15.0


class Cancelled(Exception):
    """Nobody wants the result any more."""


class Job:
    """A computation that waits, runs or is over.

    Attributes:
        owner: who asked for it: each has one at a time.
        part: what it is doing.
        fraction: how much of it is done, 0 to 1.
        result: what it returned, when it is over.
        error: what it raised instead.
        over: set when it is over, however it ended.
    """

    def __init__(self, compute: Callable[[Job], Any], owner: str = "", patience: float = PATIENCE):
        """Args:
        compute: is given the job, to tell how far it is and to ask `check` now and then.
        patience: cancelled when nobody has called `watch` for so long [s].
        """
        self.owner, self.part, self.fraction = owner, "", 0.0
        self.result: Any = None
        self.error: BaseException | None = None
        self.over = threading.Event()
        self._compute, self._patience = compute, patience
        self._cancelled, self._watched = False, time.monotonic()

    def watch(self) -> None:
        """Somebody still wants it."""
        self._watched = time.monotonic()

    def cancel(self) -> None:
        """Ends it at its next `check`, or before it begins."""
        self._cancelled = True

    @property
    def unwanted(self) -> bool:
        """Whether it was cancelled, or nobody looks."""
        return self._cancelled or time.monotonic() - self._watched > self._patience

    def check(self) -> None:
        """Raises Cancelled if it is unwanted."""
        if self.unwanted:
            raise Cancelled

    def run(self) -> None:
        """Computes, and keeps what comes of it."""
        try:
            self.check()
            self.result = self._compute(self)
        except BaseException as error:
            self.error = error
        finally:
            self.over.set()


class Jobs:
    """Runs jobs one after the other, in the order in which they came, in a thread of its own.

    Args:
        most: so many may wait.
    """

    def __init__(self, most: int):
        self._most = most
        self._waiting: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self.current: Job | None = None
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Raises UserError if too many wait already, or another of this owner is not over."""
        with self._changed:
            self._drop_unwanted()
            if job.owner and any(other.owner == job.owner and not other.unwanted for other in self._all()):
                raise UserError("Your last video is still being made: wait for it, or cancel it.")
            if len(self._waiting) >= self._most:
                raise UserError(
                    f"The queue is full: {self._most} {'is' if self._most == 1 else 'are'} waiting already; try again"
                    " in a while."
                )
            self._waiting.append(job)
            self._changed.notify()

    def before(self, job: Job) -> int:
        """How many are served first."""
        with self._changed:
            self._drop_unwanted()
            alone = self.current is None or self.current is job
            return self._waiting.index(job) + (not alone) if job in self._waiting else 0

    def cancel(self, owner: str) -> bool:
        """Cancels what an owner has asked for; says whether there was something."""
        with self._changed:
            found = [job for job in self._all() if job.owner == owner]
            for job in found:
                job.cancel()
            self._drop_unwanted()
        return bool(found)

    def close(self, seconds: float) -> None:
        """Ends what runs at its next check, waits so long for that, and takes nothing more."""
        with self._changed:
            self._closed = True
            for job in self._all():
                job.cancel()
            self._changed.notify()
        self._thread.join(seconds)

    def _all(self) -> list[Job]:
        return [*([self.current] if self.current else []), *self._waiting]

    def _drop_unwanted(self) -> None:
        for job in [job for job in self._waiting if job.unwanted]:
            self._waiting.remove(job)
            job.cancel()
            job.run()  # Which ends at once.

    def _work(self) -> None:
        while True:
            with self._changed:
                self.current = None
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    self._drop_unwanted()
                    return
                self.current = self._waiting.popleft()
            self.current.run()
