"""Reading and comparing what training runs left in their workdirs."""

import functools

import jax
import numpy as np
import orbax.checkpoint as ocp

from osv_jax.runtime import paths
from osv_jax.runtime.metrics import read_metrics


@functools.cache
def state_of(workdir: paths.Path, step: int) -> dict:
    """The state of one checkpoint, whole, as nested dicts."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        return checkpointer.restore(paths.absolute(workdir / "checkpoints" / str(step) / "state"))


def metrics_of(workdir: paths.Path) -> dict[int, dict]:
    """The metrics of every step, without those that no run repeats."""
    rows = read_metrics(workdir / "metrics.jsonl")
    timing = ("seconds_per_step", "clips_per_second")
    return {row["step"]: {k: v for k, v in row.items() if k not in timing} for row in rows}


def assert_same(actual, expected) -> None:
    """Two states are equal, bit for bit."""
    leaves, others = jax.tree.leaves_with_path(actual), jax.tree.leaves(expected)
    assert len(leaves) == len(others) > 0
    for (path, leaf), other in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(leaf, other, err_msg=jax.tree_util.keystr(path))
