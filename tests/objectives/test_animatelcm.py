"""AnimateLCM's step against consistency distillation written out plainly, and its two phases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_stage2 as plain
import pytest
import tiny
from conftest import flat, quick_jit
from students import (
    SGD,
    assert_about_the_same_step,
    differences,
    ema_of,
    nonzero_leaves,
    student_of,
    toy_networks_and_frozen,
    trained_state,
)

from osv_jax.errors import UserError
from osv_jax.objectives import consistency
from osv_jax.objectives.animatelcm import AnimateLCM, AnimateLCMOptions
from osv_jax.objectives.osv_stage2 import Stage2
from osv_jax.objectives.players import Student, start

OPTIONS = {"trainable": ("lora", "temporal_transformer"), "phases": (), "num_levels": 40}
# Relative error of gradients.
GRADIENT = 1e-4
FIRST, SECOND = "spatial_transformer", "temporal_transformer"


@pytest.fixture(scope="module")
def toy():
    networks, frozen = toy_networks_and_frozen()
    state = trained_state(networks, frozen)
    return networks, frozen, tiny.tiny_batch(), state.replace(players={"student": state.players["student"]})


@functools.cache
def program(networks, grad_accum=1):
    options = AnimateLCMOptions(grad_accum=grad_accum, **OPTIONS)
    return jax.jit(AnimateLCM(networks, options, {"student": SGD["student"]}).step)


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_step_is_one_guided_step_of_the_teacher_and_the_emas_prediction(toy, grad_accum):
    networks, frozen, batch, state = toy
    objective = AnimateLCM(networks, AnimateLCMOptions(grad_accum=grad_accum, **OPTIONS), {"student": SGD["student"]})
    key = jax.random.key(3)
    new, metrics = program(networks, grad_accum)(state, frozen, batch, key)

    draws = quick_jit(consistency.draw, static_argnums=2)(key, batch, objective.options)
    guidance = np.tile(np.linspace(1, 3, batch.latents.shape[1]), (2, 1)).astype(np.float32)
    arguments = (plain.compiled_denoiser(networks), state, frozen, batch, draws["index"], draws["noise"], guidance)
    x, sigma, target, weight = plain.example(*arguments, num_levels=40, steps=1)

    def loss(student):
        prediction = plain.denoiser(networks)(plain.variables(frozen["unet"], student), x, sigma, batch.cond)
        distance = (jnp.sqrt((prediction - target) ** 2 + 1e-6) - 1e-3).mean(axis=(1, 2, 3, 4))
        return jnp.mean(jnp.asarray(weight, jnp.float32) * distance)

    value, gradient = quick_jit(jax.value_and_grad(loss))(student_of(state))
    assert metrics["loss_huber"] == pytest.approx(float(value), rel=1e-5)
    assert metrics["grad_norm/student"] == pytest.approx(np.linalg.norm(flat(gradient)), rel=GRADIENT)
    student = jax.tree.map(lambda p, g: p - 0.5 * g, student_of(state), gradient)
    ema = jax.tree.map(lambda old, new: 0.95 * old + 0.05 * new, ema_of(state), student)
    for actual, expected, before in (
        (student_of(new), student, student_of(state)),
        (ema_of(new), ema, ema_of(state)),
    ):
        error, change = differences(actual, expected, before)
        assert error < 1e-5 and change < GRADIENT
    assert set(new.players) == {"student"} and new.step == state.step + 1


@pytest.mark.integration
def test_half_precision_step_is_that_of_float32_about(toy):
    networks, frozen = toy_networks_and_frozen(jnp.bfloat16)
    key, (*_, batch, state) = jax.random.key(3), toy
    half = program(networks)(state, frozen, batch, key)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), frozen)
    assert_about_the_same_step(state, half, program(toy[0])(state, wide, batch, key))


class ApartAnimateLCM(AnimateLCM):
    """The teacher's parameters, which are the student's base too, as something of their own."""

    def backbone(self, frozen, student, cond):
        return super().backbone({"unet": frozen["teacher"]} if student is None else frozen, student, cond)


@pytest.mark.integration
def test_no_gradient_reaches_teacher_and_ema(toy):
    networks, frozen, batch, state = toy
    objective = ApartAnimateLCM(networks, AnimateLCMOptions(**OPTIONS), {"student": SGD["student"]})
    player = state.players["student"]

    def loss(inputs):
        others = state.replace(players={"student": player.replace(ema=inputs["ema"])})
        _, metrics = objective.step(others, frozen | {"teacher": inputs["teacher"]}, batch, jax.random.key(3))
        return metrics["loss_huber"]

    inputs = {"teacher": frozen["unet"], "ema": player.ema}
    gradients = quick_jit(jax.grad(loss))(inputs)
    assert nonzero_leaves(gradients) == []
    moved = jax.tree.map(lambda leaf: 1.1 * leaf, inputs)
    assert abs(loss(moved) - loss(inputs)) > 1e-4


def test_groups_learn_one_after_the_other_each_with_a_rate_and_moments_of_its_own():
    options = AnimateLCMOptions(phases=((0, FIRST, 0.1), (3, SECOND, 0.01)))
    objective = AnimateLCM(None, options)
    leaves = {FIRST: "transformer_blocks_0", SECOND: "temporal_transformer_blocks_0"}
    student = Student(lora={}, tuned={name: {"ff": jnp.zeros(2)} for name in leaves.values()})
    student = Student(lora={}, tuned={"attentions_0": student.tuned})
    player = start(student, objective.optimizers["student"])
    moves = []
    for step in range(6):
        # While spatial layers learn, the others' gradient is so large that moments which saw it would stop them.
        gradient = jax.tree.map(lambda leaf, step=step: jnp.full_like(leaf, 1e6 if step < 3 else -1.0), player.params)
        new = player.update(gradient, objective.optimizers["student"])
        moves.append(jax.tree.map(lambda a, b: float((b - a)[0]), player.params, new.params).tuned["attentions_0"])
        player = new
    for step, move in enumerate(moves):
        spatial, temporal = (move[leaves[name]]["ff"] for name in (FIRST, SECOND))
        # Adam's first steps are its rate against the gradient's sign.
        assert spatial == (pytest.approx(-0.1, rel=1e-3) if step < 3 else 0.0)
        assert temporal == (pytest.approx(0.01, rel=1e-3) if step >= 3 else 0.0)


@pytest.mark.parametrize(
    "phases",
    [
        ((1, FIRST, 0.1), (3, SECOND, 0.1)),
        ((0, FIRST, 0.1), (0, SECOND, 0.1)),
        ((0, FIRST, 0.1), (3, FIRST, 0.1)),
        ((0, FIRST, 0.1),),
        ((0, FIRST, 0.1), (3, "lora", 0.1)),
        ((0, FIRST, -0.1), (3, SECOND, 0.1)),
    ],
)
def test_phases_that_leave_a_group_without_a_time_are_refused(phases):
    with pytest.raises(UserError, match=r"config\.phases=.* must be \(first step, group, learning rate\) triples"):
        AnimateLCMOptions(phases=phases)


@pytest.mark.parametrize("objective", [AnimateLCM, Stage2])
def test_a_student_that_never_starts_where_samplers_do_is_told_so(toy, objective):
    def warnings(**chosen):
        return objective(toy[0], objective.Options(**chosen), {}).warnings()

    assert warnings() == warnings(num_levels=25, level_weights=((9, 1.0), (25, 0.1))) == []
    (sentence,) = warnings(num_levels=25, level_weights=((9, 0.5), (17, 0.5)))
    assert "((9, 0.5), (17, 0.5)) leaves out the highest of config.num_levels=25" in sentence
