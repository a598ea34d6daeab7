"""OSV's Eq. 8 to 10 written out plainly, for a step to be held against: nothing here is from diffusion/ or objectives/.

What is compiled is compiled once for the same networks.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import quick_jit
from flax.traverse_util import flatten_dict

from osv_jax.models.discriminator import discriminate


def sigmas(index, num_levels=100):
    """t_{index + 1} of the grid, in float64."""
    low, high = 0.002 ** (1 / 7), 700.0 ** (1 / 7)
    return (low + np.asarray(index, np.float64) / (num_levels - 1) * (high - low)) ** 7


def column(values):
    return jnp.asarray(values, jnp.float32)[:, None, None, None, None]


@functools.cache
def denoiser(networks):
    def denoiser(variables, x, sigma, cond):
        s, sigma = column(sigma), jnp.asarray(sigma, jnp.float32)
        images = jnp.repeat(cond.image_latents[:, None], x.shape[1], axis=1)
        sample = jnp.concatenate([x / jnp.sqrt(s**2 + 1), images], axis=-1)
        prediction = networks.unet.apply(
            variables, sample, 0.25 * jnp.log(sigma), cond.image_embedding, cond.added_time_ids
        )
        return x / (s**2 + 1) - s / jnp.sqrt(s**2 + 1) * prediction

    return denoiser


@functools.cache
def compiled_denoiser(networks):
    return quick_jit(denoiser(networks))


def variables(base, student):
    params = flatten_dict(base) | flatten_dict(student.tuned)
    nested = {}
    for path, leaf in params.items():
        node = nested
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return {"params": nested, "lora": student.lora}


def example(denoiser, state, frozen, batch, index, noise, guidance, num_levels=100, steps=5):
    """x at t_{n+m}, its sigma, the target f_ema(x_tn, t_n) and lambda(t_n); guidance [b f]."""
    levels = [sigmas(np.asarray(index) + steps - i, num_levels) for i in range(steps + 1)]
    weight = jnp.asarray(guidance)[:, :, None, None, None]
    dropped = dataclasses.replace(
        batch.cond,
        image_embedding=0 * batch.cond.image_embedding,
        image_latents=0 * batch.cond.image_latents,
    )
    start = x = batch.latents + column(levels[0]) * noise
    for sigma, lower in itertools.pairwise(levels):
        unconditional, conditional = (denoiser({"params": frozen["unet"]}, x, sigma, c) for c in (dropped, batch.cond))
        guided = (1 - weight) * unconditional + weight * conditional
        x = x + column(lower - sigma) * (x - guided) / column(sigma)
    target = denoiser(variables(frozen["unet"], state.players["student"].ema), x, levels[-1], batch.cond)
    return start, levels[0], target, (1 / (levels[0] - levels[-1])) ** 0.1


def judge(networks, disc, frozen, latents, update_stats):
    logits, spectral = discriminate(
        networks.discriminator, networks.dinov2, disc, frozen["dinov2"], latents, update_stats
    )
    return jnp.concatenate(jax.tree.leaves(logits), axis=1), spectral


@functools.cache
def _disc_gradient(networks):
    @quick_jit
    def run(params, spectral, dinov2, real, fake):
        def loss(params):
            disc = {"params": params, "spectral": spectral}
            real_logits, updated = judge(networks, disc, {"dinov2": dinov2}, real, True)
            fake_logits, _ = judge(networks, disc, {"dinov2": dinov2}, fake, True)
            value = jnp.mean(jnp.maximum(0, 1 - real_logits)) + jnp.mean(jnp.maximum(0, 1 + fake_logits))
            return value, updated

        return jax.value_and_grad(loss, has_aux=True)(params)

    return run


def disc_gradient(networks, disc, frozen, real, fake):
    """Eq. 9: its value, its gradient, and the spectral statistics."""
    run = _disc_gradient(networks)
    (value, spectral), gradient = run(disc["params"], disc["spectral"], frozen["dinov2"], real, fake)
    return value, gradient, spectral


def whole(clips):
    return clips


@functools.cache
def _student_gradient(networks, seen):
    @quick_jit
    def run(student, disc, frozen, x, sigma, target, weight, cond, gan):
        def loss(student):
            answer = denoiser(networks)(variables(frozen["unet"], student), x, sigma, cond)
            logits, _ = judge(networks, disc, frozen, seen(answer), False)
            distance = jnp.sqrt((answer - target) ** 2 + 1e-6) - 1e-3
            terms = jnp.mean(jnp.maximum(0, 1 - logits)), jnp.mean(weight * distance.mean(axis=(1, 2, 3, 4)))
            return gan * terms[0] + terms[1], terms

        return jax.grad(loss, has_aux=True)(student)

    return run


def student_gradient(networks, disc, state, frozen, example, cond, gan=0.1, seen=whole):
    """Eq. 10: its two terms and the gradient of their sum, straight through everything; `seen` by the discriminator."""
    x, sigma, target, weight = example
    arguments = (jnp.asarray(sigma, jnp.float32), target, jnp.asarray(weight, jnp.float32), cond, gan)
    gradient, terms = _student_gradient(networks, seen)(state.players["student"].params, disc, frozen, x, *arguments)
    return terms, gradient
