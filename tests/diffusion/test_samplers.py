"""Samplers against OSV's Eq. 13 as printed and two departures from it, diffusers' scheduler, and counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import EulerDiscreteScheduler

from osv_jax.diffusion import samplers
from osv_jax.diffusion.conditioning import Conditioning
from osv_jax.diffusion.edm import EDMBackbone, sigma_grid
from osv_jax.diffusion.ode import guided_denoiser

SHAPE = (2, 3, 5, 7, 4)


def toy_network(sample, c_noise, embedding, ids):
    """A network that depends on everything it is given, not linearly."""
    noisy, image = sample[..., :4], sample[..., 4:]
    shift = (c_noise + embedding.mean(axis=-1) + 0.01 * ids.sum(axis=-1))[:, None, None, None, None]
    return jnp.sin(1.3 * noisy + shift) + 0.4 * image * noisy[:, ::-1]


@pytest.fixture
def cond(rng):
    parts = [rng.standard_normal(shape, np.float32) for shape in ((2, 6), (2, 5, 7, 4), (2, 3))]
    return Conditioning(*map(jnp.asarray, parts))


@pytest.fixture
def noise(rng):
    return jnp.asarray(rng.standard_normal(SHAPE, np.float32))


def counting(denoiser):
    """The denoiser, and the list of noise levels it will have been called with."""
    calls = []

    def counted(x, sigma):
        jax.debug.callback(lambda s: calls.append(np.asarray(s)), sigma, ordered=True)
        return denoiser(x, sigma)

    return counted, calls


def level(i, k):
    """t^k_i of OSV Eq. 13: 0, then every N/k-th of 100 Karras levels."""
    if i == 0:
        return 0.0
    index = int(np.floor(i * 100 / k + 0.5))
    low, high = 0.002 ** (1 / 7), 700.0 ** (1 / 7)
    return (low + (index - 1) / 99 * (high - low)) ** 7


def equation_13(network, cond, eps_0, k, level_of_x=False, mean_goes_on=False):
    """OSV Eq. 13 line by line as it is printed, in float64, with the paper's F, c_skip and c_out, and none of our code.

    Args:
        level_of_x: divide x - f by the level of x, not by that of the finer grid below it. Ours does.
        mean_goes_on: go on with the mean of the noises, the equation's last line, not with eps_0. Ours does.

    Returns:
        What F is asked about, in order, and at the end the sample.
    """

    def c_skip(s):
        return 1 / (s**2 + 1)

    def c_out(s):
        return -s / np.sqrt(s**2 + 1)

    def F(x, s):
        sample = np.concatenate([x / np.sqrt(s**2 + 1), np.repeat(cond.image_latents[:, None], 3, axis=1)], axis=-1)
        arguments = (sample, np.full(2, np.log(s) / 4), cond.image_embedding, cond.added_time_ids)
        return np.asarray(network(*(jnp.asarray(a, jnp.float32) for a in arguments)), np.float64)

    eps_0 = np.asarray(eps_0, np.float64)
    x = level(k, k) * eps_0
    states = [x]
    for i in range(k - 1, -1, -1):
        t, finer, lower = level(i + 1, k), level(i + 1, k + 1), level(i, k)
        f = c_skip(t) * x + c_out(t) * F(x, t)
        eps = (eps_0 + (x - f) / (t if level_of_x else finer)) / 2
        x_finer = f + finer * eps
        f_lower = c_skip(finer) * x_finer + c_out(finer) * F(x_finer, finer)
        eps_lower = (eps_0 + (x_finer - f_lower) / finer) / 2
        x = (
            c_skip(finer) * (f + finer * eps)
            + c_out(finer) * F(x_finer, finer)
            + lower * (eps_lower if mean_goes_on else eps_0)
        )
        states += [x_finer, x]
    return states


@pytest.mark.parametrize("k", [1, 2, 3])
def test_time_travel_is_equation_13_with_two_departures(cond, noise, k):
    denoiser, calls = counting(EDMBackbone(toy_network, cond))
    levels = samplers.even_levels(k), samplers.even_levels(k + 1)
    actual = jax.jit(lambda noise: samplers.time_travel(denoiser, noise, *levels))(noise)
    jax.effects_barrier()
    expected = equation_13(toy_network, cond, noise, k, level_of_x=True, mean_goes_on=True)[-1]
    assert relative_error(actual, expected) <= 1e-5
    assert len(calls) == samplers.num_evaluations("tts", k) == 2 * k
    assert all(call.shape == (2,) for call in calls)


def float64_denoise(x, sigma, cond):
    return np.asarray(EDMBackbone(toy_network, cond)(jnp.asarray(x, jnp.float32), jnp.full(2, sigma)), np.float64)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_printed_denominator_makes_noise_too_large_for_its_level(cond, noise, k):
    """At the first x': by half of what the level of x is more than the finer level, 24 times in all for k = 1."""
    x, printed, *_ = equation_13(toy_network, cond, noise, k)
    _, ours, *_ = equation_13(toy_network, cond, noise, k, level_of_x=True)
    t, finer = level(k, k), level(k, k + 1)
    f = float64_denoise(x, t, cond)
    assert relative_error(printed - ours, (t - finer) / 2 * (x - f) / t) <= 1e-5
    # In units of what the finer level stands for; the implied noise is about eps_0 at such levels.
    assert np.std((ours - f) / finer) == pytest.approx(np.std(np.asarray(noise)), rel=0.01)
    excess = np.std((printed - f) / finer) / np.std(np.asarray(noise))
    assert excess == pytest.approx((1 + t / finer) / 2, rel=0.01)
    assert k > 1 or excess == pytest.approx(24.1, rel=0.01)


def test_what_is_printed_goes_on_with_the_initial_noise(cond, noise):
    """Where ours goes on with the mean that the equation defines and does not use. One step has nothing to go on to."""
    one = [equation_13(toy_network, cond, noise, 1, True, mean_goes_on)[-1] for mean_goes_on in (False, True)]
    np.testing.assert_array_equal(*one)
    (_, _, printed, *_), (_, x_finer, ours, *_) = (
        equation_13(toy_network, cond, noise, 2, True, mean_goes_on) for mean_goes_on in (False, True)
    )
    implied = (x_finer - float64_denoise(x_finer, level(2, 3), cond)) / level(2, 3)
    assert relative_error(printed - ours, level(1, 2) / 2 * (noise - implied)) <= 1e-4
    # With this network 0.3 % of the noise.
    assert relative_error(printed, ours) == pytest.approx(0.0027, rel=0.05)


def test_one_step_time_travel_visits_700_and_14_8(cond, noise):
    denoiser, calls = counting(EDMBackbone(toy_network, cond))
    samplers.time_travel(denoiser, noise, samplers.even_levels(1), samplers.even_levels(2))
    jax.effects_barrier()
    np.testing.assert_allclose(calls, [[700, 700], [14.81128, 14.81128]], rtol=1e-5)


def test_time_travel_wants_a_grid_with_one_level_more(cond, noise):
    with pytest.raises(ValueError, match="must have 2 levels, got 1"):
        samplers.time_travel(lambda x, s: x, noise, samplers.even_levels(1), samplers.even_levels(1))


@pytest.mark.parametrize("k", [1, 3])
def test_consistency_adds_fresh_noise_between_k_evaluations(noise, k):
    seen = []

    def denoiser(x, sigma):
        jax.debug.callback(lambda *values: seen.append([np.asarray(v) for v in values]), x, sigma, ordered=True)
        return 0.5 + 0.0 * x

    levels = samplers.even_levels(k)
    sample = jax.jit(lambda n, keys: samplers.consistency(denoiser, n, levels, keys))(
        noise, jax.random.split(jax.random.key(3))
    )
    jax.effects_barrier()
    assert len(seen) == samplers.num_evaluations("consistency", k) == k
    np.testing.assert_array_equal(sample, np.full(SHAPE, 0.5, np.float32))
    # What was put to the denoiser, less the denoised value that it was made from, is noise of that level.
    noises = [(x - (0.5 if i else 0.0)) / sigma[0] for i, (x, sigma) in enumerate(seen)]
    np.testing.assert_allclose([sigma for _, sigma in seen], np.repeat(levels[::-1, None], 2, axis=1), rtol=1e-6)
    np.testing.assert_allclose(noises[0], noise, rtol=1e-5)
    for i, one in enumerate(noises):
        # 840 numbers a draw: mean and standard deviation are within five standard errors of 0 and 1.
        assert abs(one.mean()) < 0.18 and abs(one.std() - 1) < 0.13
        for other in noises[:i]:
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.18


def test_the_fresh_noise_of_a_clip_does_not_depend_on_the_others(noise):
    keys, levels = jax.random.split(jax.random.key(3)), samplers.even_levels(3)
    both = samplers.consistency(lambda x, sigma: 0.5 * x, noise, levels, keys)
    second = samplers.consistency(lambda x, sigma: 0.5 * x, noise[1:], levels, keys[1:])
    np.testing.assert_allclose(both[1:], second, rtol=1e-6)


def test_consistency_at_one_step_is_the_denoiser(cond, noise):
    keys = jax.random.split(jax.random.key(0))
    actual = samplers.consistency(EDMBackbone(toy_network, cond), noise, samplers.even_levels(1), keys)
    expected = EDMBackbone(toy_network, cond)(700 * noise, jnp.full(2, 700.0))
    assert relative_error(actual, expected) <= 1e-6


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers' scheduler
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_euler_is_diffusers_scheduler_with_guidance_per_frame(cond, noise, steps):
    # SVD's scheduler_config.json.
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        steps_offset=1,
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    scheduler.set_timesteps(steps)
    guidance = torch.linspace(1.0, 3.0, SHAPE[1])[:, None, None, None]
    latents = torch.from_numpy(np.array(noise)) * scheduler.init_noise_sigma

    def predict(latents, t, condition):
        images = np.repeat(condition.image_latents[:, None], SHAPE[1], axis=1)
        sample = np.concatenate([latents.numpy(), images], axis=-1)
        c_noise = jnp.full(2, t.item())
        return torch.from_numpy(
            np.array(toy_network(sample, c_noise, condition.image_embedding, condition.added_time_ids))
        )

    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, t)
        unconditional, conditional = predict(scaled, t, cond.unconditional()), predict(scaled, t, cond)
        prediction = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(prediction, t, latents).prev_sample

    batches = []

    def network(sample, *rest):
        jax.debug.callback(lambda: batches.append(len(sample)))
        return toy_network(sample, *rest)

    denoiser = guided_denoiser(EDMBackbone(network, cond), np.linspace(1, 3, SHAPE[1], dtype=np.float32))
    actual = jax.jit(lambda noise: samplers.euler(denoiser, noise, samplers.euler_levels(steps)))(noise)
    jax.effects_barrier()
    assert relative_error(actual, latents) <= 2e-4
    # Every step is one call with conditional and unconditional clips side by side.
    assert batches == [4] * steps
    assert samplers.num_evaluations("euler", steps) == 2 * steps
    assert samplers.num_evaluations("euler", steps, guided=False) == steps


def test_levels_are_spaced_evenly_by_index():
    grid = sigma_grid(100)
    np.testing.assert_array_equal(samplers.even_levels(4), grid[[24, 49, 74, 99]])
    np.testing.assert_array_equal(samplers.even_levels(3), grid[[32, 66, 99]])
    np.testing.assert_array_equal(samplers.even_levels(100), grid)
    np.testing.assert_array_equal(samplers.even_levels(2, num_levels=5), sigma_grid(5)[[2, 4]])


@pytest.mark.parametrize("steps", [0, 101])
def test_impossible_steps_are_refused(steps):
    with pytest.raises(ValueError, match=rf"1 \.\. 100, got {steps}"):
        samplers.even_levels(steps)


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="'ddim'"):
        samplers.num_evaluations("ddim", 1)
