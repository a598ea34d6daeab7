"""AnimateDiff's training against its equation written out plainly, and what it trains and leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import quick_jit, relative_error
from flax.traverse_util import flatten_dict
from students import differences
from test_avdm2 import equation_1
from toy_text import started, toy_text_batch, toy_text_networks

from osv_jax.diffusion.ddpm import animatediff_schedule, ddim, ddim_times, stable_diffusion_schedule
from osv_jax.errors import UserError
from osv_jax.inference.trained import Trained
from osv_jax.objectives import animatediff
from osv_jax.objectives.animatediff import AnimateDiff, AnimateDiffOptions
from osv_jax.objectives.players import Student

KEY = jax.random.key(4)
RATE = 0.5
PARTS = {"unet": "unet_2d", "motion": "motion_adapter"}
draw = quick_jit(animatediff.draw, static_argnums=2)


@pytest.fixture(scope="module")
def toy():
    networks, frozen = toy_text_networks()
    return networks, frozen, toy_text_batch(batch=2, frames=3)


def make(networks, **options):
    return AnimateDiff(networks, AnimateDiffOptions(**options), {"student": optax.sgd(RATE)})


def plain_loss(networks, params, part, batch, draws, dropout):
    """Image after image, or clip after clip."""
    texts, total = batch.cond, []
    for clip in range(len(batch.latents)):
        for i in range(draws["t"].shape[1]):
            t = int(draws["t"][clip, i])
            x = batch.latents[clip][draws["frames"][clip][i : i + 1]] if part == "unet" else batch.latents[clip]
            alpha, sigma = (level[0] for level in equation_1("video" if part == "motion" else "image", [t]))
            noise = draws["noise"][clip, i]
            text = texts.negative if draws["uniform"][clip, i] < dropout else texts.context
            network = networks.unet if part == "motion" else networks.unet_2d
            noisy, time = (alpha * x + sigma * noise)[None], jnp.asarray([t], jnp.float32)
            predicted = network.apply({"params": params}, noisy, time, text[clip : clip + 1])
            total.append(jnp.square(predicted[0] - noise).mean())
    return sum(total) / len(total)


@pytest.mark.integration
@pytest.mark.parametrize("part", ["unet", "motion"])
def test_step_is_equation_2_of_frames_or_of_clips(toy, part):
    networks, frozen, batch = toy
    options = {"part": part, "frames": 2, "dropout": 0.5, "ema_decay": 0.9}
    objective = make(networks, **options)
    state = started(objective, frozen)
    new, metrics = jax.jit(objective.step)(state, frozen, batch, KEY)
    draws = jax.tree.map(np.asarray, draw(KEY, batch, objective.options))
    assert 0 < (draws["uniform"] < 0.5).sum() < draws["uniform"].size
    rest = frozen["unet_2d"] if part == "motion" else {}
    before = state.players["student"].params.tuned

    def plainly(tuned):
        return plain_loss(networks, {**rest, **tuned}, part, batch, draws, 0.5)

    loss, gradient = quick_jit(jax.value_and_grad(plainly))(before)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    after = jax.tree.map(lambda x, g: x - RATE * g, before, gradient)
    error, change = differences(new.players["student"].params.tuned, after, before)
    assert error < 1e-5 and change < 1e-4
    ema = jax.tree.map(lambda x, y: 0.9 * x + 0.1 * y, state.players["student"].ema.tuned, after)
    assert differences(new.players["student"].ema.tuned, ema, before)[0] < 1e-5
    parts, _ = jax.jit(make(networks, **options, grad_accum=2).step)(state, frozen, batch, KEY)
    assert differences(parts.players["student"].params, new.players["student"].params, before)[0] < 1e-5


@pytest.mark.parametrize("part", PARTS)
def test_the_other_part_is_frozen(toy, part):
    networks, frozen, batch = toy
    objective = make(networks, part=part, dropout=0.0)
    player = objective.init(KEY, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen))["student"]
    learns, given = flatten_dict(player.params.tuned), flatten_dict(frozen[PARTS[part]])
    assert learns.keys() == given.keys() and {leaf.dtype for leaf in learns.values()} == {jnp.dtype("float32")}
    state = started(objective, frozen)

    draws = draw(KEY, batch, objective.options)

    def loss(frozen):
        return animatediff.mean_loss(state.players["student"].params, objective, frozen, batch, draws)[0]

    # What learns takes the place of its frozen self, and images are given no motion modules.
    reached = {path[0] for path, leaf in flatten_dict(quick_jit(jax.grad(loss))(frozen)).items() if np.any(leaf)}
    assert reached == ({"unet_2d"} if part == "motion" else set())
    table = objective.parameter_table(frozen, player.params)
    other = "motion" if part == "unet" else "unet"
    assert f"{other:<9} 0.000 M" in table


def test_captions_are_dropped_as_often_as_said(toy):
    _, _, batch = toy
    uniform = jnp.asarray([[0.05, 0.5], [0.1, 0.09]])
    dropped = animatediff.drop_texts(batch.cond, uniform, 0.1)
    for clip in range(2):
        for i in range(2):
            expected = batch.cond.negative if uniform[clip, i] < 0.1 else batch.cond.context
            np.testing.assert_array_equal(dropped.context[2 * clip + i], expected[clip])
    assert AnimateDiffOptions().dropout == 0.1 and AnimateDiffOptions().part == "motion"
    draws = draw(KEY, toy_text_batch(batch=2000, frames=2, height=1, width=1), AnimateDiffOptions())
    assert abs(float((draws["uniform"] < 0.1).mean()) - 0.1) < 0.02
    assert int(draws["t"].min()) < 5 and int(draws["t"].max()) in range(995, 1000)


@pytest.mark.parametrize("part", PARTS)
def test_pictures_are_ddim_on_the_part_s_own_schedule_with_guidance(toy, part):
    networks, frozen, batch = toy
    objective = make(networks, part=part)
    tuned = frozen[PARTS[part]]
    backbone = objective.backbone(frozen, Student(lora={}, tuned=tuned), batch.cond)
    teacher = objective.backbone(frozen, None, batch.cond)
    x, t = batch.latents, jnp.full(2, 500)
    np.testing.assert_array_equal(backbone(x, t), teacher(x, t))
    schedule = stable_diffusion_schedule() if part == "unet" else animatediff_schedule()

    def guided(x, t):
        empty = objective.backbone(frozen, None, batch.cond.unconditional())(x, t)
        return empty + 7.5 * (teacher(x, t) - empty)

    made = objective.teacher_sample(objective.preview_denoiser(backbone, 3), x, 2)
    assert relative_error(made, ddim(guided, x, ddim_times(2), schedule)) < 1e-4
    assert objective.preview_label.endswith("25 DDIM steps")


def test_what_was_trained_is_sampled_as_a_teacher():
    none = Student(lora={}, tuned={})
    kinds = [Trained(none, 1, {"objective": name}).is_teacher for name in ("animatediff", "avdm2", "unknown")]
    assert kinds == [True, False, False] and not Trained.none().is_teacher


@pytest.mark.parametrize(
    ("options", "frames", "words"),
    [
        ({"frames": 4}, 3, "config.frames=4 must be at most 3, the frames of a clip."),
        ({}, 0, "config.data.num_frames=0: AnimateDiff has no number of its own"),
    ],
)
def test_what_does_not_fit_is_one_sentence(options, frames, words):
    with pytest.raises(UserError, match=words):
        AnimateDiff.check(AnimateDiffOptions(**options), frames)
