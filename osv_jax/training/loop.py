"""The training loop of every objective: steps, metrics, checkpoints, pictures, and an orderly end."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array
from ml_collections import ConfigDict

from osv_jax.errors import Stopped
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Objective
from osv_jax.objectives.players import TrainState
from osv_jax.runtime import checkpoint, distributed, ending, mesh, metrics
from osv_jax.runtime.compiler import compiler_options
from osv_jax.runtime.finite import NotFinite
from osv_jax.runtime.paths import Path
from osv_jax.training.clips import LatentClips, PixelClips
from osv_jax.training.config import Phase
from osv_jax.training.setup import make_train_step

# Steps the host may be ahead of the devices: enough that they never wait for it, few enough that a value that is not
# finite is noticed at once.
_STEPS_IN_FLIGHT = 2
# `(state, frozen) -> (image, metrics)` of a picture.
Picture = Callable[[TrainState, Params], tuple[np.ndarray, Mapping[str, float]]]
# `(state, frozen) -> metrics` of what has been trained so far.
Evaluation = Callable[[TrainState, Params], Mapping[str, float]]


@dataclasses.dataclass
class Run:
    """What the phases of a run have in common.

    Attributes:
        config: the loop reads its `seed`, `batch_size`, `num_steps` and the intervals.
        picture_name: of the files of pictures.
        make_picture: gives the function that draws, for the clips of a phase.
        make_evaluation: the same of the function that measures every `eval_every` steps, if anything does.
        shardings: of the state.
    """

    config: ConfigDict
    workdir: Path
    objective: Objective
    devices: jax.sharding.Mesh
    clips: PixelClips | LatentClips
    frozen: Params
    shardings: Any
    checkpoints: ocp.CheckpointManager
    writer: metrics.MetricsWriter
    picture_name: str
    make_picture: Callable[[Phase], Picture]
    make_evaluation: Callable[[Phase], Evaluation] | None = None


def run_phase(run: Run, phase: Phase, start: int, state: TrainState) -> TrainState:
    """Trains from step `start` to the end of the phase, on clips of its size.

    Raises:
        NotFinite: when a metric is not.
        Stopped: after SIGTERM or Ctrl-C, when the last finished step is saved.
    """
    # Closing ends the processes that read, if there are any.
    with contextlib.closing(iter(run.clips.batches(phase, start))) as local_batches:
        return _train(run, phase, start, state, iter(mesh.global_batches(local_batches, run.devices)))


def _train(
    run: Run, phase: Phase, start: int, state: TrainState, batches: Iterator[dict[str, jax.Array]]
) -> TrainState:
    config, curves = run.config, run.objective.curves
    with ending.without_interrupts():  # Processes that read, if there are any, start with the first batch.
        batch = next(batches)
    print(f"Compiling the step for {phase.height} x {phase.width} ...", flush=True)
    compile_start = time.perf_counter()
    names, step = compile_step(run, state, batch)
    print(f"Compiled in {time.perf_counter() - compile_start:.0f} s.")
    progress = _Progress(run, phase, start, names)
    draw = run.make_picture(phase)
    evaluate = run.make_evaluation(phase) if run.make_evaluation else None
    if start == 0:
        _write_picture(run, 0, draw(state, run.frozen))
    progress.begin()
    with distributed.watch_signals() as stop_signal:
        for number in range(start + 1, phase.end + 1):
            state, values = step(state, run.frozen, batch)
            progress.add(number, values)
            last = number == phase.end
            stop = stop_signal(number) if number < config.num_steps else None
            if not (last or stop):
                batch = next(batches)
            if number % config.checkpoint_every == 0 or last or stop:
                progress.finish()  # A state whose metrics are not finite must not become a checkpoint.
                run.writer.flush()
                checkpoint.save(run.checkpoints, number, state, run.clips.save_position(phase, number))
            if stop:
                run.checkpoints.wait_until_finished()
                raise Stopped(f"{stop.name}: step {number} is saved. The same command continues from there.", stop)
            if number % config.picture_every == 0 or last:
                progress.finish()
                _write_picture(run, number, draw(state, run.frozen))
                run.writer.flush()
                if jax.process_index() == 0:
                    drawn = [name for name in curves if name in progress.seen]
                    metrics.loss_curves(run.workdir / "metrics.jsonl", run.workdir / "losses.png", drawn)
            if evaluate and (number % config.eval_every == 0 or last):
                progress.finish()
                _write_measured(run, number, evaluate(state, run.frozen))
            progress.rest()
    return state


def _write_picture(run: Run, number: int, drawn: tuple[np.ndarray, Mapping[str, float]]) -> None:
    picture, measured = drawn
    _write_measured(run, number, measured)
    run.writer.write_picture(run.picture_name, number, picture)


def _write_measured(run: Run, number: int, measured: Mapping[str, float]) -> None:
    if measured:
        run.writer.write(number, measured)
        print("  " + ", ".join(f"{name} {value:.4g}" for name, value in measured.items()), flush=True)


class _Progress:
    """Metrics of the steps in flight: waited for in order, checked, written and shown."""

    def __init__(self, run: Run, phase: Phase, start: int, names: list[str]):
        self._run, self._phase, self._names = run, phase, names
        self._in_flight: collections.deque[tuple[int, Array]] = collections.deque()
        self._last_done, self._shown_at = 0.0, (start, 0.0)
        # Names of all metrics that there has been a value of.
        self.seen: set[str] = set()

    def begin(self) -> None:
        """The clock starts."""
        self._last_done = time.perf_counter()
        self._shown_at = (self._shown_at[0], self._last_done)

    def add(self, number: int, values: Array) -> None:
        """A step has been started; the oldest is waited for if too many are under way."""
        self._in_flight.append((number, values))
        if len(self._in_flight) > _STEPS_IN_FLIGHT:
            self._finish_one()

    def finish(self) -> None:
        """Waits for all steps that have been started."""
        while self._in_flight:
            self._finish_one()

    def rest(self) -> None:
        """Steps are not charged for checkpoints and pictures, before which all have been waited for."""
        if not self._in_flight:
            self._last_done = time.perf_counter()

    def _finish_one(self) -> None:
        run, config = self._run, self._run.config
        number, values = self._in_flight.popleft()
        row = dict(zip(self._names, np.asarray(values).tolist(), strict=True))
        # (If more than a missing measurement is wrong, the loss is not finite either.)
        optional = run.objective.may_be_missing
        row = {name: row[name] for name in row if not (name.startswith(optional) and math.isnan(row[name]))}
        now = time.perf_counter()
        seconds = now - self._last_done
        row |= {"seconds_per_step": seconds, "clips_per_second": config.batch_size / seconds}
        self._last_done = now
        self.seen |= row.keys()
        run.writer.write(number, row)
        _check_finite(run, number, row)
        if number % config.log_every == 0 or number == self._phase.end:
            steps, seconds = number - self._shown_at[0], now - self._shown_at[1]
            shown = {name: row[name] for name in run.objective.curves if name in row}
            print(
                metrics.progress_line(number, config.num_steps, seconds / steps, config.batch_size, shown), flush=True
            )
            self._shown_at = (number, now)


def _check_finite(run: Run, number: int, row: Mapping[str, float]) -> None:
    bad = [name for name, value in row.items() if not math.isfinite(value)]
    if not bad:
        return
    kept = run.checkpoints.latest_step()
    where = f"the checkpoint of step {kept} is intact" if kept else "no checkpoint had been written yet"
    raise NotFinite(
        f"Step {number}: {', '.join(f'{name} is {row[name]}' for name in bad)}. Training stopped; {where}."
        " Lower the learning rates or set config.optimizer.max_grad_norm, in a new workdir."
    )


def compile_step(run: Run, state: TrainState, batch: dict[str, jax.Array]) -> tuple[list[str], Callable]:
    """Compiles the step ahead of time; the compiled program is never recompiled unnoticed.

    Returns:
        The metrics' names, and `(state, frozen, batch) -> (state, vector of metrics)`, which donates the state.
    """
    train_step = make_train_step(run.config, run.objective)
    names: list[str] = []

    def packed(state: TrainState, frozen: Params, batch: dict[str, jax.Array]) -> tuple[TrainState, jax.Array]:
        state, values = train_step(state, frozen, batch)
        names[:] = sorted(values)  # Known once this has been traced.
        # One array is one transfer to the host.
        return state, jnp.stack([values[name] for name in names])

    out_shardings = (run.shardings, mesh.replicated(run.devices))
    step = jax.jit(packed, donate_argnums=0, out_shardings=out_shardings).lower(state, run.frozen, batch)
    return names, step.compile(compiler_options())
