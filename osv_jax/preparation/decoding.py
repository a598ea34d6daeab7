"""Decoding in worker processes, ahead of whoever takes the clips, and in the order of the videos."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool

from osv_jax.data import cutting
from osv_jax.data.cutting import CLIPS_AT_ONCE, Cut, Task
from osv_jax.runtime.ending import end_with_parent, without_interrupts


class Decoder:
    """Worker processes that cut videos. Closing it, or the end of a `with` block, ends them.

    Args:
        num_workers: processes.
        function: what they do; a parameter for tests.
    """

    def __init__(self, num_workers: int, function: Callable[[Task], Cut] = cutting.cut):
        self._num_workers, self._function = num_workers, function
        self._pool = self._new_pool(num_workers)

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def cuts(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Cut]]:
        """The results of whole videos in their order, each followed by the rest of a video with many clips.

        Two videos more than there are workers are decoded ahead.
        """
        for task, result in self._in_order(tasks):
            yield task, result
            stretches = (
                range(first, min(first + CLIPS_AT_ONCE, result.num_clips))
                for first in range(CLIPS_AT_ONCE, result.num_clips, CLIPS_AT_ONCE)
            )
            rest = (
                dataclasses.replace(task, rest=stretch, start=result.start)
                for stretch in stretches
                if stretch.stop > task.skip
            )
            yield from self._in_order(rest)

    def _in_order(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Cut]]:
        tasks = iter(tasks)
        waiting: collections.deque[tuple[Task, concurrent.futures.Future]] = collections.deque()
        while True:
            while len(waiting) < self._num_workers + 2:
                task = next(tasks, None)
                if task is None:
                    break
                waiting.append((task, self._submit(task)))
            if not waiting:
                return
            task, future = waiting.popleft()
            yield task, self._result(task, future)

    def _submit(self, task: Task) -> concurrent.futures.Future:
        try:
            return self._start(self._pool, task)
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._pool = self._new_pool(self._num_workers)
            return self._start(self._pool, task)

    def _start(self, pool: concurrent.futures.Executor, task: Task) -> concurrent.futures.Future:
        with without_interrupts():  # A pool starts its processes when there is something to do.
            return pool.submit(self._function, task)

    def _result(self, task: Task, future: concurrent.futures.Future) -> Cut:
        with contextlib.suppress(BrokenProcessPool):
            return future.result()
        # Some video has killed its worker, and all that were waiting with it. Whether it was this one shows alone.
        with self._new_pool(1) as alone:
            try:
                return self._start(alone, task).result()
            except BrokenProcessPool:
                return Cut(reason="crashes the decoder")

    def _new_pool(self, num_workers: int) -> concurrent.futures.ProcessPoolExecutor:
        # A forked process would inherit JAX's threads in an unknown state.
        context = multiprocessing.get_context("spawn")
        return concurrent.futures.ProcessPoolExecutor(num_workers, context, initializer=end_with_parent)
