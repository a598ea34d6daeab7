"""The papers' losses. Each returns one value a clip; callers average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import reduce
from flax import linen as nn
from jaxtyping import Array, Float

# Logits by kind of discriminator head, each [b n].
Logits = dict[str, Array]


def pseudo_huber(x: Float[Array, " b *rest"], y: Float[Array, " b *rest"], c: float = 1e-3) -> Float[Array, " b"]:
    """d(x, y) = sqrt((x - y)^2 + c^2) - c, averaged over a clip's elements (OSV, below Eq. 7; c: appendix C).

    The paper prints a vector norm. The public implementations of this family take the mean over elements, and only
    with it does an adversarial weight of 0.1 weigh anything.
    """
    distance = jnp.sqrt((x - y) ** 2 + c**2) - c
    return distance.reshape(distance.shape[0], -1).mean(axis=1)


def squared_error(x: Float[Array, " b *rest"], y: Float[Array, " b *rest"]) -> Float[Array, " b"]:
    """||x - y||^2 of SF-V Eq. 1, as the mean over a clip's elements (EDM's own code does the same)."""
    square = (x - y) ** 2
    return square.reshape(square.shape[0], -1).mean(axis=1)


def denoising_weight(sigma: Float[Array, " b"], min_snr_gamma: float = 0.0) -> Float[Array, " b"]:
    """lambda_sigma of SF-V Eq. 1: (sigma^2 + 1) / sigma^2, which makes the loss that of v, of unit size at every sigma.

    Args:
        sigma: noise levels, above 0.
        min_snr_gamma: gamma of min-SNR weighting (Hang et al. 2023, section 3.4), or 0 for none. The data having unit
            variance, SNR = 1 / sigma^2, and the loss of v is SNR + 1 times the squared error of x_0; the paper's
            factor for v, min(SNR, gamma) / (SNR + 1), turns that into min(SNR, gamma). High noise then counts little.
    """
    snr = 1 / sigma**2
    return jnp.minimum(snr, min_snr_gamma) if min_snr_gamma else snr + 1


def hinge_discriminator(real: Logits, fake: Logits) -> Float[Array, " b"]:
    """ReLU(1 - D(real)) + ReLU(1 + D(fake)), averaged over the logits of all heads (OSV Eq. 6 and 9)."""
    return _mean_over_logits(nn.relu(1 - _join(real))) + _mean_over_logits(nn.relu(1 + _join(fake)))


def hinge_generator(fake: Logits) -> Float[Array, " b"]:
    """ReLU(1 - D(fake)), averaged over the logits of all heads: the adversarial term of OSV Eq. 7 and 10."""
    return _mean_over_logits(nn.relu(1 - _join(fake)))


def linear_generator(fake: Logits) -> Float[Array, " b"]:
    """-D(fake), averaged over the logits of all heads: SF-V Eq. 8, whose D is negative for real, and ADD's."""
    return _mean_over_logits(-_join(fake))


def softplus_discriminator(real: Logits, fake: Logits) -> Float[Array, " b"]:
    """-log D(real) - log(1 - D(fake)) with D = sigmoid(logit): AVDM2 Eq. 6, to be minimised; mean of all logits."""
    return _mean_over_logits(nn.softplus(-_join(real))) + _mean_over_logits(nn.softplus(_join(fake)))


def softplus_generator(fake: Logits) -> Float[Array, " b"]:
    """-log D(fake), the non-saturating loss: AVDM2 Eq. 7, which is printed as what is to be maximised."""
    return _mean_over_logits(nn.softplus(-_join(fake)))


def distribution_matching_gradient(
    x: Float[Array, "b f h w c"], real: Float[Array, "b f h w c"], fake: Float[Array, "b f h w c"]
) -> Float[Array, "b f h w c"]:
    """w(t) (eps_real - eps_fake), the gradient of the KL divergence with respect to x (AVDM2 Eq. 4 and 8).

    At x_t = alpha_t x + sigma_t eps the networks predict a noise each, and the clean clips that this implies are affine
    in it: eps_real - eps_fake = (alpha_t / sigma_t) (fake - real). The weight w(t), which is not printed, is DMD's: it
    divides by the mean of |x - real| over a clip, which makes gradients of all t about as large.

    Args:
        x: the student's clips, or some frames of them.
        real: what the pretrained network takes the noised clips for.
        fake: what the network that follows the student takes them for.
    """
    return (fake - real) / jnp.abs(x - real).mean(axis=(1, 2, 3, 4), keepdims=True)


def with_gradient(x: Float[Array, " b *rest"], gradient: Float[Array, " b *rest"]) -> Float[Array, " b"]:
    """1/2 ||x - sg(x - g)||^2, mean over elements: a loss with g, over their number, for its gradient (DMD2 Eq. 4)."""
    return 0.5 * squared_error(x, jax.lax.stop_gradient(x - gradient))


def r1(logits_of: Callable[[Any], Logits], x: Any) -> Float[Array, " b"]:
    """R1 of every clip: ||d sum(D) / dx||^2, summed over all of x (Mescheder et al. 2018; SF-V Eq. 11).

    Args:
        logits_of: D, in which no clip depends on another.
        x: real clips, or features of theirs (ADD); trees of arrays with the clips as first axis.
    """
    gradient = jax.grad(lambda x: _join(logits_of(x)).sum())(x)
    return jnp.asarray(sum(_sum_of_squares(leaf) for leaf in jax.tree.leaves(gradient)))


def r1_by_difference(
    logits_of: Callable[[Array], Logits], x: Float[Array, " b *rest"], noise: Float[Array, " b *rest"], step: float
) -> Float[Array, " b"]:
    """An estimate of `r1` without its second derivatives: ((sum D(x + step noise) - sum D(x)) / step)^2.

    For small steps its mean over standard normal noise is R1 (Lin et al. 2025, section 3.5).
    """
    change = _join(logits_of(x + step * noise)) - _join(logits_of(x))
    return (change.sum(axis=1) / step) ** 2


def _sum_of_squares(x: Float[Array, " b *rest"]) -> Float[Array, " b"]:
    return jnp.square(x.astype(jnp.float32)).reshape(x.shape[0], -1).sum(axis=1)


def _join(logits: Logits) -> Array:
    return jnp.concatenate([logits[kind] for kind in sorted(logits)], axis=1)


def _mean_over_logits(values: Float[Array, "b n"]) -> Float[Array, " b"]:
    return reduce(values, "b n -> b", "mean")
