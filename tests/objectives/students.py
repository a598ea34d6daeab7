"""Networks, a state in which everything has moved, and how far two states differ: for tests of whole steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from conftest import flat, quick_jit, relative_error
from flax.traverse_util import unflatten_dict
from toy_unet import ToyUNet

from osv_jax.convert.architectures import expected_params
from osv_jax.objectives.add import ADD
from osv_jax.objectives.networks import build_networks
from osv_jax.objectives.options import LoRAOptions
from osv_jax.objectives.osv import OSVOptions
from osv_jax.objectives.osv_stage1 import Stage1
from osv_jax.objectives.osv_stage2 import Stage2, Stage2Options
from osv_jax.objectives.random_networks import random_params
from osv_jax.runtime import mesh
from osv_jax.training import setup

TRAINABLE = ("lora", "temporal_transformer")
# Plain descent: Adam's first step is the gradient's sign, and that of a rounding error is anybody's guess.
RATES = {"student": 0.5, "disc": 0.25}
# Relative error of gradients in float32. Latents that DINOv2 sees are at least 12 x 12, which makes two rows of
# patches: of one alone, norms have too little to take their variance from, and amplify rounding errors.
GRADIENT = 2e-4
SGD = {name: optax.sgd(rate) for name, rate in RATES.items()}
# One level of everything, for speed, and two channels for each group of a norm: the variance of one channel's three
# frames is so small now and then that rounding shows.
CONFIGS = tiny.CONFIGS | {
    "unet": tiny.ONE_LEVEL_UNET,
    "dinov2": dataclasses.replace(tiny.CONFIGS["dinov2"], hidden_size=64, num_hidden_layers=1),
}


def one_level_networks_and_frozen(dtype=jnp.float32):
    networks = build_networks(CONFIGS, discriminator_blocks=(0,), dtype=dtype, param_dtype=dtype)
    shapes = {name: unflatten_dict(expected_params(name, config)) for name, config in CONFIGS.items()}
    return networks, jax.tree.map(jnp.asarray, random_params(shapes, 0, dtype))


def toy_networks_and_frozen(dtype=jnp.float32):
    networks, frozen = one_level_networks_and_frozen(dtype)
    networks = dataclasses.replace(networks, unet=ToyUNet(CONFIGS["unet"], dtype, dtype))
    batch = tiny.tiny_batch()
    sample = jnp.concatenate([batch.latents, batch.latents], axis=-1)
    cond = (batch.cond.image_embedding, batch.cond.added_time_ids)
    shapes = jax.eval_shape(networks.unet.init, jax.random.key(0), sample, jnp.zeros(2), *cond)["params"]
    return networks, frozen | jax.tree.map(jnp.asarray, random_params({"unet": shapes}, 0, dtype))


def toy_add(options, optimizers, dtype=jnp.float32):
    """`add_of` with the toy for the UNet."""
    return add_of(*toy_networks_and_frozen(dtype), options, optimizers)


def add_of(networks, frozen, options, optimizers):
    """ADD, frozen parameters, and a state in which everything has moved."""
    # Random ones see hardly a difference between frames; norms would amplify that, and rounding errors with it.
    embeddings = frozen["dinov2"]["embeddings"]
    patches = jax.tree.map(lambda leaf: 100 * leaf, embeddings["patch_embeddings"])
    frozen |= {"dinov2": frozen["dinov2"] | {"embeddings": embeddings | {"patch_embeddings": patches}}}
    discriminator = networks.discriminator.clone(blocks=options.discriminator_blocks)
    objective = ADD(dataclasses.replace(networks, discriminator=discriminator), options, optimizers)
    state = quick_jit(setup.make_init(objective))(jax.random.key(0), frozen)
    player = state.players["student"]
    return objective, frozen, with_student(state, perturbed(player.params, 1), perturbed(player.ema, 2))


def perturbed(tree, seed):
    """Every leaf moved a little; LoRA's b is zero at first, and hides most of what could go wrong."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 0.05 * rng.standard_normal(x.shape, np.float32)), tree)


def trained_state(networks, frozen, targets="all", trainable=TRAINABLE):
    """A state in which student and EMA differ from the teacher and from each other."""
    options = OSVOptions(lora=LoRAOptions(4, 4.0, targets), trainable=trainable)
    state = quick_jit(setup.make_init(Stage1(networks, options, SGD)))(jax.random.key(0), frozen)
    player = state.players["student"]
    return with_student(state, perturbed(player.params, 1), perturbed(player.ema, 2))


def stage1(networks, **options):
    """The objective, with plain descent."""
    return Stage1(networks, OSVOptions(**options), SGD)


def stage2(networks, **options):
    """The objective, with plain descent."""
    return Stage2(networks, Stage2Options(**options), SGD)


def student_of(state):
    return state.players["student"].params


def ema_of(state):
    return state.players["student"].ema


def disc_of(state):
    """The discriminator's variables."""
    disc = state.players["disc"]
    return {"params": disc.params, "spectral": disc.stats}


def with_student(state, params, ema=None):
    """The state with other parameters of the student, and another EMA."""
    player = state.players["student"]
    player = player.replace(params=params, ema=player.ema if ema is None else ema)
    return state.replace(players=state.players | {"student": player})


def run_on(devices, step, state, frozen, batch, key):
    """One step as training runs it on these devices."""
    shardings = mesh.parameter_shardings(devices, state)
    with jax.set_mesh(devices):
        return jax.jit(step, out_shardings=(shardings, mesh.replicated(devices)))(
            jax.device_put(state, shardings),
            jax.device_put(frozen, mesh.parameter_shardings(devices, frozen)),
            jax.device_put(batch, mesh.batch_shardings(devices, batch)),
            key,
        )


def differences(actual, expected, before=None):
    """Relative error of all leaves together: of the values, and of their change from `before`."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    actual, expected = flat(actual), flat(expected)
    change = 0.0 if before is None else relative_error(actual - flat(before), expected - flat(before))
    return relative_error(actual, expected), change


def assert_about_the_same_step(before, half, full):
    """A step in bfloat16 goes where that in float32 goes.

    Args:
        before: the state of both.
        half, full: new state and metrics.
    """
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    # bfloat16 has 256 numbers from 1 to 2, and errors of some thousandths add up to about one hundredth here.
    for name in half[1]:
        if name.startswith("loss"):
            # A mean of logits may be near zero; what logits are measured by is the hinge's 1.
            assert half[1][name] == pytest.approx(float(full[1][name]), rel=0.1, abs=0.01), name
    for name, player in before.players.items():
        old, new, wanted = (flat(state.players[name].params) for state in (before, half[0], full[0]))
        change, wanted = new - old, wanted - old
        length, expected_length = np.linalg.norm(change), np.linalg.norm(wanted)
        print(f"{name}: cosine {change @ wanted / (length * expected_length):.4f}, {length / expected_length:.4f}")
        assert 1 - change @ wanted / (length * expected_length) < 0.05
        assert abs(length / expected_length - 1) < 0.15
        if player.stats:
            assert relative_error(*(flat(state.players[name].stats) for state in (half[0], full[0]))) < 1e-5


def nonzero_leaves(tree):
    """The names of the leaves that are not all zero."""
    return [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(tree) if np.any(leaf)]


class ApartStage2(Stage2):
    """The teacher's parameters, which are the student's base too, as something of their own, and so the EMA."""

    def example(self, state, frozen, batch, draws):
        state = with_student(state, student_of(state), frozen["ema"])
        return super().example(state, frozen | {"unet": frozen["teacher"]}, batch, draws)


def gradients_of_inputs(networks, frozen, batch, state, wanted, **options):
    """d(loss_student + loss_disc) with respect to each input by itself."""
    objective = ApartStage2(networks, Stage2Options(**options), SGD)

    def total(inputs, key):
        _, metrics = objective.step(state, frozen | inputs, batch, key)
        return metrics["loss_student"] + metrics["loss_disc"]

    inputs = {"teacher": frozen["unet"], "dinov2": frozen["dinov2"], "vae": frozen["vae"], "ema": ema_of(state)}

    @quick_jit
    def run(inputs, key):
        of = {name: inputs[name] for name in wanted}
        return jax.grad(lambda of: total(inputs | of, key))(of)

    return run(inputs, jax.random.key(3))
