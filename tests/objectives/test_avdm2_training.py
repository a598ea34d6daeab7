"""What AVDM2 trains and what it leaves alone, how often, by which optimizer, and on which devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import flat, quick_jit
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from students import differences, nonzero_leaves, run_on
from toy_text import make, started, toy_text_batch, toy_text_networks

from osv_jax.errors import UserError
from osv_jax.objectives.avdm2 import AVDM2
from osv_jax.objectives.avdm2_options import AdamWOptions, AVDM2Options
from osv_jax.objectives.players import Student
from osv_jax.runtime import mesh
from osv_jax.training import setup

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def toy():
    networks, frozen = toy_text_networks()
    return networks, frozen, toy_text_batch()


@pytest.mark.parametrize("sdm", ["frames", "video"])
def test_no_gradient_reaches_what_is_frozen(toy, sdm):
    networks, frozen, batch = toy
    objective = make(networks, sdm=sdm)
    state = started(objective, frozen)

    def loss(frozen):
        _, metrics = objective.step(state, frozen, batch, KEY)
        return metrics["loss_student"] + metrics["loss_disc"] + metrics["loss_fake_score"]

    assert nonzero_leaves(quick_jit(jax.grad(loss))(frozen)) == []


def test_frozen_weights_exist_once_and_the_players_start_from_them(toy):
    networks, frozen, _ = toy
    objective = make(networks)
    teacher, arrays = objective.teacher(frozen), {id(leaf) for leaf in jax.tree.leaves(frozen)}
    assert {id(leaf) for leaf in jax.tree.leaves(teacher)} == arrays
    assert {id(leaf) for leaf in jax.tree.leaves(objective.real_score(frozen))} < arrays
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen)
    players = objective.init(jax.random.key(0), half)
    for params, given in (
        (players["student"].params.tuned, objective.teacher(half)),
        (players["fake_score"].params, half["unet_2d"]),
    ):
        given, params = flatten_dict(given), flatten_dict(params)
        assert given.keys() == params.keys()
        for path, leaf in params.items():
            assert leaf.dtype == jnp.float32
            np.testing.assert_array_equal(leaf, given[path].astype(jnp.float32))
    assert players["student"].ema is None and sorted(players) == ["disc", "fake_score", "student"]


def counts(player):
    """The numbers of updates that an optimizer has counted."""
    leaves = jax.tree.leaves(player.opt_state)
    return {int(leaf) for leaf in leaves if leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer)}


@pytest.mark.integration
def test_the_others_learn_twice_as_often_as_the_student(toy):
    networks, frozen, batch = toy
    objective = make(networks, optimizers=None)
    state, step = quick_jit(setup.make_init(objective))(jax.random.key(0), frozen), jax.jit(objective.step)
    for number in range(1, 5):
        before = state
        state, metrics = step(state, frozen, batch, jax.random.key(number))
        turn = number % 2 == 0
        assert counts(state.players["student"]) == {number // 2}
        assert counts(state.players["disc"]) == counts(state.players["fake_score"]) == {number}
        for name, player in state.players.items():
            moved = flat(player.params) != flat(before.players[name].params)
            assert moved.any() == (turn or name != "student"), name
        missing = {name for name, value in metrics.items() if np.isnan(value)}
        assert missing == (set() if turn else set(AVDM2.may_be_missing))
    assert int(state.step) == 4


def test_adamw_by_its_rule(toy):
    """Warm-up, decoupled decay, and the student's two rates."""
    chosen = AdamWOptions(0.1, 0.02, 0.3, 0.4, b1=0.9, b2=0.999, weight_decay=0.5, warmup_steps=4)
    optimizers = make(toy[0], optimizers=None, optimizer=chosen).optimizers
    leaf = jnp.asarray([2.0, -1.0])
    student = Student(lora={}, tuned={"down": {"motion_modules_0": {"norm": leaf}, "resnets_0": {"conv": leaf}}})
    for name, params, rates in (
        ("student", student, (0.1, 0.02)),
        ("disc", {"conv": leaf}, (0.3,)),
        ("fake_score", {"conv": leaf}, (0.4,)),
    ):
        optimizer, now = optimizers[name], params
        state = optimizer.init(now)
        for _ in range(6):
            updates, state = optimizer.update(jax.tree.map(jnp.ones_like, now), state, now)
            now = optax.apply_updates(now, updates)
        for rate, values in zip(rates, jax.tree.leaves(now), strict=True):
            expected = np.array([2.0, -1.0])
            for count in range(1, 7):
                # Of constant gradients both moments, corrected, are 1.
                expected -= rate * min(1, count / 4) * (1 + 0.5 * expected)
            np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)


def test_defaults_are_the_paper_s():
    options = AVDM2Options()
    assert options.optimizer == AdamWOptions(2e-5, 4e-6, 2e-5, 2e-5, 0.9, 0.999, 0.01, 500, 0.0)
    assert (options.steps, options.student_every, options.adm_times, options.sdm_times) == (4, 2, (0, 0.5), (0.2, 0.98))


@pytest.mark.parametrize(
    ("options", "frames", "words"),
    [
        ({"sdm_frames": 5}, 3, "config.sdm_frames=5 must be at most 3, the frames of a clip."),
        ({}, 0, "config.data.num_frames=0: AnimateDiff has no number of its own; set it, for example 16."),
        (
            {"sdm_times": (0.98, 0.2)},
            16,
            r"config.sdm_times=\(0.98, 0.2\) must be two fractions of T, the lower first.",
        ),
        ({"adm_times": (0.5,)}, 16, r"config.adm_times=\(0.5,\) must be two fractions of T, the lower first."),
    ],
)
def test_what_does_not_fit_is_one_sentence(options, frames, words):
    with pytest.raises(UserError, match=words):
        AVDM2.check(AVDM2Options(**options), frames)


def test_records_are_given_their_texts(toy):
    networks, _, batch = toy
    records = {
        "latents": np.asarray(batch.latents).astype(jnp.bfloat16),
        "text_embeddings": np.asarray(batch.cond.context),
        "empty_text_embeddings": np.asarray(batch.cond.negative),
    }
    made = make(networks).batch({}, records, KEY, ConfigDict())
    assert made.latents.dtype == jnp.float32
    np.testing.assert_array_equal(made.cond.unconditional().context, batch.cond.negative)
    np.testing.assert_array_equal(made.cond.context, batch.cond.context)


@pytest.mark.integration
def test_eight_devices_change_nothing(monkeypatch):
    """Clips, their height and parameters split; the random stop is the same everywhere, or devices would wait."""
    monkeypatch.setattr(mesh, "_MIN_SHARDED_ELEMENTS", 2**8)
    from test_avdm2 import make, started
    from toy_text import toy_text_batch, toy_text_networks

    networks, frozen = toy_text_networks()
    objective, batch = make(networks), toy_text_batch(batch=8, height=4)
    state = started(objective, frozen)
    expected, expected_metrics = jax.jit(objective.step)(state, frozen, batch, jax.random.key(3))
    new, metrics = run_on(mesh.make_mesh(2, 2, 2), objective.step, state, frozen, batch, jax.random.key(3))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(new)} == {8}
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(new))
    for name, value in expected_metrics.items():
        scale = 1.0 if name.startswith("logits") else abs(float(value))
        assert abs(float(metrics[name]) - float(value)) < 1e-4 * scale, name
    for name, player in new.players.items():
        error, change = differences(player.params, expected.players[name].params, state.players[name].params)
        assert error < 1e-5 and change < 1e-3, name
