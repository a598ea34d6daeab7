"""What metrics, checkpoints and pictures cost a run, measured by pairs of neighbouring blocks of steps of one run.

    python benchmarks/logging_overhead.py --config=configs/stage1.py:tiny --block=20 --pairs=10

Blocks take turns: in one everything is written (metrics of every step and, in its middle, a checkpoint, a picture and
curves), in the next nothing is. What the first takes longer is the cost of one checkpoint and picture and of the
block's metrics; the median over the pairs is given in seconds, and as a part of so many steps as the configuration, and
its untouched variant, have between two checkpoints. A drift of the machine's speed falls on both blocks of a pair
alike, and one event in few steps shows more than in many.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from unittest import mock

from ml_collections import ConfigDict

from osv_jax import train
from osv_jax.runtime import checkpoint, command_line, metrics
from osv_jax.runtime.ranges import COUNT
from osv_jax.training import previews
from osv_jax.training.config import read_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/stage1.py:tiny", help="(default %(default)s)")
    parser.add_argument("--block", type=COUNT, default=20, help="steps of a block (default %(default)s)")
    parser.add_argument("--pairs", type=COUNT, default=10, help="(default %(default)s)")
    arguments = parser.parse_args()
    command_line.keep_compiled_programs()
    config = read_config(arguments.config)
    intervals = {
        arguments.config: config.checkpoint_every,
        arguments.config.partition(":")[0]: read_config(arguments.config.partition(":")[0]).checkpoint_every,
    }
    written, plain = blocks(config, arguments.block, arguments.pairs)
    extra = [w - p for w, p in zip(written, plain, strict=True)]
    for number, pair in enumerate(zip(written, plain, extra, strict=True), 1):
        print("pair {}: {:.2f} s with everything, {:.2f} s without, {:+.2f} s".format(number, *pair))
    step = statistics.median(plain) / arguments.block
    low, median, high = statistics.quantiles(extra, n=4)
    print(f"steps of {step:.3f} s; one checkpoint and picture {median:+.2f} s (quartiles {low:+.2f}, {high:+.2f})")
    for name, every in intervals.items():
        print(f"every {every} steps, as in {name}: {median / (every * step):+.2%}")


def blocks(config: ConfigDict, block: int, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of the blocks in which everything is written, and of those in which nothing is."""
    # One block before them, so that what is done for the first time is in none; and one step after.
    config.num_steps = (2 * pairs + 1) * block + 1
    # In the middle of a block: a checkpoint is written in the background of the steps that follow.
    config.picture_every = config.checkpoint_every = block // 2
    # Step -> when its metrics were there.
    times: dict[int, float] = {}
    kept: dict[str, Callable] = {
        "write": metrics.MetricsWriter.write,
        "write_picture": metrics.MetricsWriter.write_picture,
        "curves": metrics.loss_curves,
        "make_picture": previews.make_picture,
        "save": checkpoint.save,
    }

    def number_of(step: int) -> int:
        return (step - 1) // block

    def wanted(step: int) -> bool:
        """In blocks 0, 2, 4, ..., and events in their middles only."""
        return number_of(step) % 2 == 0

    def now() -> int:
        return max(times, default=0)

    def is_event(step: int) -> bool:
        return wanted(max(step, 1)) and step % block == block // 2

    def write(self: metrics.MetricsWriter, step: int, row: dict[str, float]) -> None:
        if wanted(step):
            kept["write"](self, step, row)
        times[step] = time.perf_counter()

    def write_picture(self: metrics.MetricsWriter, name: str, step: int, picture: object) -> None:
        if picture is not None:
            kept["write_picture"](self, name, step, picture)

    def make_picture(*args: object) -> object:
        draw = kept["make_picture"](*args)
        return lambda state, frozen: draw(state, frozen) if is_event(now()) else (None, {})

    def save(checkpoints: object, step: int, state: object, data: object) -> None:
        if is_event(step):
            kept["save"](checkpoints, step, state, data)

    def curves(*args: object) -> None:
        if is_event(now()):
            kept["curves"](*args)

    with contextlib.ExitStack() as replaced:
        for owner, name, function in (
            (metrics.MetricsWriter, "write", write),
            (metrics.MetricsWriter, "write_picture", write_picture),
            (metrics, "loss_curves", curves),
            (previews, "make_picture", make_picture),
            (checkpoint, "save", save),
        ):
            replaced.enter_context(mock.patch.object(owner, name, function))
        folder = replaced.enter_context(tempfile.TemporaryDirectory())
        train.train(config, pathlib.Path(folder) / "run")
    # Block 0 is left out, so pairs begin with a block in which nothing is written.
    seconds = [times[(i + 1) * block] - times[i * block] for i in range(1, 2 * pairs + 1)]
    return seconds[1::2], seconds[::2]


if __name__ == "__main__":
    main()
