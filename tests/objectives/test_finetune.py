"""Denoising training against SF-V's Eq. 1 to 3 written out in NumPy, and its gradients against PyTorch's."""

import dataclasses
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch
from conftest import flat, quick_jit, relative_error
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from torch_reference import flax_params, torch_unet
from toy_unet import ToyUNet

from osv_jax.convert import naming
from osv_jax.convert.architectures import expected_params
from osv_jax.models.groups import select
from osv_jax.objectives import finetune, losses
from osv_jax.objectives.finetune import DropoutOptions, Finetune, FinetuneOptions, SigmaOptions
from osv_jax.objectives.networks import build_networks
from osv_jax.objectives.options import LoRAOptions
from osv_jax.objectives.players import Student, first_state, start
from osv_jax.training import setup
from osv_jax.training.config import check_config

LORA_SCALE = 1.5
# Every case of dropout is as likely as none.
OPTIONS = FinetuneOptions(
    lora=LoRAOptions(4, 4 * LORA_SCALE), dropout=DropoutOptions(0.25, 0.25, 0.25), ema_decay=0.9, min_snr_gamma=5.0
)
# With it the four clips of `real` are dropped each in another way.
KEY_OF_ALL_CASES = 3
UNET = tiny.ONE_LEVEL_UNET
RATE = 0.1
# Plain descent that keeps the gradient it was given as its state.
KEEPER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params=None: (jax.tree.map(lambda g: -RATE * g, gradient), gradient),
)


def column(values):
    return np.asarray(values, np.float64)[:, None, None, None, None]


def noise_levels(draws, log_mean=0.7, log_std=1.6):
    return np.exp(log_mean + log_std * np.asarray(draws["normal"], np.float64))


def dropped(draws, embedding, latents, both):
    """Which clips lose their embedding, and which their image latents."""
    u = np.asarray(draws["uniform"])
    second, third = embedding + latents, embedding + latents + both
    return (u < embedding) | ((u >= second) & (u < third)), (u >= embedding) & (u < third)


def network_inputs(batch, draws, options):
    """x, sigma and the arguments of F in SF-V Eq. 2 and 3, in NumPy."""
    sigma = noise_levels(draws, options.sigma.log_mean, options.sigma.log_std)
    x = np.asarray(batch.latents) + column(sigma) * np.asarray(draws["noise"])
    no_embedding, no_latents = dropped(draws, *dataclasses.astuple(options.dropout))
    embedding = np.where(no_embedding[:, None], 0, batch.cond.image_embedding)
    image = np.where(no_latents[:, None, None, None], 0, batch.cond.image_latents)
    image = np.repeat(image[:, None], x.shape[1], axis=1)
    sample = np.concatenate([x / np.sqrt(column(sigma) ** 2 + 1), image], axis=-1)
    inputs = (sample, 0.25 * np.log(sigma), embedding, np.asarray(batch.cond.added_time_ids))
    return x, sigma, tuple(value.astype(np.float32) for value in inputs)


def equation_1(x, sigma, prediction, target, gamma):
    """The weighted error of every clip; SF-V Eq. 1 and 2."""
    s = column(sigma)
    denoised = x / (s**2 + 1) - s / np.sqrt(s**2 + 1) * np.asarray(prediction, np.float64)
    weight = np.minimum(1 / sigma**2, gamma) if gamma else (sigma**2 + 1) / sigma**2
    return weight * np.mean((denoised - np.asarray(target)) ** 2, axis=(1, 2, 3, 4))


# ---- The equations.


@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_denoising_weight(gamma):
    """lambda_sigma of SF-V Eq. 1, and min-SNR's factor min(SNR, gamma) / (SNR + 1) on the loss of v."""
    sigma = np.geomspace(0.01, 100, 9)
    snr = 1 / sigma**2
    expected = (sigma**2 + 1) / sigma**2 * (np.minimum(snr, gamma) / (snr + 1) if gamma else 1)
    np.testing.assert_allclose(losses.denoising_weight(jnp.asarray(sigma, jnp.float32), gamma), expected, rtol=1e-5)


def test_the_weighted_error_is_that_of_v():
    """With lambda_sigma the loss is ||F - v||^2, v = eps / sqrt(s^2 + 1) - s x_0 / sqrt(s^2 + 1), up to its sign."""
    rng = np.random.default_rng(0)
    x0, eps, prediction = rng.standard_normal((3, 5, 2, 3, 3, 4))
    sigma = np.geomspace(0.05, 50, 5)
    s = column(sigma)
    v = (s * x0 - eps) / np.sqrt(s**2 + 1)
    loss = equation_1(x0 + s * eps, sigma, prediction, x0, 0)
    np.testing.assert_allclose(loss, np.mean((prediction + v) ** 2, axis=(1, 2, 3, 4)), rtol=1e-9)


def test_squared_error(rng):
    """||x - y||^2 of SF-V Eq. 1, as a mean."""
    x, y = rng.standard_normal((2, 3, 2, 4, 5, 4), np.float32)
    expected = [sum((p - q).ravel() ** 2) / p.size for p, q in zip(x, y, strict=True)]
    np.testing.assert_allclose(losses.squared_error(x, y), expected, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_denoising_loss(gamma):
    """SF-V Eq. 1 to 3, against the transcription above, for a network that depends on all its inputs."""
    options = dataclasses.replace(OPTIONS, min_snr_gamma=gamma, sigma=SigmaOptions(0.2, 1.1))
    batch = tiny.tiny_batch(16)
    draws = quick_jit(finetune.draw)(jax.random.key(1), batch)

    def network(sample, c_noise, embedding, ids):
        shift = np.pi * c_noise + embedding.mean(axis=1) + 0.01 * ids.sum(axis=1)
        return jnp.sin(sample[..., :4] - 2 * sample[..., 4:] + shift[:, None, None, None, None])

    x, sigma, inputs = network_inputs(batch, draws, options)
    expected = equation_1(x, sigma, network(*inputs), batch.latents, gamma)
    loss, sigmas = jax.jit(lambda batch, draws: finetune.denoising_loss(network, batch, draws, options))(batch, draws)
    np.testing.assert_allclose(sigmas, sigma, rtol=1e-5)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_log_normal_sigma():
    """ln sigma ~ N(P_mean, P_std^2), within five standard errors, from the step's own draws."""
    count = 50_000
    batch = tiny.tiny_batch(1, 1, 1, 1)
    batch = dataclasses.replace(batch, latents=jnp.zeros((count, 1, 1, 1, 1)))
    draws = quick_jit(finetune.draw)(jax.random.key(0), batch)
    log_sigma = np.log(np.asarray(finetune.log_normal_sigma(draws["normal"], 0.7, 1.6), np.float64))
    assert abs(log_sigma.mean() - 0.7) < 5 * 1.6 / np.sqrt(count)
    assert abs(log_sigma.std() - 1.6) < 5 * 1.6 / np.sqrt(2 * count)
    # Nothing else is drawn from the same numbers.
    correlations = np.corrcoef([draws["normal"], np.ravel(draws["noise"]), draws["uniform"]])
    assert np.abs(correlations - np.eye(3)).max() < 5 / np.sqrt(count)


def test_drop_conditions():
    """Each case has its probability, zeroes its own part exactly, and touches nothing else."""
    count, p = 50_000, {"embedding": 0.05, "latents": 0.2, "both": 0.1}
    batch = tiny.tiny_batch(1, 1, 1, 1)
    cond = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), batch.cond)
    draws = quick_jit(finetune.draw)(
        jax.random.key(2), dataclasses.replace(batch, latents=jnp.zeros((count, 1, 1, 1, 1)))
    )
    result = finetune.drop_conditions(cond, draws["uniform"], DropoutOptions(**p))

    kept = {}
    for name in ("image_embedding", "image_latents"):
        new, old = (np.asarray(getattr(c, name)).reshape(count, -1) for c in (result, cond))
        kept[name] = (new == old).all(axis=1)
        assert ((new == 0).all(axis=1) | kept[name]).all()
    np.testing.assert_array_equal(result.added_time_ids, cond.added_time_ids)
    no_embedding, no_latents = ~kept["image_embedding"], ~kept["image_latents"]
    cases = {
        "embedding": no_embedding & ~no_latents,
        "latents": no_latents & ~no_embedding,
        "both": no_embedding & no_latents,
    }
    for name, share in p.items():
        assert abs(cases[name].mean() - share) < 5 * np.sqrt(share * (1 - share) / count), name


def test_nothing_is_dropped_with_probability_zero():
    cond = tiny.tiny_batch(3).cond
    result = finetune.drop_conditions(cond, jnp.array([0.0, 0.5, 1 - 2**-24]), DropoutOptions(0.0, 0.0, 0.0))
    jax.tree.map(np.testing.assert_array_equal, result, cond)


def test_bands_are_means_over_their_clips_and_nan_when_empty():
    loss, sigma = jnp.array([1.0, 5.0, 3.0, jnp.inf]), jnp.array([0.5, 0.1, 1.0, 3.9])
    means = finetune.band_means(finetune.band_sums(loss, sigma))
    assert means["loss/sigma_low"] == 3 and means["loss/sigma_mid"] == jnp.inf and np.isnan(means["loss/sigma_high"])


# ---- The step.


@pytest.fixture(scope="module")
def toy():
    """Networks with a toy for the UNet, its parameters, and a batch of eight clips."""
    made = tiny.tiny_networks()
    networks = dataclasses.replace(made, unet=ToyUNet(made.unet.config), dinov2=None, discriminator=None)
    batch = tiny.tiny_batch(8)
    sample = jnp.zeros((1, 3, 6, 10, 8))
    init = quick_jit(networks.unet.init)
    params = init(jax.random.key(0), sample, jnp.zeros(1), jnp.zeros((1, 8)), jnp.zeros((1, 3)))
    return networks, {"unet": params["params"]}, batch


def objective_of(networks, optimizer, **options):
    return Finetune(networks, dataclasses.replace(OPTIONS, **options), {"student": optimizer})


def toy_state(toy, optimizer, trainable):
    networks, frozen, _ = toy
    objective = objective_of(networks, optimizer, trainable=trainable)
    return quick_jit(setup.make_init(objective))(jax.random.key(3), frozen)


def student_of(state):
    return state.players["student"].params


def test_only_what_is_named_trains(toy):
    lora, tuned, both = (student_of(toy_state(toy, KEEPER, names)) for names in (("lora",), ("all",), ("lora", "all")))
    assert lora.lora and not lora.tuned
    assert tuned.tuned and not tuned.lora
    assert both.lora and both.tuned
    assert list(toy_state(toy, KEEPER, ("all",)).players) == ["student"]


@pytest.mark.integration
def test_the_parts_of_a_batch_make_the_same_step(toy):
    networks, frozen, batch = toy
    state, key = toy_state(toy, KEEPER, ("lora", "all")), jax.random.key(4)
    results = []
    for parts in (1, 4):
        step = jax.jit(objective_of(networks, KEEPER, grad_accum=parts).step)
        results.append(step(state, frozen, batch, key))
    (state_1, metrics_1), (state_4, metrics_4) = results
    for whole, parts in zip(jax.tree.leaves(state_1), jax.tree.leaves(state_4), strict=True):
        np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-6)
    assert metrics_1.keys() == metrics_4.keys()
    for name in metrics_1:
        np.testing.assert_allclose(metrics_1[name], metrics_4[name], rtol=1e-4, err_msg=name)


@pytest.mark.integration
def test_the_loss_falls_with_lora_alone(toy):
    """On the clips it sees, at noise levels and conditions that it does not."""
    networks, frozen, batch = toy
    optimizer = optax.adam(1e-2)
    options = FinetuneOptions(lora=LoRAOptions(4, 4.0))
    state, key = toy_state(toy, optimizer, ("lora",)), jax.random.key(5)
    step = jax.jit(Finetune(networks, options, {"student": optimizer}).step)
    held_out = quick_jit(finetune.draw)(jax.random.key(6), batch)

    @quick_jit
    def loss(student, frozen):
        network = networks.unet_with(student.variables(frozen["unet"]))
        return finetune.denoising_loss(network, batch, held_out, options)[0].mean()

    before = loss(student_of(state), frozen)
    for number in range(200):
        state, metrics = step(state, frozen, batch, jax.random.fold_in(key, number))
        assert np.isfinite(metrics["loss"])
    assert loss(student_of(state), frozen) < 0.9 * before
    assert loss(state.players["student"].ema, frozen) < before
    assert state.step == 200


# ---- Against PyTorch.


@pytest.fixture(scope="module")
def real():
    """One step of the tiny UNet, its LoRA and every layer of it training, from PyTorch's random weights."""
    model = torch_unet(UNET)
    frozen = {"unet": flax_params(model, "unet", UNET)}
    configs = tiny.CONFIGS | {"unet": UNET}
    networks = build_networks({name: made for name, made in configs.items() if name != "dinov2"})
    objective = objective_of(networks, KEEPER, trainable=("lora", "all"))
    shapes = jax.eval_shape(objective.init, jax.random.key(0), frozen)["student"].params.lora
    rng = np.random.default_rng(1)
    lora = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape, np.float32)), shapes)
    student = Student(lora=lora, tuned=select(frozen["unet"], ("all",)))
    state = first_state({"student": start(student, KEEPER, ema=True)})
    batch, key = tiny.tiny_batch(4), jax.random.key(KEY_OF_ALL_CASES)
    new, metrics = jax.jit(objective.step)(state, frozen, batch, key)
    return model, state, batch, quick_jit(finetune.draw)(key, batch), new, metrics


def torch_loss_and_gradients(model, state, batch, draws):
    """The loss of SF-V Eq. 1 to 3 in PyTorch, and its gradients by our paths, for the weights with LoRA merged."""
    x, sigma, (sample, c_noise, embedding, ids) = network_inputs(batch, draws, OPTIONS)
    lora = flatten_dict(student_of(state).lora)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for path in {path[:-1] for path in lora}:
            update = LORA_SCALE * np.asarray(lora[(*path, "a")]) @ np.asarray(lora[(*path, "b")])
            name, update = naming.to_torch((*path, "kernel"), update)
            params[name] += torch.tensor(np.ascontiguousarray(update))
    output = model(
        torch.tensor(sample).permute(0, 1, 4, 2, 3).contiguous(),
        torch.tensor(c_noise),
        torch.tensor(embedding)[:, None],
        torch.tensor(ids),
    ).sample.permute(0, 1, 3, 4, 2)
    s, x = torch.tensor(column(sigma)), torch.tensor(x)
    denoised = x / (s**2 + 1) - s / (s**2 + 1).sqrt() * output
    error = (denoised - torch.tensor(np.asarray(batch.latents))).square().mean(dim=(1, 2, 3, 4))
    loss = (torch.tensor(np.minimum(1 / sigma**2, OPTIONS.min_snr_gamma)) * error).mean()
    loss.backward()
    paths = expected_params("unet", UNET)
    return loss.item(), {p: naming.to_flax(p, params[naming.torch_name(p)].grad.numpy()) for p in paths}


def joint_error(actual, expected):
    """Relative error of all leaves together."""
    vectors = (np.concatenate([np.ravel(tree[path]) for path in actual]) for tree in (actual, expected))
    return relative_error(*vectors)


@pytest.mark.integration
def test_loss_and_gradients_match_pytorch(real):
    model, state, batch, draws, new, metrics = real
    cases = np.stack(dropped(draws, 0.25, 0.25, 0.25), axis=1)
    assert len(np.unique(cases, axis=0)) == 4
    loss, gradients = torch_loss_and_gradients(model, state, batch, draws)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)

    actual = flatten_dict(new.players["student"].opt_state.tuned)
    expected = {path: gradients[path] for path in actual}
    assert joint_error(actual, expected) < 1e-4
    # What does not train has no gradient there either, up to rounding.
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    for path in gradients.keys() - actual.keys():
        assert np.abs(gradients[path]).max() < 1e-6 * largest, path

    lora, actual = flatten_dict(student_of(state).lora), flatten_dict(new.players["student"].opt_state.lora)
    expected = {}
    for path in {path[:-1] for path in lora}:
        gradient = LORA_SCALE * np.asarray(gradients[(*path, "kernel")])
        a, b = np.asarray(lora[(*path, "a")]), np.asarray(lora[(*path, "b")])
        expected[(*path, "a")] = gradient @ b.T
        expected[(*path, "b")] = a.reshape(-1, a.shape[-1]).T @ gradient.reshape(-1, b.shape[-1])
    assert joint_error(actual, expected) < 1e-4


@pytest.mark.integration
def test_the_step_descends_updates_the_ema_and_measures(real):
    _, state, _, _, new, metrics = real
    player = new.players["student"]
    old, updated = flat(student_of(state)), flat(player.params)
    gradient, ema = flat(player.opt_state), flat(player.ema)
    np.testing.assert_allclose(updated, old - RATE * gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ema, 0.9 * old + 0.1 * updated, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["grad_norm/student"], np.linalg.norm(gradient), rtol=1e-4)
    assert new.step == 1


def test_real_configuration_is_accepted():
    """configs/finetune.py at its sizes, every layer training: the first state has them all, and no discriminator."""
    config = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "configs" / "finetune.py"))["get_config"]()
    config.weights, config.random_networks = "", ConfigDict({"image_encoder": {}})
    config.trainable = ("all",)
    check_config(config)
    made = setup.networks_of(config)
    assert made.dinov2 is None and made.discriminator is None
    unet = unflatten_dict(expected_params("unet", made.unet.config))
    state = jax.eval_shape(setup.make_init(setup.objective_of(config, made)), jax.random.key(0), {"unet": unet})
    assert flatten_dict(student_of(state).tuned).keys() == flatten_dict(select(unet, ("all",))).keys()
    assert not student_of(state).lora and list(state.players) == ["student"]
    assert {leaf.dtype for leaf in jax.tree.leaves(student_of(state))} == {jnp.dtype("float32")}
