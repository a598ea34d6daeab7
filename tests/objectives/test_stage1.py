"""The step of stage 1 against OSV's Eq. 6 and 7 written out plainly, and what must not change it."""

import dataclasses
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from conftest import flat, quick_jit, relative_error
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxprs import equations
from ml_collections import ConfigDict
from students import (
    GRADIENT,
    assert_about_the_same_step,
    disc_of,
    ema_of,
    one_level_networks_and_frozen,
    student_of,
    toy_networks_and_frozen,
    trained_state,
    with_student,
)
from toy_unet import ToyUNet

from osv_jax.convert.architectures import expected_params
from osv_jax.models.discriminator import discriminate
from osv_jax.objectives import osv_stage1
from osv_jax.objectives.networks import Networks
from osv_jax.objectives.options import LoRAOptions, OptimizerOptions
from osv_jax.objectives.osv import OSVOptions
from osv_jax.objectives.players import Student, make_optimizer, start, update_ema
from osv_jax.training import setup
from osv_jax.training.config import phases_of

# Plain descent: Adam's first step is the gradient's sign, rounding errors' too.
SGD = {name: optax.sgd(0.5) for name in ("student", "disc")}
OPTIONS = {
    "huber_c": 0.03,
    "adversarial_weight": 0.3,
    "ema_decay": 0.9,
}
KEY = jax.random.key(7)


def make_state(networks, frozen):
    """Random LoRA on both sides, and singular vectors that another power iteration does not change."""
    objective = stage1(networks)
    state = quick_jit(setup.make_init(objective))(jax.random.key(0), frozen)
    rng = np.random.default_rng(3)
    student = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, np.float32)), student_of(state))
    ema = jax.tree.map(lambda x: x + 0.1, student)
    disc = state.players["disc"]
    kernels, spectral = flatten_dict(disc.params), flatten_dict(disc.stats)
    for path in spectral:
        matrix = np.asarray(kernels[(*path[:-1], "kernel")])
        spectral[path] = jnp.asarray(np.linalg.svd(matrix.reshape(-1, matrix.shape[-1]))[2][0])
    state = state.replace(players=state.players | {"disc": disc.replace(stats=unflatten_dict(spectral))})
    return with_student(state, student, ema)


def stage1(networks, num_levels=100):
    # The toy has no attention. All of the UNet's modules with so large a LoRA would amplify rounding errors.
    targets = "all" if isinstance(networks.unet, ToyUNet) else "attention"
    options = OSVOptions(**OPTIONS, lora=LoRAOptions(4, 6.0, targets), num_levels=num_levels)
    return osv_stage1.Stage1(networks, options, SGD)


@pytest.fixture(scope="module", params=["toy", pytest.param("real", marks=pytest.mark.integration)])
def made(request):
    return {"toy": toy_networks_and_frozen, "real": one_level_networks_and_frozen}[request.param]()


@pytest.fixture(scope="module")
def networks(made):
    return made[0]


@pytest.fixture(scope="module")
def frozen(made):
    return {name: made[1][name] for name in ("unet", "dinov2")}


@pytest.fixture(scope="module")
def state(networks, frozen):
    return make_state(networks, frozen)


@pytest.fixture(scope="module")
def batch():
    return tiny.tiny_batch(8, height=12, width=12)


class CountingNetworks(Networks):
    """Counts how often a UNet is applied while a program is traced."""

    applied = 0

    def unet_with(self, variables):
        network = super().unet_with(variables)

        def counted(*args):
            CountingNetworks.applied += 1
            return network(*args)

        return counted


@pytest.fixture(scope="module")
def step(networks):
    CountingNetworks.applied = 0
    counting = CountingNetworks(**{field.name: getattr(networks, field.name) for field in dataclasses.fields(networks)})
    return jax.jit(stage1(counting).step)


@pytest.fixture(scope="module")
def result(step, state, frozen, batch):
    return step(state, frozen, batch, KEY)


def change(new, old):
    """How far every parameter moved, as one vector."""
    return flat(new) - flat(old)


def assert_moved_alike(new, expected, old):
    """To 1e-5 of the parameters, and to what gradients are accurate to of the step that was taken."""
    for name in new:
        assert relative_error(flat(new[name]), flat(expected[name])) < 1e-5, name
        assert relative_error(change(new[name], old[name]), change(expected[name], old[name])) < GRADIENT, name


def sigmas_of(key, clips):
    """The noise levels of a step: uniform over the index of the Karras grid."""
    index = jax.random.randint(jax.random.split(key)[0], (clips,), 0, 100)
    grid = np.linspace(0.002 ** (1 / 7), 700 ** (1 / 7), 100) ** 7
    return jnp.asarray(grid, jnp.float32)[index]


@pytest.fixture(scope="module")
def plain(networks, frozen, state, batch):
    """Eq. 6, the discriminator's step on it, and Eq. 7 through a given discriminator."""
    clips = batch.latents.shape[0]
    sigma = sigmas_of(KEY, clips)[:, None, None, None, None]
    noise = jax.random.normal(jax.random.split(KEY)[1], batch.latents.shape)
    x_t = batch.latents + sigma * noise
    image = jnp.repeat(batch.cond.image_latents[:, None], batch.latents.shape[1], axis=1)

    def f(student, frozen):
        variables = {"params": frozen["unet"], "lora": {**student.lora}}
        variables["lora"] = jax.tree.map_with_path(
            lambda path, x: 1.5 * x if path[-1].key == "b" else x, variables["lora"]
        )
        sample = jnp.concatenate([x_t / jnp.sqrt(sigma**2 + 1), image], axis=-1)
        ids, embedding = batch.cond.added_time_ids, batch.cond.image_embedding
        v = networks.unet.apply(variables, sample, jnp.log(sigma).reshape(-1) / 4, embedding, ids)
        return x_t / (sigma**2 + 1) - sigma / jnp.sqrt(sigma**2 + 1) * v

    def logits(disc, frozen, latents, update):
        out, spectral = discriminate(networks.discriminator, networks.dinov2, disc, frozen["dinov2"], latents, update)
        return jnp.concatenate([out["spatial"], out["temporal"]], axis=1), spectral

    def loss_disc(params, frozen, fake):
        disc = {**disc_of(state), "params": params}
        real_logits, spectral = logits(disc, frozen, batch.latents, True)
        fake_logits, _ = logits(disc, frozen, fake, True)
        loss = jnp.maximum(0, 1 - real_logits).mean() + jnp.maximum(0, 1 + fake_logits).mean()
        return loss, spectral

    def loss_student(student, frozen, disc):
        fake = f(student, frozen)
        adversarial_loss = jnp.maximum(0, 1 - logits(disc, frozen, fake, False)[0]).mean()
        huber = (jnp.sqrt((batch.latents - fake) ** 2 + 0.03**2) - 0.03).mean()
        return 0.3 * adversarial_loss + huber, (adversarial_loss, huber)

    @quick_jit
    def run(state, frozen, rate):
        fake = f(student_of(state), frozen)
        (d, spectral), g_disc = jax.value_and_grad(loss_disc, has_aux=True)(disc_of(state)["params"], frozen, fake)
        params = jax.tree.map(lambda p, g: p - rate * g, disc_of(state)["params"], g_disc)
        disc = {"params": params, "spectral": spectral}
        (g, (adversarial_loss, huber)), g_student = jax.value_and_grad(loss_student, has_aux=True)(
            student_of(state), frozen, disc
        )
        student = jax.tree.map(lambda p, g: p - 0.5 * g, student_of(state), g_student)
        return disc, student, {"disc": d, "student": g, "adversarial": adversarial_loss, "huber": huber}

    # Arguments, not constants, with which XLA would compute while it compiles.
    return lambda state, rate: run(state, frozen, rate)


def test_step_is_eq_6_then_eq_7_through_the_new_discriminator(plain, state, result):
    new, metrics = result
    disc, student, expected = plain(state, 0.5)
    for name, value in expected.items():
        assert relative_error(metrics[f"loss_{name}"], value) < 1e-5, name
    moved = {"student": student, "disc": disc["params"]}
    old = {"student": student_of(state), "disc": disc_of(state)["params"]}
    assert_moved_alike({"student": student_of(new), "disc": disc_of(new)["params"]}, moved, old)
    assert relative_error(flat(disc_of(new)["spectral"]), flat(disc["spectral"])) < 1e-5
    # The old discriminator would have given another student.
    _, blind, _ = plain(state, 0.0)
    assert relative_error(change(blind, student_of(state)), change(student, student_of(state))) > 0.01


def test_metrics_are_norms_and_means_of_what_happened(state, result):
    new, metrics = result
    for player, old_params, new_params in (
        ("student", student_of(state), student_of(new)),
        ("disc", disc_of(state)["params"], disc_of(new)["params"]),
    ):
        norm = np.linalg.norm(change(new_params, old_params)) / 0.5
        np.testing.assert_allclose(metrics[f"grad_norm/{player}"], norm, rtol=1e-3)
        np.testing.assert_allclose(metrics[f"param_norm/{player}"], np.linalg.norm(flat(new_params)), rtol=1e-5)
    assert new.step == 1


def test_ema_follows_the_new_student(state, result):
    new = result[0]
    assert relative_error(flat(ema_of(new)), 0.9 * flat(ema_of(state)) + 0.1 * flat(student_of(new))) < 1e-6


def test_update_ema():
    """The EMA of OSV Eq. 5."""
    old, new = (Student(lora={"a": jnp.full(2, x)}, tuned={"k": jnp.full(2, -x)}) for x in (1.0, 3.0))
    ema = update_ema(old, new, 0.95)
    np.testing.assert_allclose(ema.lora["a"], 1.1, rtol=1e-6)
    np.testing.assert_allclose(ema.tuned["k"], -1.1, rtol=1e-6)


def test_ema_keeps_changes_that_half_precision_would_lose():
    ema, student = Student({}, {"w": jnp.ones(3)}), Student({}, {"w": jnp.full(3, 1 + 1e-4)})
    for _ in range(2):
        ema = update_ema(ema, student, 0.95)
    # Numbers near 1 are 1.2e-7 apart.
    np.testing.assert_allclose(ema.tuned["w"] - 1, 1e-4 * (1 - 0.95**2), rtol=0, atol=1e-6)
    assert jnp.bfloat16(1 + 1e-4) == 1


def test_state_holds_only_what_learns(networks, frozen, result):
    new = result[0]
    assert {path[-1] for path in flatten_dict(student_of(new).lora)} == {"a", "b"}
    assert student_of(new).tuned == {}
    assert {path[0] for path in flatten_dict(disc_of(new)["params"])} == {"upsampler", "spatial_0", "temporal_0"}
    assert jax.tree.structure(ema_of(new)) == jax.tree.structure(student_of(new))


def test_student_runs_forward_once(result):
    assert CountingNetworks.applied == 1


@pytest.mark.integration
def test_step_depends_on_its_arguments_alone(step, state, frozen, batch, result):
    again = step(state, frozen, batch, KEY)
    jax.tree.map(np.testing.assert_array_equal, again, result)
    later = step(state.replace(step=state.step + 5), frozen, batch, KEY)
    assert later[0].step == 6
    jax.tree.map(np.testing.assert_array_equal, later[0].replace(step=result[0].step), result[0])
    other = step(state, frozen, batch, jax.random.key(8))
    assert other[1]["loss_huber"] != result[1]["loss_huber"]


def test_index_is_uniform_over_the_grid(networks):
    clips = tiny.tiny_batch(20_000, 1, 1, 2)
    draws = quick_jit(stage1(networks, 20).draw)(KEY, clips)
    counts = np.bincount(draws["index"], minlength=20)
    assert len(counts) == 20
    # Chi-squared with 19 degrees of freedom exceeds 43.8 once in a thousand keys.
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
    noise = np.asarray(draws["noise"])
    assert noise.shape == clips.latents.shape
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs(np.corrcoef(draws["index"], noise[:, 0, 0, 0, 0])[0, 1]) < 0.03


def test_example_is_the_noisy_clip_and_its_target_the_clip(networks, state, frozen):
    clips = tiny.tiny_batch(3)
    draws = {"index": jnp.array([0, 7, 19]), "noise": tiny.tiny_batch(3, seed=5).latents}
    example = stage1(networks, 20).example(state, frozen, clips, draws)
    sigma = np.linspace(0.002 ** (1 / 7), 700 ** (1 / 7), 20)[[0, 7, 19]] ** 7
    np.testing.assert_allclose(example.sigma, sigma, rtol=1e-5)
    noisy = np.asarray(clips.latents) + sigma[:, None, None, None, None] * np.asarray(draws["noise"])
    np.testing.assert_allclose(example.x, noisy, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(example.target, clips.latents)
    np.testing.assert_array_equal(example.weight, 1)
    assert example.cond is clips.cond


@pytest.mark.parametrize("max_norm", [None, 2.0])
def test_optimizer_is_adam_after_clipping_by_the_global_norm(max_norm):
    rate, b1, b2 = 0.1, 0.8, 0.9
    optimizer = make_optimizer(OptimizerOptions(rate, b1, b2, max_norm or 0.0))
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    gradients = [np.array([3.0, 0.0, 4.0]), np.array([0.1, -0.2, 0.2])]  # Norms 5 and 0.3.
    expected, m, v, opt = np.zeros(3), np.zeros(3), np.zeros(3), optimizer.init(params)
    for i, gradient in enumerate(gradients, start=1):
        updates, opt = optimizer.update({"a": jnp.asarray(gradient[:2]), "b": jnp.asarray(gradient[2:])}, opt, params)
        params = optax.apply_updates(params, updates)
        if max_norm is not None:
            gradient = gradient * min(1, max_norm / np.linalg.norm(gradient))
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        expected -= rate * (m / (1 - b1**i)) / (np.sqrt(v / (1 - b2**i)) + 1e-8)
    np.testing.assert_allclose(np.concatenate([params["a"], params["b"]]), expected, rtol=1e-5)


def test_groups_may_have_learning_rates_of_their_own():
    options = OptimizerOptions(0.1, group_learning_rates=(("temporal_transformer", 0.01), ("spatial_resnet", 0.0)))
    tuned = {
        "attentions_0": {"temporal_transformer_blocks_0": {"ff": jnp.ones(2)}, "transformer_blocks_0": jnp.ones(2)},
        "resnets_0": {"spatial_res_block": {"conv1": jnp.ones(2)}},
    }
    student = Student(lora={"m": {"a": jnp.ones(2)}}, tuned=tuned)
    optimizer = make_optimizer(options)
    gradient = jax.tree.map(jnp.ones_like, student)
    player = start(student, optimizer).update(gradient, optimizer)
    # Adam's first step is its rate.
    moved = jax.tree.map(lambda new, old: float(old[0] - new[0]), player.params, student)
    assert moved.lora["m"]["a"] == pytest.approx(0.1, rel=1e-4)
    expected = {("attentions_0", "temporal_transformer_blocks_0", "ff"): 0.01}
    expected |= {("attentions_0", "transformer_blocks_0"): 0.1, ("resnets_0", "spatial_res_block", "conv1"): 0.0}
    assert flatten_dict(moved.tuned) == pytest.approx(expected, rel=1e-4)


def matrix_products(jaxpr):
    """Operands of every convolution and product of two matrices, of inner programs too."""
    for eqn in equations(jaxpr):
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield tuple(operand.aval for operand in eqn.invars)


@pytest.mark.integration
def test_half_precision_step_is_that_of_float32_about(batch):
    networks, weights = toy_networks_and_frozen(jnp.bfloat16)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)
    state = trained_state(networks, weights, trainable=("lora",))
    half, full = (
        jax.jit(stage1(of).step)(state, frozen, batch, KEY)
        for of, frozen in ((networks, weights), (toy_networks_and_frozen()[0], wide))
    )
    assert_about_the_same_step(state, half, full)


def test_half_precision_step_multiplies_no_float32():
    half, weights = one_level_networks_and_frozen(jnp.bfloat16)
    # 28 x 28 pixels: nothing is resized, which DINOv2's position embeddings would be in float32.
    clips = tiny.tiny_batch(2, 3, 7, 7)
    objective = stage1(half)
    state = jax.eval_shape(setup.make_init(objective), KEY, weights)
    products = list(matrix_products(jax.make_jaxpr(objective.step)(state, weights, clips, KEY).jaxpr))
    assert len(products) > 100
    # Spectral normalisation multiplies matrices with vectors. The gradient of XLA's attention has one side in float32.
    wide = [p for p in products if all(x.dtype == jnp.float32 and np.sum(np.array(x.shape) > 1) > 1 for x in p)]
    assert wide == []


@pytest.mark.integration
def test_real_configuration_traces():
    """Everything that configs/stage1.py does in a step, at its sizes; nothing is computed.

    But for the numbers of levels and layers, which only take time.
    """
    config = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "configs" / "stage1.py"))["get_config"]()
    unet = {"layers_per_block": 1, "block_out_channels": (320, 640), "num_attention_heads": (5, 10)}
    unet |= {"has_attention": (True, False)}
    few = {"image_encoder": {"num_hidden_layers": 2}, "dinov2": {"num_hidden_layers": 12}}
    config.weights, config.random_networks = "", ConfigDict(few | {"unet": unet})
    config = setup.with_num_frames(config)
    real = setup.networks_of(config)
    objective = setup.objective_of(config, real)
    shapes = {name: unflatten_dict(expected_params(name, getattr(real, name).config)) for name in objective.components}
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes)
    state = jax.eval_shape(setup.make_init(objective), jax.random.key(0), weights)
    phase, *_ = phases_of(config)
    clips = {
        "video": jax.ShapeDtypeStruct(
            (config.batch_size, config.data.num_frames, phase.height, phase.width, 3), jnp.uint8
        ),
        "fps": jax.ShapeDtypeStruct((config.batch_size,), jnp.float32),
    }
    assert clips["video"].shape == (8, 14, 576, 1024, 3)
    new, metrics = jax.eval_shape(setup.make_train_step(config, objective), state, weights, clips)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())
