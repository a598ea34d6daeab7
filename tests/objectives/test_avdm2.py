"""AVDM2's step against its equations written out plainly, score matching against Gaussians, and its schedule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import flat, quick_jit, relative_error
from students import differences, nonzero_leaves
from toy_text import OPTIONS, RATES, SGD, make, started, toy_text_batch, toy_text_networks

from osv_jax.diffusion.ddpm import DDPMBackbone, animatediff_schedule, few_step, stable_diffusion_schedule
from osv_jax.objectives import avdm2, losses
from osv_jax.objectives.avdm2 import AVDM2
from osv_jax.objectives.avdm2_options import AVDM2Options
from osv_jax.objectives.players import Student

GRADIENT = 1e-4
KEY = jax.random.key(3)
TIMES = (999, 749, 499, 249)
draw = quick_jit(avdm2.draw, static_argnums=2)


@pytest.fixture(scope="module")
def toy():
    networks, frozen = toy_text_networks()
    return networks, frozen, toy_text_batch()


def equation_1(kind, t):
    """alpha_t and sigma_t of all clips, from the betas."""
    if kind == "video":
        betas = [0.00085 + (0.012 - 0.00085) * i / 999 for i in range(1000)]
    else:
        betas = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2 for i in range(1000)]
    kept = np.array([np.prod(1 - np.array(betas[: int(one) + 1])) for one in np.asarray(t)])
    column = lambda x: np.asarray(x, np.float32)[:, None, None, None, None]  # noqa: E731
    return column(kept**0.5), column((1 - kept) ** 0.5)


@pytest.mark.integration
@pytest.mark.parametrize("sdm", ["frames", "video"])
def test_step_is_equations_1_to_9_and_algorithm_1(toy, sdm):
    networks, frozen, batch = toy
    objective = make(networks, sdm=sdm)
    state = started(objective, frozen)
    new, metrics = jax.jit(objective.step)(state, frozen, batch, KEY)
    draws = jax.tree.map(np.asarray, draw(KEY, batch, objective.options))
    before = {name: player.params for name, player in state.players.items()}
    text, empty, clips = batch.cond.context, batch.cond.negative, len(batch.latents)
    teacher = {**frozen["unet_2d"], **frozen["motion_adapter"]}
    of_score = networks.unet if sdm == "video" else networks.unet_2d
    real_params = teacher if sdm == "video" else frozen["unet_2d"]

    def noise_of(module, params, x, t, context, **options):
        return module.apply({"params": params}, x, jnp.asarray(t, jnp.float32), context, **options)

    def noised(kind, x, name):
        alpha, sigma = equation_1(kind, draws[f"{name}_t"])
        return alpha * x + sigma * draws[f"{name}_noise"]

    def clean(kind, module, params, x, t, context):
        alpha, sigma = equation_1(kind, t)
        return (x - sigma * noise_of(module, params, x, t, context)) / alpha

    def discriminator(params, x, t):
        features = noise_of(networks.unet, teacher, x, t, text, features=True)
        return objective.head.apply({"params": params}, features)

    def chosen(x, name):
        return jnp.stack([x[i][draws[f"{name}_frames"][i]] for i in range(clips)])

    def plainly(before):
        def generated(student):
            x = draws["noise"]
            for i in range(int(draws["stop"])):
                t = [TIMES[i]] * clips
                x0 = jax.lax.stop_gradient(clean("video", networks.unet, student, x, t, text))
                alpha, sigma = equation_1("video", [TIMES[i + 1]] * clips)
                x = alpha * x0 + sigma * draws["fresh"][:, i]
            return clean("video", networks.unet, student, x, [TIMES[int(draws["stop"])]] * clips, text)

        def student_loss(student):
            fake = generated(student)
            # Eq. 7, to be minimised.
            d = jax.nn.sigmoid(discriminator(before["disc"], noised("video", fake, "adm"), draws["adm_t"]))
            adversarial = -jnp.mean(jnp.log(d))
            # Eq. 8: the real score is guided, the fake one is not.
            frames, kind, t = chosen(fake, "sdm"), "video" if sdm == "video" else "image", draws["sdm_t"]
            noisy = noised(kind, frames, "sdm")
            conditional, unconditional = (clean(kind, of_score, real_params, noisy, t, text) for text in (text, empty))
            real = unconditional + 7.5 * (conditional - unconditional)
            fake_score = clean(kind, of_score, before["fake_score"], noisy, t, text)
            size = jnp.mean(jnp.abs(frames - real), axis=(1, 2, 3, 4), keepdims=True)
            gradient = jax.lax.stop_gradient(((frames - real) - (frames - fake_score)) / size)
            matching = 0.5 * jnp.mean((frames - jax.lax.stop_gradient(frames - gradient)) ** 2)
            # Eq. 9.
            return 2.0 * matching + 0.5 * adversarial, (matching, adversarial, fake)

        (_, terms), g_student = jax.value_and_grad(student_loss, has_aux=True)(before["student"].tuned)
        fake = jax.lax.stop_gradient(terms[2])

        def disc_loss(params):
            # Eq. 6, to be minimised.
            real, made = (
                jax.nn.sigmoid(discriminator(params, noised("video", x, "disc"), draws["disc_t"]))
                for x in (batch.latents, fake)
            )
            return -jnp.mean(jnp.log(real)) - jnp.mean(jnp.log(1 - made))

        def fake_score_loss(params):
            # Eq. 2.
            kind = "video" if sdm == "video" else "image"
            noisy = noised(kind, chosen(fake, "fake"), "fake")
            return jnp.mean((noise_of(of_score, params, noisy, draws["fake_t"], text) - draws["fake_noise"]) ** 2)

        values = {"student": (None, Student(lora={}, tuned=g_student))}
        for name, loss in (("disc", disc_loss), ("fake_score", fake_score_loss)):
            values[name] = jax.value_and_grad(loss)(before[name])
        return terms[:2], values

    (matching, adversarial), values = quick_jit(plainly)(before)
    expected = {"loss_sdm": matching, "loss_adversarial": adversarial, "loss_student": 2 * matching + adversarial / 2}
    expected |= {f"loss_{name}": values[name][0] for name in ("disc", "fake_score")}
    expected |= {f"grad_norm/{name}": np.linalg.norm(flat(values[name][1])) for name in values}
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=GRADIENT), name
    for name, (_, gradient) in values.items():
        assert len(nonzero_leaves(gradient)) == len(jax.tree.leaves(before[name])), name
        after = jax.tree.map(lambda p, g, rate=RATES[name]: p - rate * g, before[name], gradient)
        error, change = differences(new.players[name].params, after, before[name])
        assert error < 2e-5 and change < GRADIENT, name


def test_equation_2_is_the_mean_squared_error_of_the_noise(toy):
    """Of a network that predicts zeros the loss is the mean square of the noise."""
    networks, frozen, batch = toy
    objective = make(networks)
    draws = draw(KEY, batch, objective.options)
    zeros = jax.tree.map(jnp.zeros_like, frozen["unet_2d"])
    loss, _ = avdm2.fake_score_loss(zeros, objective, batch, draws, batch.latents)
    assert float(loss) == pytest.approx(float(np.mean(np.square(draws["fake_noise"]))), rel=1e-5)


class GaussianScores(AVDM2):
    """Scores of Gaussians: the parameters are a mean, to which the text is added, and a variance."""

    def score(self, params, cond):
        schedule = stable_diffusion_schedule()

        def network(x, t, context):
            alpha, sigma = (jnp.asarray(values)[t.astype(int)][:, None, None, None, None] for values in schedule)
            mean = params["mean"] + context.mean(axis=(1, 2))[:, None, None, None, None]
            return sigma * (x - alpha * mean) / (alpha**2 * params["variance"] + sigma**2)

        return DDPMBackbone(network, cond, schedule)

    def real_score(self, frozen):
        return frozen["gaussian"]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_equations_4_and_8_are_the_gradient_of_the_kl_divergence_between_gaussians(toy, guidance):
    """d/dx of log p_fake,t - log p_real,t at alpha x + sigma eps is alpha times the difference of the scores, and DMD's
    weight is sigma^2 / alpha^2 over the mean of |x - E[x_0 | x_t]|."""
    networks, _, batch = toy
    objective = GaussianScores(networks, AVDM2Options(**OPTIONS, sdm_guidance=guidance), SGD)
    real, fake = {"mean": 0.4, "variance": 0.6}, {"mean": -0.3, "variance": 1.3}
    draws = draw(KEY, batch, objective.options)
    frames = avdm2.take_frames(batch.latents, draws["sdm_frames"])
    gradient = avdm2.matching_gradient(objective, fake, {"gaussian": real}, batch.cond, draws, frames)
    alpha, sigma = equation_1("image", draws["sdm_t"])
    texts = batch.cond.context, batch.cond.negative
    means = [np.asarray(text).mean(axis=(1, 2))[:, None, None, None, None] for text in texts]

    def log_density(x, mean, variance):
        return -0.5 * (alpha * x + sigma * draws["sdm_noise"] - alpha * mean) ** 2 / (alpha**2 * variance + sigma**2)

    def score(given, text):
        total = lambda x: jnp.sum(log_density(x, given["mean"] + text, given["variance"]))  # noqa: E731
        return np.asarray(jax.grad(total)(frames)) / alpha

    conditional, unconditional = (score(real, mean) for mean in means)
    guided = unconditional + guidance * (conditional - unconditional)
    difference = alpha * (score(fake, means[0]) - guided)
    # Tweedie's formula.
    denoised = (alpha * np.asarray(frames) + sigma * draws["sdm_noise"] + sigma**2 * guided) / alpha
    size = np.abs(frames - denoised).mean(axis=(1, 2, 3, 4), keepdims=True)
    assert relative_error(gradient, sigma**2 / alpha**2 * difference / size) < GRADIENT


def test_scores_that_agree_give_no_gradient_and_others_lead_to_the_real_one():
    x = jnp.ones((1, 1, 1, 1, 2)) * jnp.array([1.0, 3.0])
    same = losses.distribution_matching_gradient(x, x - 1, x - 1)
    assert np.abs(same).max() == 0
    # The student's clips are smaller than real ones: descent makes them larger.
    assert np.all(losses.distribution_matching_gradient(x, x + 2, x + 1) == -0.5)
    loss = lambda x: losses.with_gradient(x, jnp.full_like(x, 3.0)).sum()  # noqa: E731
    assert float(loss(x)) == 4.5 and np.all(jax.grad(loss)(x) == 1.5)


def test_equations_5_to_7_are_logarithms_of_probabilities():
    rng = np.random.default_rng(0)
    real, fake = (rng.standard_normal((2, 5)).astype(np.float32) for _ in range(2))
    d_real, d_fake = (1 / (1 + np.exp(-logits)) for logits in (real, fake))
    value = losses.softplus_discriminator({"video": jnp.asarray(real)}, {"video": jnp.asarray(fake)})
    np.testing.assert_allclose(value, -np.log(d_real).mean(1) - np.log(1 - d_fake).mean(1), rtol=1e-5)
    np.testing.assert_allclose(
        losses.softplus_generator({"video": jnp.asarray(fake)}), -np.log(d_fake).mean(1), rtol=1e-5
    )
    # Where D = sigmoid(-200) is 0 in float32 the gradient is still there.
    surely = lambda x: losses.softplus_generator({"video": x}).sum()  # noqa: E731
    assert float(jax.grad(surely)(jnp.full((1, 1), -200.0))[0, 0]) == -1


def test_equation_9_weighs_both_terms(toy):
    networks, frozen, batch = toy
    objective = make(networks, sdm_weight=3.0, adm_weight=0.25)
    state, draws = started(objective, frozen), draw(KEY, batch, objective.options)
    loss, terms = jax.jit(functools.partial(avdm2.student_loss, objective))(
        state.players, frozen, batch, draws, batch.latents
    )
    expected = 3 * float(terms["loss_sdm"]) + 0.25 * float(terms["loss_adversarial"])
    assert float(loss) == pytest.approx(expected, rel=1e-6) and float(terms["loss_sdm"]) > 0


@pytest.mark.parametrize("stop", range(4))
def test_backward_simulation_is_sampling(toy, stop):
    networks, frozen, batch = toy
    objective = make(networks)
    student = started(objective, frozen).players["student"].params
    draws = draw(KEY, batch, objective.options) | {"stop": jnp.asarray(stop)}
    made = jax.jit(lambda draws: avdm2.student_forward(objective, student, frozen, batch, draws)[0])(draws)
    keys = avdm2.clip_keys(jax.random.split(KEY, 7)[2], len(batch.latents))
    denoiser = quick_jit(lambda x, t: objective.backbone(frozen, student, batch.cond)(x, t))
    assert tuple(objective.times) == TIMES
    sampled = few_step(denoiser, draws["noise"], objective.times[: stop + 1], animatediff_schedule(), keys)
    assert relative_error(made, sampled) < 1e-5
    if stop == 3:
        # Which is what pictures are sampled by.
        assert objective.preview(denoiser, draws["noise"]).shape == made.shape


@pytest.mark.integration
def test_one_stop_for_all_clips_and_the_rest_for_each_clip():
    batch, options = toy_text_batch(batch=400, frames=5, height=1, width=1), AVDM2Options(sdm_frames=2)
    drawn = jax.jit(lambda key: avdm2.draw(key, batch, options))
    draws = jax.tree.map(np.asarray, drawn(KEY))
    assert draws["stop"].shape == () and all(len(x) == 400 for name, x in draws.items() if name != "stop")
    stops = [int(jax.random.randint(jax.random.split(jax.random.key(i), 7)[0], (), 0, 4)) for i in range(200)]
    assert set(stops) == {0, 1, 2, 3} and int(drawn(jax.random.key(0))["stop"]) == stops[0]
    for name, low, high in (("adm", 0, 500), ("disc", 0, 500), ("sdm", 200, 980), ("fake", 200, 980)):
        t = draws[f"{name}_t"]
        assert low <= t.min() < low + 15 and high - 15 < t.max() <= high
    for name in ("sdm", "fake"):
        frames = draws[f"{name}_frames"]
        assert np.all(frames[:, 0] < frames[:, 1]) and len({tuple(row) for row in frames.tolist()}) == 10
    noises = [
        draws[name].ravel()[:5] for name in ("noise", "fresh", "adm_noise", "disc_noise", "sdm_noise", "fake_noise")
    ]
    assert len({tuple(noise.tolist()) for noise in noises}) == 6
