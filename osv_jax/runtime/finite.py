"""NaN and infinity, found and named where they come in, before all there is of them is a black picture."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from osv_jax.errors import UserError


class NotFinite(UserError):
    """What was computed is not finite; see `blame_weights`."""


def is_finite(array: Any) -> bool:
    """Whether all values are; of an array over several processes, this one's part."""
    if isinstance(array, jax.Array):
        parts = {str(shard.index): shard.data for shard in array.addressable_shards}  # Copies count once.
        return all(np.isfinite(np.asarray(part)).all() for part in parts.values())
    return bool(np.isfinite(array).all())


def first_not_finite(tree: Any) -> str | None:
    """The name of the first leaf that is not, its path with slashes; None if all are."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not is_finite(leaf):
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return None


def check_finite(values: Any, name: str) -> None:
    """Raises UserError if a value of an array, or of a tree of arrays, is not finite.

    Args:
        name: of the array or of the whole tree.
    """
    leaf = first_not_finite(values)
    if leaf is not None:
        where = f", first in {leaf}" if leaf else ""
        raise UserError(
            f"{name} has values that are NaN or infinite{where}: it is damaged; use another copy, or an earlier one."
        )


@contextlib.contextmanager
def blame_weights(weights: Any) -> Iterator[None]:
    """Where something is not finite inside, tells of the weight that is not, if there is one.

    Looking through all weights takes seconds, which only a failure is worth.

    Args:
        weights: the parameters of networks, by their names.
    """
    try:
        yield
    except NotFinite as error:
        if name := first_not_finite(weights):
            raise UserError(
                f"The weights are damaged: {name} has values that are NaN or infinite; convert them again, from another"
                " copy."
            ) from error
        raise


def strict_json(value: Any, indent: int | None = None) -> str:
    """The JSON of what was measured. It has no NaN and no infinity: they are written as null."""
    return json.dumps(_or_null(value), indent=indent, allow_nan=False)


def _or_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _or_null(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_or_null(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
