"""Gradient accumulation: a batch is processed in equal parts, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def split_batch(batch: Any, parts: int) -> Any:
    """Every part takes one clip from each device in turn, so that a sharded batch stays where it is."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def mean_over_parts(function: Callable[[Any], tuple[Any, Any]], parts: Any, num_parts: int) -> tuple[Any, Any]:
    """`function` of every part, one at a time, with one running sum in memory.

    Args:
        function: returns what is averaged over the parts, and what is kept of each (None for nothing).

    Returns:
        The mean, and what was kept, stacked.
    """
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first)[0])

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        value, kept = function(part)
        return jax.tree.map(jnp.add, total, value), kept

    total, kept = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / num_parts, total), kept


def mean_over_batch(function: Callable[[Any], Any], batch: Any, num_parts: int) -> Any:
    """`function`, which averages over clips, of the whole batch: in `num_parts` parts, or at once if that is 1."""
    if num_parts == 1:
        return function(batch)
    return mean_over_parts(lambda part: (function(part), None), split_batch(batch, num_parts), num_parts)[0]
