"""The teacher's guided solver against diffusers' scheduler, and against an ODE with a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from conftest import relative_error
from diffusers import EulerDiscreteScheduler
from torch_reference import flax_params, torch_unet

from osv_jax.diffusion.edm import EDMBackbone, sigma_grid
from osv_jax.diffusion.ode import euler_solve, guided_denoiser
from osv_jax.objectives.consistency import distance_weight
from osv_jax.objectives.losses import pseudo_huber
from osv_jax.objectives.networks import build_networks

NUM_LEVELS, STEPS = 100, 5
FRAMES, HEIGHT, WIDTH = 3, 5, 7


@pytest.fixture(scope="module")
def teacher():
    """PyTorch's UNet, and ours with its weights as (network, parameters)."""
    # So small a network runs twenty times slower on threads that have to wait for each other on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = torch_unet(tiny.CONFIGS["unet"])
    yield model, build_networks(tiny.CONFIGS), flax_params(model, "unet", tiny.CONFIGS["unet"])
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cond():
    batch = tiny.tiny_batch(2, FRAMES, HEIGHT, WIDTH)
    ids = jnp.array([[6.0, 127.0, 0.02], [23.0, 40.0, 0.3]])
    return batch.cond.replace(added_time_ids=ids)


@pytest.fixture(scope="module")
def solve(teacher, cond):
    """`(x, levels, guidance) -> x` of the real teacher, compiled once."""
    _, networks, params = teacher

    def run(params, cond, x, levels, guidance):
        return euler_solve(
            guided_denoiser(EDMBackbone(networks.unet_with({"params": params}), cond), guidance), x, levels
        )

    program = jax.jit(run)
    call = lambda *args: program(params, cond, *args)  # noqa: E731
    call.lower = lambda *args: program.lower(params, cond, *args)
    return call


def levels_of(index, steps=STEPS):
    """t_{n+m} ... t_n of every clip, [m + 1, b]; `index` counts the grid from 0."""
    return sigma_grid(NUM_LEVELS)[np.asarray(index) + np.arange(steps, -1, -1)[:, None]]


def diffusers_solve(model, cond, clip, x, index, guidance):
    """m steps of SVD's scheduler from grid level index + m (from 0, ascending) for one clip [f h w c]."""
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
    scheduler.set_timesteps(NUM_LEVELS)
    first = NUM_LEVELS - 1 - (index + STEPS)  # The scheduler counts down.
    scheduler.set_begin_index(first)

    # As the pipeline of SVD: unconditional first, image latents over all frames, guidance per frame.
    embedding, image, ids = (torch.tensor(np.array(leaf[clip])) for leaf in jax.tree.leaves(cond))
    embeddings = torch.stack([torch.zeros_like(embedding), embedding])[:, None]
    image = image.permute(2, 0, 1).expand(FRAMES, -1, -1, -1)
    images = torch.stack([torch.zeros_like(image), image])
    latents = torch.tensor(x).permute(0, 3, 1, 2)[None].contiguous()
    weight = torch.tensor(guidance)[None, :, None, None, None]
    for t in scheduler.timesteps[first : first + STEPS]:
        scaled = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        sample = torch.cat([scaled, images], dim=2).contiguous()
        with torch.no_grad():
            unconditional, conditional = model(sample, t, embeddings, torch.stack([ids, ids])).sample.chunk(2)
        prediction = unconditional + weight * (conditional - unconditional)
        latents = scheduler.step(prediction, t, latents).prev_sample
    return latents[0].permute(0, 2, 3, 1).numpy()


GUIDANCE = {
    "linspace": np.tile(np.linspace(1, 3, FRAMES, dtype=np.float32), (2, 1)),
    "constant": np.full((2, FRAMES), 3.0, np.float32),
    "per clip": np.repeat(np.array([[1.3], [2.9]], np.float32), FRAMES, axis=1),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers' scheduler
@pytest.mark.parametrize(
    ("index", "guidance"),
    [
        ((94, 94), "linspace"),
        ((47, 48), "linspace"),
        ((0, 0), "linspace"),
        ((94, 0), "linspace"),
        ((60, 30), "constant"),
        ((20, 80), "per clip"),
    ],
)
def test_solver_is_diffusers_scheduler_driving_the_torch_unet(teacher, cond, solve, rng, index, guidance):
    levels = levels_of(index)
    clean, noise = rng.standard_normal((2, 2, FRAMES, HEIGHT, WIDTH, 4), np.float32)
    x = clean + levels[0][:, None, None, None, None] * noise
    actual = np.asarray(solve(x, levels, GUIDANCE[guidance]))
    expected = np.stack([diffusers_solve(teacher[0], cond, i, x[i], index[i], GUIDANCE[guidance][i]) for i in range(2)])
    for clip, (high, low) in enumerate(levels[[0, -1]].T):
        # Of x, of its change, which the input would hide at low noise, and of what the denoiser contributed to it,
        # which the noise would hide at high levels (there float32 leaves three digits).
        starts = (0, x[clip], x[clip] * (low / high))
        errors = [relative_error(actual[clip] - start, expected[clip] - start) for start in starts]
        print(f"sigma {high:.4g} to {low:.4g}: " + ", ".join(f"{error:.1e}" for error in errors))
        assert max(errors[:2]) <= 1e-4 and errors[2] <= 1e-3


def test_last_interval_ends_at_sigma_min():
    assert levels_of((0,))[-1, 0] == np.float32(0.002)


def test_program_holds_the_network_once_however_many_steps(solve):
    x = np.zeros((2, FRAMES, HEIGHT, WIDTH, 4), np.float32)
    counts = []
    for steps in (1, 5):
        text = solve.lower(x, levels_of((3, 5), steps), GUIDANCE["linspace"]).as_text()
        counts.append([text.count(f"stablehlo.{operation}") for operation in ("convolution", "dot_general")])
    assert counts[0] == counts[1] and min(counts[0]) > 10, counts


@pytest.mark.parametrize("shape", ["f", "1 f", "b f"])
def test_guidance_is_given_for_frames_or_for_clips_and_frames(cond, rng, shape):
    def network(sample, c_noise, embedding, ids):
        return jnp.tanh(sample[..., :4] * embedding.mean(axis=-1)[:, None, None, None, None] + sample[..., 4:])

    weight = np.linspace(1, 3, FRAMES, dtype=np.float32)
    given = {"f": weight, "1 f": weight[None], "b f": np.stack([weight, weight])}[shape]
    x = jnp.asarray(rng.standard_normal((2, FRAMES, HEIGHT, WIDTH, 4), np.float32))
    sigma = jnp.array([0.5, 30.0])
    both = [guided_denoiser(EDMBackbone(network, cond), np.full(FRAMES, w, np.float32))(x, sigma) for w in (0.0, 1.0)]
    expected = both[0] + weight[:, None, None, None] * (both[1] - both[0])
    assert relative_error(both[0], both[1]) > 1e-2
    assert relative_error(guided_denoiser(EDMBackbone(network, cond), given)(x, sigma), expected) <= 1e-6


# Data distributed as N(mean, spread^2) in every element: denoiser and ODE are linear, with closed forms.
MEAN, SPREAD = 0.3, 0.5


def gaussian_denoiser(x, sigma):
    """E[x_0 | x]."""
    variance = sigma[:, None, None, None, None] ** 2
    return (SPREAD**2 * x + variance * MEAN) / (SPREAD**2 + variance)


def gaussian_solution(x, high, low):
    """Where the ODE leads from x at noise level `high`."""
    factor = jnp.sqrt((SPREAD**2 + low**2) / (SPREAD**2 + high**2))
    return MEAN + (x - MEAN) * jnp.reshape(factor, (-1, 1, 1, 1, 1))


def true_consistency_function(x, sigma):
    return gaussian_solution(x, sigma, jnp.full_like(sigma, 0.002))


def consistency_loss(solver, x, high, low):
    """The second term of OSV Eq. 10, with the true consistency function for student and target."""
    target = true_consistency_function(solver(x), low)
    return distance_weight(high, low, 0.1) * pseudo_huber(target, true_consistency_function(x, high))


@pytest.fixture
def intervals(rng):
    """Twelve clips, each with its own interval t_n .. t_{n+5}: x at the upper end, and the ends (float32)."""
    index = np.linspace(0, NUM_LEVELS - 1 - STEPS, 12).astype(int)
    high, low = levels_of(index)[[0, -1]]
    data = MEAN + SPREAD * rng.standard_normal((12, 2, 3, 4, 4), np.float32)
    return data + high[:, None, None, None, None] * rng.standard_normal(data.shape, np.float32), high, low


def test_true_consistency_function_has_no_loss_when_the_teacher_solves_exactly(intervals):
    x, high, low = intervals
    exact = gaussian_solution(x, high, low)
    assert relative_error(true_consistency_function(exact, low), true_consistency_function(x, high)) <= 1e-6
    loss = consistency_loss(lambda x: exact, x, high, low)
    # Differences are rounding errors of about 1e-7, and the loss about their square over 2 c.
    assert np.all(np.abs(loss) < 1e-9), loss


def substeps(high, low, steps):
    """`steps` + 1 levels from high to low, even in sigma^(1/7), as the grid's own are."""
    ramp = np.linspace(high ** (1 / 7), low ** (1 / 7), steps + 1)
    return jnp.asarray(ramp**7)


def test_loss_grows_with_the_solvers_error(intervals):
    """Euler is of first order: its error over an interval halves when the steps double."""
    with jax.enable_x64(True):
        x, high, low = (jnp.asarray(value, jnp.float64) for value in intervals)
        exact = gaussian_solution(x, high, low)
        errors, losses = {}, {"exact": np.abs(consistency_loss(lambda x: exact, x, high, low))}
        for steps in (1, 5, 10, 20, 40):
            solver = lambda x, n=steps: euler_solve(gaussian_denoiser, x, substeps(high, low, n))  # noqa: E731
            errors[steps] = np.linalg.norm((solver(x) - exact).reshape(12, -1), axis=1)
            losses[steps] = np.asarray(consistency_loss(solver, x, high, low))
    for few, many in ((5, 10), (10, 20), (20, 40)):
        ratios = errors[few] / errors[many]
        print(f"{few} to {many} steps: error shrinks by {ratios.min():.3f} .. {ratios.max():.3f}")
        assert np.all((ratios > 1.9) & (ratios < 2.1))
        assert np.all(losses[few] > losses[many])
    for name, values in losses.items():
        print(f"steps {name}: loss {values.min():.1e} .. {values.max():.1e}")
    assert np.all(losses[40] > 10 * losses["exact"]) and losses["exact"].max() < 1e-15
    assert np.all(errors[1] > 3 * errors[5]) and np.all(losses[1] > 3 * losses[5])


def test_a_model_without_loss_is_as_wrong_as_the_grid_is_coarse(rng):
    """OSV theorem A.1: a model that is consistent along the SOLVER's trajectories errs by O(max(t_{n+1} - t_n)).

    Such a model leads x at t_N to where the chained solver leads it.
    """
    errors, solve = [], jax.jit(lambda x, levels: euler_solve(gaussian_denoiser, x, levels))
    with jax.enable_x64(True):
        x = jnp.asarray(MEAN + 700 * rng.standard_normal((1, 2, 3, 4, 4)))
        expected = gaussian_solution(x, jnp.array([700.0]), jnp.array([0.002]))
        for intervals in (100, 200, 400, 800):
            end = x
            levels = substeps(np.array([700.0]), np.array([0.002]), intervals)
            for start in range(0, intervals, STEPS):
                end = solve(end, levels[start : start + STEPS + 1])
            errors.append(relative_error(end, expected))
    ratios = np.divide(errors[:-1], errors[1:])
    print(f"relative errors {errors}, ratios {ratios}")
    assert np.all((ratios > 1.9) & (ratios < 2.1))
