"""The papers' losses. Each returns one value a clip; callers average."""

from __future__ import annotations

import jax.numpy as jnp
from einops import reduce
from flax import linen as nn
from jaxtyping import Array, Float

# Logits of the two kinds of discriminator heads, each [b n].
Logits = dict[str, Array]


def pseudo_huber(x: Float[Array, "b *rest"], y: Float[Array, "b *rest"], c: float = 1e-3) -> Float[Array, " b"]:
    """d(x, y) = sqrt((x - y)^2 + c^2) - c, averaged over a clip's elements (OSV, below Eq. 7; c: appendix C).

    The paper prints a vector norm. The public implementations of this family take the mean over elements, and only
    with it does an adversarial weight of 0.1 weigh anything.
    """
    distance = jnp.sqrt((x - y) ** 2 + c**2) - c
    return distance.reshape(distance.shape[0], -1).mean(axis=1)


def hinge_discriminator(real: Logits, fake: Logits) -> Float[Array, " b"]:
    """ReLU(1 - D(real)) + ReLU(1 + D(fake)), averaged over the logits of all heads (OSV Eq. 6 and 9)."""
    return _mean_over_logits(nn.relu(1 - _join(real))) + _mean_over_logits(nn.relu(1 + _join(fake)))


def hinge_generator(fake: Logits) -> Float[Array, " b"]:
    """ReLU(1 - D(fake)), averaged over the logits of all heads: the adversarial term of OSV Eq. 7 and 10."""
    return _mean_over_logits(nn.relu(1 - _join(fake)))


def _join(logits: Logits) -> Array:
    return jnp.concatenate([logits[kind] for kind in sorted(logits)], axis=1)


def _mean_over_logits(values: Float[Array, "b n"]) -> Float[Array, " b"]:
    return reduce(values, "b n -> b", "mean")
