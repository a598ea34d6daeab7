"""SF-V's step against its equations written out plainly, its penalty against PyTorch, its optimizer by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_stage2 as plain
import pytest
import scipy.special
import tiny
import torch
from conftest import flat, quick_jit, relative_error
from students import (
    RATES,
    SGD,
    assert_about_the_same_step,
    differences,
    disc_of,
    ema_of,
    nonzero_leaves,
    perturbed,
    student_of,
    toy_networks_and_frozen,
    with_student,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_reference import flax_params, torch_unet

from osv_jax.diffusion.edm import discretised_lognormal, scalings, sigma_grid
from osv_jax.errors import UserError
from osv_jax.models.unet_heads import KINDS, UNetHeads
from osv_jax.objectives import losses
from osv_jax.objectives.judges import UNetJudge
from osv_jax.objectives.sf_v import SFV, R1Options, SFVOptions, SM3Options, sm3
from osv_jax.training import setup

KEY = jax.random.key(3)
# Relative error of gradients.
GRADIENT = 1e-4
FRAMES = 8
# Large enough to count beside the hinge.
PENALTY = R1Options(weight=0.01)


@pytest.fixture(scope="module")
def toy():
    networks, frozen = toy_networks_and_frozen()
    objective = SFV(networks, SFVOptions(), SGD)
    state = quick_jit(setup.make_init(objective))(jax.random.key(0), frozen)
    student = state.players["student"]
    state = with_student(state, perturbed(student.params, 1), perturbed(student.ema, 2))
    # Of norms over three frames the second derivatives would be rounding errors.
    return networks, frozen, tiny.tiny_batch(frames=FRAMES), state


@functools.cache
def program(networks, **options):
    return jax.jit(SFV(networks, SFVOptions(**options), SGD).step)


def equation_7(levels, log_mean, log_std):
    edges = scipy.special.erf((np.log(levels.astype(np.float64)) - log_mean) / (np.sqrt(2) * log_std))
    mass = edges - np.concatenate([[-1.0], edges[:-1]])
    return mass / mass.sum()


@pytest.mark.parametrize(("log_mean", "log_std"), [(-1.0, 1.0), (-2.0, 1.0), (0.0, 1.0), (1.0, 1.0)])
def test_equation_7_is_the_difference_of_two_error_functions(log_mean, log_std):
    levels = sigma_grid(1000)[1:]
    probabilities = discretised_lognormal(levels, log_mean, log_std)
    expected = equation_7(levels, log_mean, log_std)
    assert probabilities.shape == (999,) and probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert np.abs(probabilities - expected).max() < 1e-6 * expected.max()
    # Most of the mass lies about e^P_mean.
    inside = (levels > np.exp(log_mean - log_std)) & (levels < np.exp(log_mean + log_std))
    assert probabilities[inside].sum() == pytest.approx(0.683, abs=0.02)


@pytest.mark.integration
def test_the_discriminator_s_noise_is_drawn_from_equation_7(toy):
    networks = toy[0]
    judge = SFV(networks, SFVOptions(), SGD).judge
    _, draws = judge.draw(jax.random.key(0), (20_000, 1, 1, 1, 1))
    frequency = np.bincount(np.asarray(draws["judge_index"]), minlength=999) / 20_000
    expected = equation_7(judge.levels, -1.0, 1.0)
    # Of 20,000 draws the distribution function is off by 1.63 / sqrt(20,000) in one of a hundred seeds.
    assert np.abs(np.cumsum(frequency) - np.cumsum(expected)).max() < 0.0115


def test_equation_5_the_student_sees_all_levels_but_the_lowest(toy):
    objective = SFV(toy[0], SFVOptions(), SGD)
    draws = quick_jit(objective.draw)(jax.random.key(0), tiny.tiny_batch(64))
    assert set(np.asarray(draws["index"]).tolist()) == {1, 2, 3}
    example = objective.example(toy[3], toy[1], tiny.tiny_batch(64), draws)
    grid = [(0.002 ** (1 / 7) + t / 3 * (700 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for t in (1, 2, 3)]
    np.testing.assert_allclose(example.sigma, np.asarray(grid)[np.asarray(draws["index"]) - 1], rtol=1e-5)


def judged(networks, disc, frozen, clips, cond, draws, update_stats):
    """D of clips, noised with sigma' (Eq. 7), and the statistics; nothing here is from `judges`."""
    level = jnp.asarray(sigma_grid(1000)[1:])[draws["judge_index"]]
    s = level[:, None, None, None, None]
    sample = jnp.concatenate(
        [
            (clips + s * draws["judge_noise"]) / jnp.sqrt(s**2 + 1),
            jnp.repeat(cond.image_latents[:, None], clips.shape[1], axis=1),
        ],
        -1,
    )
    c_noise = jnp.log(level) / 4
    features = networks.unet.apply(
        {"params": frozen["unet"]}, sample, c_noise, cond.image_embedding, cond.added_time_ids, features="encoder"
    )
    heads, arguments = UNetHeads(), (features, cond.image_embedding, c_noise)
    if not update_stats:
        return jnp.concatenate(jax.tree.leaves(heads.apply(disc, *arguments, False)), axis=1), disc["spectral"]
    logits, updated = heads.apply(disc, *arguments, True, mutable=["spectral"])
    return jnp.concatenate(jax.tree.leaves(logits), axis=1), updated["spectral"]


def test_step_is_equations_6_to_11(toy):
    networks, frozen, batch, state = toy
    new, metrics = program(networks, r1=PENALTY)(state, frozen, batch, KEY)
    objective = SFV(networks, SFVOptions(), SGD)
    draws = quick_jit(objective.draw)(KEY, batch)
    sigma = sigma_grid(4)[np.asarray(draws["index"])]
    x = batch.latents + plain.column(sigma) * draws["noise"]
    denoiser, cond = plain.denoiser(networks), batch.cond

    @quick_jit
    def plainly(state, frozen):
        def prediction(student):
            return denoiser(plain.variables(frozen["unet"], student), x, sigma, cond)

        fake = prediction(student_of(state))

        def disc_loss(params):
            disc = {"params": params, "spectral": disc_of(state)["spectral"]}
            real, spectral = judged(networks, disc, frozen, batch.latents, cond, draws, True)
            generated, _ = judged(networks, disc, frozen, fake, cond, draws, True)
            # As the hinge sees it, with the singular vectors of this step.
            now = {"params": params, "spectral": spectral}
            total = lambda clips: judged(networks, now, frozen, clips, cond, draws, False)[0].sum()  # noqa: E731
            r1 = jnp.mean(jnp.sum(jax.grad(total)(batch.latents) ** 2, axis=(1, 2, 3, 4)))
            hinge = jnp.mean(jnp.maximum(0, 1 - real)) + jnp.mean(jnp.maximum(0, 1 + generated))
            return hinge + 0.01 * r1, (spectral, r1)

        (value, (spectral, r1)), g_disc = jax.value_and_grad(disc_loss, has_aux=True)(disc_of(state)["params"])
        params = jax.tree.map(lambda p, g: p - RATES["disc"] * g, disc_of(state)["params"], g_disc)
        disc = {"params": params, "spectral": spectral}

        def student_loss(student):
            output = prediction(student)
            adversarial = -jnp.mean(judged(networks, disc, frozen, output, cond, draws, False)[0])
            huber = 0.1 * jnp.mean(jnp.sqrt((output - batch.latents) ** 2 + 1e-6) - 1e-3)
            return adversarial + huber, (adversarial, huber)

        (_, terms), g_student = jax.value_and_grad(student_loss, has_aux=True)(student_of(state))
        student = jax.tree.map(lambda p, g: p - RATES["student"] * g, student_of(state), g_student)
        ema = jax.tree.map(lambda old, new: 0.95 * old + 0.05 * new, ema_of(state), student)
        return value, r1, terms, g_disc, g_student, disc, student, ema

    value, r1, (adversarial, huber), g_disc, g_student, disc, student, ema = plainly(state, frozen)
    assert len(nonzero_leaves(g_student)) == len(jax.tree.leaves(student_of(state)))
    # What is near zero is measured by the hinge's 1.
    assert float(metrics["loss_disc"]) == pytest.approx(float(value), rel=GRADIENT)
    # The square of a gradient.
    assert float(metrics["r1"]) == pytest.approx(float(r1), rel=2 * GRADIENT) and 0.01 * float(r1) > 1e-3
    assert float(metrics["loss_adversarial"]) == pytest.approx(float(adversarial), abs=GRADIENT)
    assert float(metrics["loss_huber"]) == pytest.approx(float(huber), rel=3e-5)
    assert float(metrics["grad_norm/disc"]) == pytest.approx(np.linalg.norm(flat(g_disc)), rel=GRADIENT)
    assert float(metrics["grad_norm/student"]) == pytest.approx(np.linalg.norm(flat(g_student)), rel=GRADIENT)
    for actual, expected, before in (
        (disc_of(new)["params"], disc["params"], disc_of(state)["params"]),
        (student_of(new), student, student_of(state)),
        (ema_of(new), ema, ema_of(state)),
    ):
        error, change = differences(actual, expected, before)
        assert error < 1e-5 and change < GRADIENT
    assert differences(disc_of(new)["spectral"], disc["spectral"])[0] < 1e-5


@pytest.mark.integration
def test_half_precision_step_is_that_of_float32_about(toy):
    networks, frozen = toy_networks_and_frozen(jnp.bfloat16)
    half = program(networks, r1=PENALTY)(toy[3], frozen, toy[2], KEY)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), frozen)
    assert_about_the_same_step(toy[3], half, program(toy[0], r1=PENALTY)(toy[3], wide, toy[2], KEY))


def test_a_penalty_every_so_many_steps_counts_as_many_times(toy):
    networks, frozen, batch, state = toy
    disc = state.players["disc"]

    def penalty(step, **options):
        objective = SFV(networks, SFVOptions(r1=R1Options(0.01, kind="difference", **options)), SGD)
        draws = quick_jit(objective.draw)(KEY, batch)
        example = objective.example(state, frozen, batch, draws)
        return jax.jit(objective.penalty)(disc, frozen, example, draws, None, step)

    value, metrics = penalty(4)
    assert value == pytest.approx(0.01 * float(metrics["r1"]), rel=1e-5) and value > 1e-3
    once, metrics = penalty(3, every=3)
    assert once == pytest.approx(3 * float(value), rel=1e-4) and np.isfinite(metrics["r1"])
    skipped, metrics = penalty(4, every=3)
    assert skipped == 0 and np.isnan(metrics["r1"])


def test_r1_by_difference_estimates_r1():
    """For a linear D the estimate is (g . noise)^2, whose mean over normal noise is ||g||^2."""
    g = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    logits_of = lambda x: {"spatial": x * g[0], "temporal": x * g[1] + x * g[2]}  # noqa: E731
    x, noise = np.ones((4000, 5), np.float32), np.random.default_rng(1).standard_normal((4000, 5)).astype(np.float32)
    exact = losses.r1(logits_of, jnp.asarray(x))
    np.testing.assert_allclose(exact, (g.sum(0) ** 2).sum(), rtol=1e-5)
    estimates = losses.r1_by_difference(logits_of, jnp.asarray(x), jnp.asarray(noise), 0.01)
    np.testing.assert_allclose(estimates, (noise @ g.sum(0)) ** 2, rtol=1e-2, atol=1e-2)
    # Its standard deviation over noise is sqrt(2) ||g||^2.
    assert float(estimates.mean()) == pytest.approx(float(exact[0]), rel=4 * 2**0.5 / 4000**0.5)


class ApartJudge(UNetJudge):
    """The backbone's parameters, which are the student's base too, as something of their own."""

    def see(self, frozen, *others):
        return super().see({"unet": frozen["teacher"]}, *others)


class ApartSFV(SFV):
    def make_judge(self):
        judge = super().make_judge()
        return ApartJudge(**{field.name: getattr(judge, field.name) for field in dataclasses.fields(judge)})


def test_no_gradient_reaches_the_frozen_backbone(toy):
    networks, frozen, batch, state = toy
    objective = ApartSFV(networks, SFVOptions(r1=PENALTY), SGD)

    def loss(teacher):
        _, metrics = objective.step(state, frozen | {"teacher": teacher}, batch, KEY)
        return metrics["loss_student"] + metrics["loss_disc"]

    assert nonzero_leaves(quick_jit(jax.grad(loss))(frozen["unet"])) == []


def torch_heads(params, spectral, features, image_embedding, c_noise):
    """`UNetHeads` again, in PyTorch, on features [b f c h w]."""
    tensor = lambda x: torch.tensor(np.asarray(x))  # noqa: E731

    def sinusoids(values, dim=64):
        angles = values[:, None] * torch.exp(-np.log(10_000.0) * torch.arange(dim // 2) / (dim // 2))
        return torch.cat([angles.cos(), angles.sin()], -1)

    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def condition(name, x):
        p = jax.tree.map(tensor, params[name])
        return dense(p["linear_2"], torch.nn.functional.silu(dense(p["linear_1"], x)))

    def head(name, x):
        p, u = params[name], spectral[name]

        def conv(layer, x):
            kernel = p[layer]["kernel"]
            kernel = tensor(kernel) if not torch.is_tensor(kernel) else kernel
            matrix = kernel.flatten(0, -2)
            vector = tensor(u[layer]["u"])
            v = (matrix @ vector).detach()
            v = v / v.norm()
            kernel = kernel / (v @ (matrix @ vector))
            kernel = kernel.permute(-1, -2, *range(kernel.ndim - 2))
            function = torch.nn.functional.conv2d if x.ndim == 4 else torch.nn.functional.conv1d
            return function(x, kernel, tensor(p[layer]["bias"]), padding="same")

        def block(x, prefix):
            norm = jax.tree.map(tensor, p[f"{prefix}_norm"])
            x = torch.nn.functional.group_norm(conv(f"{prefix}_conv", x), 32, norm["scale"], norm["bias"], 1e-5)
            return torch.nn.functional.leaky_relu(x, 0.2)

        x = block(x, "in")
        return conv("out_conv", (x + block(x, "residual")) / 2**0.5)

    total, (batch, frames) = 0, features[0].shape[:2]
    of_clip = torch.cat([image_embedding, sinusoids(c_noise)], -1)
    index = sinusoids(torch.arange(frames, dtype=torch.float32)).expand(batch, -1, -1)
    of_frame = condition("spatial_condition", torch.cat([of_clip[:, None].expand(-1, frames, -1), index], -1))
    of_clip = condition("temporal_condition", of_clip)
    for level, x in enumerate(features):
        spatial = head(f"spatial_{level}", x.flatten(0, 1)).unflatten(0, (batch, frames))
        total = total + torch.einsum("bfkhw,bfk->b", spatial, of_frame) / spatial.shape[2] ** 0.5
        tracks = x.permute(0, 3, 4, 2, 1)
        temporal = head(f"temporal_{level}", tracks.flatten(0, 2)).unflatten(0, tracks.shape[:3])
        total = total + torch.einsum("bhwkf,bk->b", temporal, of_clip) / temporal.shape[3] ** 0.5
    return total


@pytest.mark.integration  # The real encoder, twice differentiated here and in PyTorch.
def test_r1_is_pytorch_s_double_backward_through_the_real_encoder(rng):
    """Its value, and its gradient with respect to a head's kernels."""
    reference = torch_unet(tiny.CONFIGS["unet"])
    unet = tiny.tiny_networks().unet
    heads = UNetHeads()
    batch = tiny.tiny_batch(frames=FRAMES)
    judge = UNetJudge(heads, unet, "encoder", -1.0, 1.0)
    params, stats = quick_jit(judge.init)(jax.random.key(0))
    frozen = {"unet": flax_params(reference, "unet", tiny.CONFIGS["unet"])}
    _, draws = judge.draw(KEY, batch.latents.shape)

    @jax.jit
    def ours(params, stats, frozen, x):
        logits_of = lambda x: judge.score(params, stats, frozen, judge.see(frozen, x, batch.cond, draws))[0]  # noqa: E731
        return losses.r1(logits_of, x).sum()

    value, gradient = jax.jit(jax.value_and_grad(ours))(params, stats, frozen, batch.latents)

    name = "spatial_1"
    leaves = {
        layer: torch.tensor(np.asarray(params[name][layer]["kernel"]), requires_grad=True)
        for layer in ("in_conv", "out_conv")
    }
    replaced = {**params, name: {**params[name], **{k: {**params[name][k], "kernel": v} for k, v in leaves.items()}}}
    level = sigma_grid(1000)[1:][np.asarray(draws["judge_index"])]
    c = scalings(jnp.asarray(level))
    x = torch.tensor(np.asarray(batch.latents).transpose(0, 1, 4, 2, 3), requires_grad=True)
    column = lambda values: torch.tensor(np.asarray(values))[:, None, None, None, None]  # noqa: E731
    noise = torch.tensor(np.asarray(draws["judge_noise"]).transpose(0, 1, 4, 2, 3))
    image = torch.tensor(np.asarray(batch.cond.image_latents).transpose(0, 3, 1, 2))[:, None].expand(
        -1, FRAMES, -1, -1, -1
    )
    sample = torch.cat([column(c.c_in) * (x + column(level) * noise), image], dim=2)
    features = []
    hooks = [block.register_forward_hook(lambda _, __, out: features.append(out[0])) for block in reference.down_blocks]
    embedding = torch.tensor(np.asarray(batch.cond.image_embedding))
    time = torch.tensor(np.asarray(c.c_noise))
    # The other kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        reference(sample, time, embedding[:, None], torch.tensor(np.asarray(batch.cond.added_time_ids)))
    for hook in hooks:
        hook.remove()
    features = [block.unflatten(0, (2, FRAMES)) for block in features]
    total = torch_heads(replaced, stats, features, embedding, time).sum()
    (slope,) = torch.autograd.grad(total, x, create_graph=True)
    r1 = (slope**2).sum()
    r1.backward()
    assert float(value) == pytest.approx(r1.item(), rel=2 * GRADIENT)
    for layer, leaf in leaves.items():
        assert relative_error(gradient[name][layer]["kernel"], leaf.grad.numpy()) < GRADIENT


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_sm3_by_its_rule(scale):
    """nu = min over axes of the covers, decayed; the cover of an axis is the largest nu along it (Anil et al. 2019)."""
    rng, b2 = np.random.default_rng(0), 0.999
    options = SM3Options(momentum=0.5, b2=b2)
    optimizer, params = sm3(options, 0.1), {"kernel": jnp.ones((3, 4))}
    state = optimizer.init(params)
    rows, columns, momentum, expected = np.zeros(3), np.zeros(4), np.zeros((3, 4)), np.ones((3, 4))
    for _ in range(3):
        gradient = (scale * rng.standard_normal((3, 4))).astype(np.float32)
        updates, state = optimizer.update({"kernel": jnp.asarray(gradient)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        nu = b2 * np.minimum(rows[:, None], columns[None]) + (1 - b2) * gradient.astype(np.float64) ** 2
        rows, columns = nu.max(1), nu.max(0)
        momentum = 0.5 * momentum + 0.5 * gradient / np.sqrt(nu)
        expected = expected - 0.1 * momentum
    np.testing.assert_allclose(params["kernel"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [(), ("spatial", "spatial")])
def test_heads_that_are_none_or_twice_are_refused(heads):
    with pytest.raises(UserError, match=r"config\.discriminator_heads="):
        SFV.check(SFVOptions(discriminator_heads=heads), 14)


def test_heads_and_features_of_the_ablations(toy):
    """SF-V Table 2 (heads of one kind) and LADD's backbone: the parameters that there are."""
    networks, _, _, _ = toy
    names = lambda **options: set(  # noqa: E731
        jax.eval_shape(SFV(networks, SFVOptions(**options), SGD).judge.init, jax.random.key(0))[0]
    )
    assert names() == {"spatial_0", "temporal_0", "spatial_condition", "temporal_condition"}
    assert names(discriminator_heads=("temporal",)) == {"temporal_0", "temporal_condition"}
    assert {"spatial_2", "temporal_2"} < names(discriminator_features="unet")


def test_an_encoder_of_svds_four_blocks_has_eight_heads():
    levels = 4
    config = dataclasses.replace(
        tiny.CONFIGS["unet"],
        block_out_channels=(32,) * levels,
        num_attention_heads=(1,) * levels,
        has_attention=(True, True, True, False),
    )
    judge = UNetJudge(UNetHeads(), tiny.tiny_networks().unet.clone(config=config), "encoder", -1.0, 1.0)
    params = jax.eval_shape(judge.init, jax.random.key(0))[0]
    heads = {f"{kind}_{level}" for kind in KINDS for level in range(levels)}
    assert params.keys() - {"spatial_condition", "temporal_condition"} == heads and len(heads) == 8
