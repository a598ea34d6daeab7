"""Noise levels and the denoiser: against SVD's scheduler in diffusers, and against the papers' equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import EulerDiscreteScheduler

from osv_jax.diffusion import edm
from osv_jax.diffusion.conditioning import Conditioning

# The scheduler hands torch tensors to NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def scheduler():
    """SVD's scheduler_config.json, with the 100 levels of OSV."""
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    scheduler.set_timesteps(100)
    return scheduler


def test_grid_is_the_scheduler_s(scheduler):
    grid = edm.sigma_grid()
    assert grid.dtype == np.float32
    assert grid.shape == (100,)
    np.testing.assert_allclose(grid, scheduler.sigmas.numpy()[-2::-1], rtol=3e-6)
    np.testing.assert_allclose(edm.scalings(jnp.asarray(grid)).c_noise, scheduler.timesteps.numpy()[::-1], atol=1e-6)


def test_grid_ends_at_its_bounds():
    grid = edm.sigma_grid(5, 0.1, 80.0, rho=3.0)
    np.testing.assert_allclose(grid[[0, -1]], [0.1, 80.0], rtol=1e-6)
    np.testing.assert_allclose(np.diff(grid.astype(np.float64) ** (1 / 3), n=2), 0, atol=1e-6)


def test_scalings_are_svds():
    """SF-V Eq. 2."""
    sigma = np.geomspace(0.002, 700, 50)
    c = edm.scalings(jnp.asarray(sigma, jnp.float32))
    np.testing.assert_allclose(c.c_skip, 1 / (sigma**2 + 1), rtol=1e-5)
    np.testing.assert_allclose(c.c_out, -sigma / np.sqrt(sigma**2 + 1), rtol=1e-5)
    np.testing.assert_allclose(c.c_in, 1 / np.sqrt(sigma**2 + 1), rtol=1e-5)
    np.testing.assert_allclose(c.c_noise, 0.25 * np.log(sigma), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("boundary", edm.BOUNDARIES)
def test_no_noise_is_finite_in_value_and_gradient(boundary):
    sigma = jnp.array([0.0, 0.5])
    for i, value in enumerate(edm.scalings(sigma, boundary)):
        assert np.isfinite(value).all()
        assert np.isfinite(jax.grad(lambda s, i=i: edm.scalings(s, boundary)[i].sum())(sigma)).all()
    assert edm.scalings(sigma).c_skip[0] == 1
    assert edm.scalings(sigma).c_out[0] == 0


@pytest.mark.parametrize(("boundary", "tolerance"), [("svd", 0.0021), ("exact", 0.0)])
def test_boundary_condition(boundary, tolerance):
    """OSV Eq. 4: f(x, kappa) = x at kappa = 0.002, which SVD's own scalings meet to 0.2%."""
    c = edm.scalings(jnp.array(edm.SIGMA_MIN), boundary)
    np.testing.assert_allclose(c.c_skip, 1, rtol=0, atol=tolerance)
    np.testing.assert_allclose(c.c_out, 0, rtol=0, atol=tolerance)


def test_exact_boundary_shifts_sigma():
    """OSV Eq. 4 with sigma_data = 1."""
    sigma = np.geomspace(0.002, 700, 50)
    c = edm.scalings(jnp.asarray(sigma, jnp.float32), "exact")
    np.testing.assert_allclose(c.c_skip, 1 / ((sigma - 0.002) ** 2 + 1), rtol=1e-5)
    np.testing.assert_allclose(c.c_out, -(sigma - 0.002) / np.sqrt(sigma**2 + 1), rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(c.c_in, edm.scalings(jnp.asarray(sigma, jnp.float32)).c_in)


def test_unknown_boundary_is_refused():
    with pytest.raises(ValueError, match=r"boundary must be one of \('svd', 'exact'\), got 'hard'"):
        edm.scalings(jnp.ones(1), "hard")


def toy_network(sample, c_noise, embedding, ids):
    """Depends on all of its arguments, differently for each channel; for arrays of either library."""
    scale = (c_noise + embedding.sum(-1) + 0.01 * ids.sum(-1))[:, None, None, None, None]
    return sample[..., :4] * scale + 0.3 * sample[..., 4:] ** 2


def test_denoised_clip_is_the_scheduler_s(scheduler, rng):
    """SF-V Eq. 2; each clip at a noise level of its own."""
    levels = [0, 31, 77, 99]
    clean, eps = rng.standard_normal((2, 4, 3, 5, 7, 4), np.float32)
    cond = Conditioning(
        image_embedding=rng.standard_normal((4, 6), np.float32),
        image_latents=rng.standard_normal((4, 5, 7, 4), np.float32),
        added_time_ids=rng.standard_normal((4, 3), np.float32),
    )
    sigma = scheduler.sigmas[levels].numpy()
    x = clean + sigma[:, None, None, None, None] * eps
    actual = edm.EDMBackbone(toy_network, cond)(jnp.asarray(x), jnp.asarray(sigma))
    for clip, level in enumerate(levels):
        timestep = scheduler.timesteps[level]
        noisy = torch.tensor(x[clip : clip + 1])
        scheduler._step_index = None
        scaled = scheduler.scale_model_input(noisy, timestep)
        image = torch.tensor(cond.image_latents[clip])[None, None].expand(1, 3, -1, -1, -1)
        others = (torch.tensor(value[clip : clip + 1]) for value in (cond.image_embedding, cond.added_time_ids))
        prediction = toy_network(torch.cat([scaled, image], -1), timestep[None], *others)
        expected = scheduler.step(prediction, timestep, noisy).pred_original_sample
        assert relative_error(actual[clip], expected[0]) < 2e-5


def test_boundary_reaches_the_denoiser(rng):
    x = jnp.asarray(rng.standard_normal((1, 2, 3, 3, 4)), jnp.float32)
    cond = Conditioning(jnp.ones((1, 2)), jnp.ones((1, 3, 3, 4)), jnp.ones((1, 3)))
    sigma = jnp.array([edm.SIGMA_MIN])
    np.testing.assert_array_equal(edm.EDMBackbone(toy_network, cond, "exact")(x, sigma), x)
    assert relative_error(edm.EDMBackbone(toy_network, cond)(x, sigma), x) > 1e-4


@pytest.mark.parametrize(("log_mean", "log_std"), [(15.0, 1.0), (20.0, 0.01)])
def test_noise_above_all_levels_is_the_highest(log_mean, log_std):
    probabilities = edm.discretised_lognormal(edm.sigma_grid(4), log_mean, log_std)
    assert probabilities[-1] > 0.99 and probabilities.sum() == pytest.approx(1)
