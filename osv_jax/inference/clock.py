"""How long parts of the work take on the devices, though nobody waits for them."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from typing import Any

import jax


class Clock:
    """Adds up the time of parts that are started one after the other, and done in that order.

    A part begins when the one before is done, or when it is started, whichever is later.

    Attributes:
        last: is done when the time of all that has been started by then is known.
    """

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "clock")
        self._done = 0.0
        self.last: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.last.set_result(None)

    def add(self, seconds: dict[str, float], part: str, result: Any, on_begin: Callable[[], None]) -> None:
        """Measures a part that has just been started.

        Args:
            seconds: its time is added to what stands there under `part`.
            result: its arrays, on their way.
            on_begin: called when it begins.
        """
        self.last = self._thread.submit(self._measure, seconds, part, result, on_begin, time.perf_counter())

    def _measure(
        self, seconds: dict[str, float], part: str, result: Any, on_begin: Callable[[], None], started: float
    ) -> None:
        on_begin()
        jax.block_until_ready(result)
        now = time.perf_counter()
        seconds[part] += now - max(started, self._done)
        self._done = now
