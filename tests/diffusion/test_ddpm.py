"""DDPM's schedules, parameterisation and samplers against diffusers' scheduler and the equations written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import DDIMScheduler

from osv_jax.diffusion import ddpm
from osv_jax.diffusion.ode import guided_denoiser

SHAPE = (2, 3, 5, 7, 4)
SCHEDULES = {"linear": ddpm.animatediff_schedule(), "scaled_linear": ddpm.stable_diffusion_schedule()}


def scheduler_of(kind):
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=kind, steps_offset=1, clip_sample=False)


def toy_network(x, t, context):
    """A network that depends on everything it is given, not linearly."""
    shift = (0.01 * t + context.mean(axis=(1, 2)))[:, None, None, None, None]
    return jnp.sin(1.3 * x + shift) + 0.2 * x[:, ::-1]


@pytest.fixture
def noise(rng):
    return rng.standard_normal(SHAPE, np.float32)


@pytest.fixture
def cond(rng):
    return ddpm.TextConditioning(*(jnp.asarray(rng.standard_normal((2, 6, 8), np.float32)) for _ in range(2)))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_are_those_of_diffusers(kind):
    kept = scheduler_of(kind).alphas_cumprod.numpy()
    schedule = SCHEDULES[kind]
    assert len(schedule.alpha) == ddpm.NUM_TIMES == 1000
    assert relative_error(schedule.alpha, np.sqrt(kept)) < 1e-5
    assert relative_error(schedule.sigma, np.sqrt(1 - kept)) < 1e-5


@pytest.mark.parametrize("kind", SCHEDULES)
def test_equation_1_adds_noise(rng, noise, kind):
    x0, t = rng.standard_normal(SHAPE, np.float32), np.array([17, 999])
    expected = scheduler_of(kind).add_noise(torch.tensor(x0), torch.tensor(noise), torch.tensor(t))
    assert relative_error(ddpm.add_noise(x0, noise, t, SCHEDULES[kind]), expected) < 1e-5


def test_clean_latents_below_equation_2(rng, noise):
    x, schedule = rng.standard_normal(SHAPE, np.float32), SCHEDULES["linear"]
    scheduler = scheduler_of("linear")
    scheduler.set_timesteps(25)
    actual = ddpm.remove_noise(x, noise, np.array([41, 961]), schedule)
    for i, t in enumerate((41, 961)):
        expected = scheduler.step(torch.tensor(noise[i]), t, torch.tensor(x[i])).pred_original_sample
        assert relative_error(actual[i], expected) < 1e-5


def test_ddim_equation_12_keeps_the_noise_that_the_prediction_implies(rng, noise):
    x0 = rng.standard_normal(SHAPE, np.float32)
    alpha, sigma = SCHEDULES["linear"]
    there = ddpm.ddim_step(alpha[300] * x0 + sigma[300] * noise, x0, (alpha[300], sigma[300]), (alpha[90], sigma[90]))
    assert relative_error(there, alpha[90] * x0 + sigma[90] * noise) < 1e-5


@pytest.mark.parametrize("steps", [25, 7])
def test_teacher_is_diffusers_ddim_with_guidance(noise, cond, steps):
    scheduler = scheduler_of("linear")
    scheduler.set_timesteps(steps)
    times = ddpm.ddim_times(steps)
    np.testing.assert_array_equal(times, scheduler.timesteps)
    expected = torch.tensor(noise)
    network = jax.jit(toy_network)
    for t in scheduler.timesteps:
        x = jnp.asarray(expected.numpy())
        without, conditional = (network(x, jnp.full(2, float(t)), text) for text in (cond.negative, cond.context))
        guided = without + 7.5 * (conditional - without)
        expected = scheduler.step(torch.tensor(np.array(guided)), t, expected).prev_sample
    backbone = ddpm.DDPMBackbone(toy_network, cond, SCHEDULES["linear"])
    denoiser = jax.jit(guided_denoiser(backbone, jnp.array([7.5])))
    actual = ddpm.ddim(denoiser, jnp.asarray(noise), times, SCHEDULES["linear"])
    # Guidance of 7.5 and the many signs of a sine carry what is rounded in one step into the next.
    assert relative_error(actual, expected) < 1e-3


def test_student_predicts_and_noises_afresh_at_four_times(noise, cond):
    schedule, keys = SCHEDULES["linear"], jax.random.split(jax.random.key(3), 2)
    seen = []

    def denoiser(x, t):
        seen.append(np.asarray(t))
        return backbone(x, t)

    backbone = ddpm.DDPMBackbone(jax.jit(toy_network), cond, schedule)
    times = ddpm.few_step_times(4)
    sample = ddpm.few_step(denoiser, jnp.asarray(noise), times, schedule, keys)
    np.testing.assert_array_equal(seen, [[999, 999], [749, 749], [499, 499], [249, 249]])
    x, fresh = noise, [jax.random.normal(key, (3, *SHAPE[1:])) for key in keys]
    for i, t in enumerate((999, 749, 499, 249)):
        x0 = (x - schedule.sigma[t] * toy_network(x, jnp.full(2, float(t)), cond.context)) / schedule.alpha[t]
        if i < 3:
            x = schedule.alpha[t - 250] * x0 + schedule.sigma[t - 250] * np.stack([eps[i] for eps in fresh])
    assert relative_error(sample, x0) < 1e-4


def test_a_student_of_one_step_is_trained_on_noise_itself(rng):
    """It has no fresh noise, and in Algorithm 1 no round."""
    noise, fresh = rng.standard_normal(SHAPE, np.float32), np.zeros((SHAPE[0], 0, *SHAPE[1:]), np.float32)
    of_input = functools.partial(ddpm.few_step_input, lambda x, t: 0.5 * x, times=ddpm.few_step_times(1))
    made = jax.jit(functools.partial(of_input, schedule=SCHEDULES["linear"]))(noise, fresh, stop=jnp.asarray(0))
    np.testing.assert_array_equal(made, noise)


@pytest.mark.parametrize(("times", "most"), [(ddpm.ddim_times, 500), (ddpm.few_step_times, 1000)])
def test_times_go_down_inside_the_schedule(times, most):
    for steps in (1, 3, 4, most):
        assert (np.diff(times(steps)) < 0).all()
        assert 0 <= times(steps).min() <= times(steps).max() < 1000
        assert len(times(steps)) == steps
    for steps in (0, most + 1):
        with pytest.raises(ValueError, match=rf"^steps must be in 1 \.\. {most}, got {steps}\."):
            times(steps)
