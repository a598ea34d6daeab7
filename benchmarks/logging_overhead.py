"""What metrics, checkpoints and pictures cost a run: pairs of the same run with all of them and with none.

    python benchmarks/logging_overhead.py --config=configs/stage1.py:tiny --every=200 --pairs=3

A pair is two runs of `--every` steps and two more, one with a checkpoint and a picture in the middle and metrics of
every step, and one that only trains; the time is that between the metrics of the second step and of the last but one,
so that neither compilation nor what every run does at its end is in it. The runs of a pair change places.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import statistics
import tempfile
import time
from unittest import mock

from ml_collections import ConfigDict

from osv_jax import experiment, train
from osv_jax.runtime import checkpoint, command_line, metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/stage1.py:tiny", help="(default %(default)s)")
    parser.add_argument("--every", type=int, default=200, help="steps from checkpoint to checkpoint (default 200)")
    parser.add_argument("--pairs", type=int, default=3, help="(default %(default)s)")
    arguments = parser.parse_args()
    command_line.keep_compiled_programs()
    config = experiment.read_config(arguments.config)
    config.num_steps = arguments.every + 2
    config.picture_every = config.checkpoint_every = arguments.every // 2 + 1
    overheads = []
    for pair in range(arguments.pairs):
        order = (True, False) if pair % 2 else (False, True)
        seconds = {written: seconds_per_step(config, written) for written in order}
        overheads.append(seconds[True] / seconds[False] - 1)
        print(
            f"pair {pair + 1}: {seconds[True]:.4f} s a step with everything, {seconds[False]:.4f} s without,"
            f" {overheads[-1]:+.2%}",
            flush=True,
        )
    print(f"median {statistics.median(overheads):+.2%}, from {min(overheads):+.2%} to {max(overheads):+.2%}")


def seconds_per_step(config: ConfigDict, written: bool) -> float:
    """The time of a step of a run of its own, from the second to the last but one."""
    times: dict[int, float] = {}
    write_row = metrics.MetricsWriter.write

    def write(self: metrics.MetricsWriter, step: int, row: dict[str, float]) -> None:
        if written:
            write_row(self, step, row)
        times[step] = time.perf_counter()

    with contextlib.ExitStack() as replaced:
        replaced.enter_context(mock.patch.object(metrics.MetricsWriter, "write", write))
        if not written:
            replaced.enter_context(mock.patch.object(metrics.MetricsWriter, "write_picture"))
            replaced.enter_context(mock.patch.object(metrics, "loss_curves"))
            replaced.enter_context(mock.patch.object(train, "make_picture"))
            replaced.enter_context(mock.patch.object(checkpoint, "save"))
        folder = replaced.enter_context(tempfile.TemporaryDirectory())
        train.train(config, pathlib.Path(folder) / "run")
    return (times[config.num_steps - 1] - times[2]) / (config.num_steps - 3)


if __name__ == "__main__":
    main()
