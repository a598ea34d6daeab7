"""Whether a run has lowered its loss: that of its first and of its last state, on the same clips, levels and noise.

    python benchmarks/loss_on_equal_draws.py runs/demo/stage2

The loss of a step depends so much on the noise level drawn that the curve of a short run says little.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from osv_jax.convert import lora_files, weights
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Objective
from osv_jax.objectives.players import TrainState
from osv_jax.runtime import checkpoint, mesh
from osv_jax.runtime.ranges import COUNT
from osv_jax.training import origins, setup
from osv_jax.training.clips import open_clips
from osv_jax.training.config import phases_of

# The step draws everything from its number: numbers that training has not reached are fresh draws.
_FRESH = 1_000_000
_LOSSES = ("loss_huber", "loss_distillation", "loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--batches", type=COUNT, default=32, help="(default %(default)s)")
    arguments = parser.parse_args()
    workdir = arguments.workdir
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    networks = setup.networks_of(config)
    objective = setup.objective_of(config, networks)
    devices = mesh.make_mesh(-1, 1)
    clips, phase = open_clips(config, networks, workdir), phases_of(config)[-1]
    batches = list(itertools.islice(clips.batches(phase, 0), arguments.batches))
    with jax.set_mesh(devices), checkpoint.open_checkpoints(workdir, config.keep_checkpoints) as checkpoints:
        frozen = setup.load_frozen(config, networks, devices)
        first = first_state(config, objective, frozen)
        like = checkpoint.abstract(first, mesh.parameter_shardings(devices, first))
        last = checkpoint.restore_state(checkpoints, checkpoints.latest_step(), like)
        step = jax.jit(setup.make_train_step(config, objective))
        before, after = (np.array(losses_of(step, state, frozen, batches)) for state in (first, last))
    for name, values in {"before": before, "after": after, "after - before": after - before}.items():
        error = values.std() / len(values) ** 0.5
        print(f"{name:<15} {values.mean():.5f} +- {error:.5f} over {len(values)} batches")


def first_state(config: ConfigDict, objective: Objective, frozen: Params) -> TrainState:
    """The state that the run began with."""
    init = jax.jit(setup.make_init(objective))
    state = init(jax.random.key(config.seed), frozen)
    if not config.init_from:
        return state
    origin = pathlib.Path(weights.locate(config.init_from))
    if lora_files.is_lora(origin):
        read = origins.read_lora(origin, config, objective.networks)
        return origins.start_from_lora(read.lora, config, state, objective)
    return origins.start_from(origin, state, objective)


def losses_of(step: Callable, state: TrainState, frozen: Params, batches: Iterable[dict[str, Any]]) -> list[float]:
    """The loss of every batch, none of which changes the state."""
    losses = []
    for number, batch in enumerate(batches):
        _, metrics = step(dataclasses.replace(state, step=jnp.int32(_FRESH + number)), frozen, batch)
        losses.append(float(next(metrics[name] for name in _LOSSES if name in metrics)))
    return losses


if __name__ == "__main__":
    main()
