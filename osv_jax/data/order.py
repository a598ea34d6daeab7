"""Which record goes into which step: a function of the seed and the position, for any number of processes.

Record `i` of the endless sequence of records depends on (seed, i) only. Step s holds records s B .. s B + B - 1, and
process p of P reads its contiguous B / P of them, so the position alone resumes a run on any number of processes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import grain

from osv_jax.errors import UserError


class Order:
    """The records of this process; every epoch is a new permutation, and batches run across the ends of epochs.

    Args:
        num_records: of an epoch.
        batch_size: B, of all processes together.
        seed: 0 .. 2**32 - 1.
        process_index, process_count: which of how many equal parts of each batch is this process's.

    Raises:
        UserError: if the batch does not split over the processes.
    """

    def __init__(
        self,
        num_records: int,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if batch_size % process_count:
            raise UserError(
                f"A batch of {batch_size} clips does not split over {process_count} processes; use a multiple of that."
            )
        self.part = batch_size // process_count
        self.num_steps = sys.maxsize // batch_size
        self._batch_size, self._first = batch_size, process_index * self.part
        self._records = grain.MapDataset.source(range(num_records)).seed(seed).shuffle().repeat()

    def record(self, local: int) -> int:
        """The record at a position of this process's sequence, which has `part` records a step."""
        step, offset = divmod(local, self.part)
        return self._records[step * self._batch_size + self._first + offset]


def save_position(content_hash: str, batch_size: int, seed: int, step: int) -> dict[str, int | str]:
    """What a checkpoint keeps of the data after `step` steps: a dict that JSON can hold.

    Args:
        content_hash: of what decides which record a position means.
    """
    return {"position": step * batch_size, "seed": seed, "index_hash": content_hash}


def restore_step(state: Mapping[str, Any], content_hash: str, name: str, batch_size: int, seed: int) -> int:
    """The step at which reading continues from what `save_position` returned.

    Args:
        name: what the data are called in a message, e.g. "The videos in DIR".

    Raises:
        UserError: if the data, the seed or the batch size are not those of the saved run, because the remaining
            records would be others.
    """
    if state["index_hash"] != content_hash:
        raise UserError(
            f"{name} are not those that the checkpoint was trained on; restore them, or start a new run in an empty"
            " workdir."
        )
    if state["seed"] != seed:
        raise UserError(f"The checkpoint was trained with data seed {state['seed']}, not {seed}; use the same seed.")
    if state["position"] % batch_size:
        raise UserError(
            f"The checkpoint stands at record {state['position']}, which is not a whole number of batches of"
            f" {batch_size}; use the batch size it was trained with."
        )
    return state["position"] // batch_size
