"""How strongly and how often R1 (`losses.r1`) counts in a discriminator's loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from osv_jax.objectives.objective import Metrics
from osv_jax.objectives.options import setting
from osv_jax.runtime.ranges import COUNT, NOT_NEGATIVE

# NaN in steps without a penalty.
METRIC = "r1"


@dataclasses.dataclass(frozen=True)
class PenaltyOptions:
    """The gradient penalty of a discriminator on real clips.

    Attributes:
        weight: gamma of SF-V Eq. 11, which the paper leaves open; 0: no penalty.
        every: so many steps from one penalty to the next, which counts as many times.
    """

    weight: float = setting(1e-5, NOT_NEGATIVE)
    every: int = setting(1, COUNT)


def weighted(
    options: PenaltyOptions, step: Int[Array, ""], penalty: Callable[[], Float[Array, ""]]
) -> tuple[Float[Array, ""] | float, Metrics]:
    """What is added to the loss, and the penalty itself as a metric.

    Args:
        step: the number of the step.
        penalty: is only computed in the steps that have one.
    """
    if not options.weight:
        return 0.0, {}
    if options.every == 1:
        value = penalty()
        return options.weight * value, {METRIC: value}
    now = step % options.every == 0
    value = jax.lax.cond(now, penalty, lambda: jnp.zeros(()))
    return options.every * options.weight * value, {METRIC: jnp.where(now, value, jnp.nan)}
