"""The step of stage 2 against OSV's Eq. 8 to 10 written out plainly, and who learns from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_stage2 as plain
import pytest
import tiny
from conftest import flat, quick_jit, relative_error
from flax.traverse_util import flatten_dict
from students import (
    GRADIENT,
    RATES,
    TRAINABLE,
    assert_about_the_same_step,
    differences,
    disc_of,
    ema_of,
    gradients_of_inputs,
    nonzero_leaves,
    one_level_networks_and_frozen,
    perturbed,
    stage2,
    student_of,
    toy_networks_and_frozen,
    trained_state,
)

from osv_jax.diffusion.edm import EDMBackbone
from osv_jax.errors import UserError
from osv_jax.models import groups
from osv_jax.models.discriminator import discriminate_pixels
from osv_jax.objectives import consistency, judges, osv_stage2
from osv_jax.objectives.options import GuidanceOptions, LoRAOptions
from osv_jax.objectives.osv_stage2 import Stage2Options
from osv_jax.training import setup


@functools.cache
def draw_and_example(networks, **options):
    """The random numbers of a step, and what the student is given and held against."""
    objective = stage2(networks, **options)
    return quick_jit(objective.draw), jax.jit(objective.example)


@functools.cache
def program(networks, **options):
    return jax.jit(stage2(networks, **options).step)


@quick_jit
def descend(tree, gradient, rate):
    return jax.tree.map(lambda x, g: x - rate * g, tree, gradient)


def begun(networks, frozen):
    """Both, a batch, and a state in which everything has moved."""
    return networks, frozen, tiny.tiny_batch(height=12, width=12), trained_state(networks, frozen)


@pytest.fixture(scope="module")
def real():
    return begun(*one_level_networks_and_frozen())


@pytest.fixture(scope="module")
def toy():
    return begun(*toy_networks_and_frozen())


@pytest.fixture(scope="module", params=["toy", pytest.param("real", marks=pytest.mark.integration)])
def each(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def step_of_each(each):
    """One step: its key, the new state, the metrics."""
    networks, frozen, batch, state = each
    key = jax.random.key(3)
    return key, *program(networks)(state, frozen, batch, key)


@pytest.mark.integration
def test_an_untrained_student_is_the_teacher(real):
    networks, frozen, batch, _ = real
    objective = stage2(networks, lora=LoRAOptions(4, 4.0), trainable=TRAINABLE)
    state = quick_jit(setup.make_init(objective))(jax.random.key(0), frozen)
    student = student_of(state)
    assert flatten_dict(student.tuned) and flatten_dict(student.lora)
    sigma = jnp.array([700.0, 0.3])
    # Not compiled: the programs would differ, and with them the last bits.
    answer = lambda variables: EDMBackbone(networks.unet_with(variables), batch.cond)(batch.latents, sigma)  # noqa: E731
    teacher = answer({"params": frozen["unet"]})
    np.testing.assert_array_equal(answer(student.variables(frozen["unet"])), teacher)
    np.testing.assert_array_equal(answer(ema_of(state).variables(frozen["unet"])), teacher)
    trained = answer(perturbed(student, 1).variables(frozen["unet"]))
    assert relative_error(trained, teacher) > 1e-3


def test_step_is_equations_8_to_10(each, step_of_each):
    networks, frozen, batch, state = each
    key, new_state, metrics = step_of_each
    draws = draw_and_example(networks)[0](key, batch)
    denoiser = plain.compiled_denoiser(networks)
    guidance = np.tile(np.linspace(1, 3, batch.latents.shape[1]), (2, 1)).astype(np.float32)
    example = plain.example(denoiser, state, frozen, batch, draws["index"], draws["noise"], guidance)

    fake = denoiser(plain.variables(frozen["unet"], student_of(state)), *example[:2], batch.cond)
    loss_disc, g_disc, spectral = plain.disc_gradient(networks, disc_of(state), frozen, example[2], fake)
    disc = {"params": descend(disc_of(state)["params"], g_disc, RATES["disc"]), "spectral": spectral}
    (gan, huber), g_student = plain.student_gradient(networks, disc, state, frozen, example, batch.cond)
    student = descend(student_of(state), g_student, RATES["student"])
    ema = quick_jit(lambda old, new: jax.tree.map(lambda x, y: 0.95 * x + 0.05 * y, old, new))(ema_of(state), student)

    expected = {
        "loss_disc": loss_disc,
        "loss_adversarial": gan,
        "loss_huber": huber,
        "loss_student": 0.1 * gan + huber,
        "grad_norm/student": np.linalg.norm(flat(g_student)),
        "grad_norm/disc": np.linalg.norm(flat(g_disc)),
    }
    for name, value in expected.items():
        print(f"{name}: {metrics[name]:.6f}, relative error {abs(metrics[name] / value - 1):.1e}")
        assert metrics[name] == pytest.approx(float(value), rel=1e-5 if name.startswith("loss") else GRADIENT)
    for name, actual, wanted, before in (
        ("student", student_of(new_state), student, student_of(state)),
        ("ema", ema_of(new_state), ema, ema_of(state)),
        ("disc", disc_of(new_state)["params"], disc["params"], disc_of(state)["params"]),
        ("spectral", disc_of(new_state)["spectral"], spectral, None),
    ):
        value, change = differences(actual, wanted, before)
        print(f"{name}: relative error {value:.1e}, of the change {change:.1e}")
        assert value <= 1e-5 and change <= GRADIENT
    assert new_state.step == state.step + 1


def test_what_is_selected_learns_and_nothing_else(each, step_of_each):
    _, frozen, _, state = each
    _, new_state, _ = step_of_each
    selected = groups.select(frozen["unet"], TRAINABLE)
    assert flatten_dict(student_of(new_state).tuned).keys() == flatten_dict(selected).keys()
    assert {groups.group_of(path) for path in flatten_dict(student_of(new_state).tuned)} == {"temporal_transformer"}
    for part, before in (("student", student_of(state)), ("ema", ema_of(state)), ("disc", disc_of(state)["params"])):
        after = {"student": student_of, "ema": ema_of, "disc": lambda state: disc_of(state)["params"]}[part](new_state)
        pairs = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
        still = [jax.tree_util.keystr(path) for (path, old), new in pairs if np.array_equal(old, new)]
        assert not still, (part, still)
    variables = flatten_dict(student_of(new_state).variables(frozen["unet"])["params"])
    base = flatten_dict(frozen["unet"])
    changed = {path for path in base if not np.array_equal(base[path], variables[path])}
    assert variables.keys() == base.keys() and changed == flatten_dict(selected).keys()


@pytest.mark.integration
def test_no_gradient_reaches_teacher_target_and_dinov2(real):
    gradients = gradients_of_inputs(*real, ("teacher", "ema", "dinov2"))
    assert len(jax.tree.leaves(gradients)) > 300
    assert nonzero_leaves(gradients) == []


def test_through_the_decoder_too_no_gradient_reaches_what_is_frozen(toy):
    gradients = gradients_of_inputs(*toy, ("teacher", "ema", "dinov2", "vae"), discriminator_input="decoded")
    assert nonzero_leaves(gradients) == []


GRIDS = [(100, 5), (17, 8), (9, 8), (40, 1)]


@pytest.mark.parametrize(
    ("num_levels", "steps", "kind"),
    [(*GRIDS[0], "linspace"), (*GRIDS[0], "constant"), *((*grid, "range") for grid in GRIDS)],
)
def test_student_input_and_target_for_every_guidance_and_grid(toy, num_levels, steps, kind):
    """At both ends of the grid: t_1 is reached, and t_N is started from."""
    networks, frozen, batch, state = toy
    options = {"num_levels": num_levels, "solver_steps": steps, "guidance": GuidanceOptions(kind, 1.5, 4.0)}
    draw, example_of = draw_and_example(networks, **options)
    draws = draw(jax.random.key(5), batch) | {"index": jnp.array([0, num_levels - steps - 1])}
    example = example_of(state, frozen, batch, draws)
    np.testing.assert_allclose(example.sigma, plain.sigmas([steps, num_levels - 1], num_levels), rtol=1e-6)

    uniform, frames = np.asarray(draws["uniform"]), batch.latents.shape[1]
    guidance = {
        "linspace": np.tile(np.linspace(1.5, 4.0, frames), (2, 1)),
        "constant": np.full((2, frames), 4.0),
        "range": np.repeat((1.5 + 2.5 * uniform)[:, None], frames, axis=1),
    }[kind]
    assert kind != "range" or abs(uniform[0] - uniform[1]) > 0.01
    guidance = guidance.astype(np.float32)
    arguments = (state, frozen, batch, draws["index"], draws["noise"], guidance, num_levels, steps)
    x, _, target, weight = plain.example(plain.compiled_denoiser(networks), *arguments)
    assert relative_error(example.x, x) <= 1e-6
    for clip in range(2):
        assert relative_error(example.target[clip], target[clip]) <= 1e-5
    np.testing.assert_allclose(example.weight, weight, rtol=1e-5)
    assert example.cond is not None and jax.tree.all(jax.tree.map(np.array_equal, example.cond, batch.cond))


def test_index_is_uniform_from_1_to_n_minus_m(toy):
    draw, _ = draw_and_example(toy[0])
    clips = 95 * 400
    batch = tiny.tiny_batch(1).replace(latents=jnp.zeros((clips, 1, 1, 1, 1)))
    draws = draw(jax.random.key(0), batch)
    counts = np.bincount(draws["index"], minlength=95)
    # Five standard deviations of 20.
    assert len(counts) == 95 and np.all(np.abs(counts - 400) < 100), counts
    # The numbers of one clip tell nothing about each other.
    columns = np.stack([draws["index"], draws["noise"].reshape(-1), draws["uniform"]])
    assert np.abs(np.corrcoef(columns)[np.triu_indices(3, 1)]).max() < 0.03
    for num_levels, steps in GRIDS[1:]:
        other = draw_and_example(toy[0], num_levels=num_levels, solver_steps=steps)[0](jax.random.key(0), batch)
        assert np.unique(other["index"]).tolist() == list(range(num_levels - steps))


def test_levels_are_drawn_as_often_as_their_weights_say(toy):
    """n of Eq. 8 to 10: the student starts from t_{n+m}, here from the 9th level of 17 and from the last."""
    clips = 10_000
    batch = tiny.tiny_batch(1).replace(latents=jnp.zeros((clips, 1, 1, 1, 1)))
    options = {"num_levels": 17, "solver_steps": 8}
    draw, _ = draw_and_example(toy[0], **options, level_weights=((17, 1.0), (9, 3.0)))
    draws = draw(jax.random.key(0), batch)
    counts = np.bincount(draws["index"], minlength=9)
    # Five standard deviations of 43.
    assert counts[0] + counts[8] == clips and abs(counts[0] - 7500) < 216, counts
    uniform = draw_and_example(toy[0], **options)[0](jax.random.key(0), batch)
    first, *_ = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_array_equal(uniform["index"], jax.random.randint(first, (clips,), 0, 9))
    np.testing.assert_array_equal(draws["noise"], uniform["noise"])


def test_weight_of_the_distance():
    high, low = np.array([700.0, 0.01], np.float32), np.array([500.0, 0.002], np.float32)
    np.testing.assert_allclose(consistency.distance_weight(high, low, 0.1), [200.0**-0.1, 0.008**-0.1], rtol=1e-5)
    np.testing.assert_allclose(consistency.distance_weight(high, low, 1.0), [1 / 200, 125], rtol=1e-5)
    np.testing.assert_array_equal(consistency.distance_weight(high, low, 0.0), [1, 1])


@pytest.fixture(scope="module")
def toy_step(toy):
    """`(**options) -> (new state, metrics)` of one step with the same key, compiled and done once for each."""
    networks, frozen, batch, state = toy

    @functools.cache
    def run(**options):
        return program(networks, **options)(state, frozen, batch, jax.random.key(3))

    return run


@pytest.mark.integration  # A program of its own, with a VAE in it.
def test_decoded_clips_are_judged_instead_of_latents(toy, toy_step):
    networks, frozen, batch, state = toy
    latents, decoded = toy_step(), toy_step(discriminator_input="decoded")
    assert np.isfinite(flat(decoded)).all()
    moved = jax.tree.map(lambda new, old: new - old, student_of(decoded[0]), student_of(state))
    assert len(nonzero_leaves(moved)) == len(jax.tree.leaves(moved))
    # The teacher's part is the same, the discriminator's another.
    assert decoded[1]["loss_huber"] == pytest.approx(float(latents[1]["loss_huber"]), rel=1e-6)
    assert abs(decoded[1]["loss_disc"] - latents[1]["loss_disc"]) > 1e-4
    # The upsampler has nothing to do, and does not learn.
    before, after = disc_of(state)["params"]["upsampler"], disc_of(decoded[0])["params"]["upsampler"]
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    assert not np.array_equal(before["kernel"], disc_of(latents[0])["params"]["upsampler"]["kernel"])

    draw, example_of = draw_and_example(networks)
    draws = draw(jax.random.key(3), batch)

    @jax.jit
    def logits_of_target(state, frozen, batch):
        target = example_of(state, frozen, batch, draws).target
        pixels = networks.codec.decode_video(frozen["vae"], target) / 2 + 0.5
        assert pixels.shape == (*target.shape[:2], 2 * target.shape[2], 2 * target.shape[3], 3)
        arguments = (networks.discriminator, networks.dinov2, disc_of(state), frozen["dinov2"], pixels)
        return discriminate_pixels(*arguments, update_stats=True)[0]

    logits = logits_of_target(state, frozen, batch)
    for kind in ("spatial", "temporal"):
        # Not relative to the mean, which is near zero by chance: rounding is in proportion to the logits themselves.
        bound = 1e-4 * float(logits[kind].std())
        assert decoded[1][f"logits_real/{kind}"] == pytest.approx(float(logits[kind].mean()), abs=bound)


@pytest.mark.integration
def test_without_the_adversarial_loss(toy, toy_step):
    """Table 2: the student follows the target alone, whatever the discriminator learns beside it."""
    networks, frozen, batch, state = toy
    new_state, metrics = toy_step(adversarial_weight=0.0)
    assert metrics["loss_student"] == metrics["loss_huber"] > 0 and metrics["loss_adversarial"] > 0
    draw, example_of = draw_and_example(networks)
    example = example_of(state, frozen, batch, draw(jax.random.key(3), batch))
    fields = (example.x, example.sigma, example.target, example.weight)
    terms, gradient = plain.student_gradient(networks, disc_of(state), state, frozen, fields, batch.cond, gan=0.0)
    assert metrics["loss_huber"] == pytest.approx(float(terms[1]), rel=1e-5)
    expected = descend(student_of(state), gradient, RATES["student"])
    assert max(differences(student_of(new_state), expected, student_of(state))) <= GRADIENT
    assert max(differences(student_of(new_state), student_of(toy_step()[0]), student_of(state))) > 1e-2


@pytest.mark.integration
def test_the_discriminator_may_see_a_part_of_each_clip(toy, toy_step):
    """The same frames of the target and of the answer; the distance stays that of whole clips."""
    networks, frozen, batch, state = toy
    new_state, metrics = toy_step(discriminator_frames=2)
    key, frame_key = jax.random.split(jax.random.key(3))
    first = np.asarray(judges.draw_first_frame(frame_key, 2, 3, 2))

    def seen(clips):
        return jnp.stack([clip[start : start + 2] for clip, start in zip(clips, first, strict=True)])

    draw, example_of = draw_and_example(networks)
    example = example_of(state, frozen, batch, draw(key, batch))
    denoiser = plain.compiled_denoiser(networks)
    student = plain.variables(frozen["unet"], student_of(state))
    fake = denoiser(student, example.x, example.sigma, batch.cond)
    value, g_disc, spectral = plain.disc_gradient(networks, disc_of(state), frozen, seen(example.target), seen(fake))
    assert metrics["loss_disc"] == pytest.approx(float(value), rel=1e-5)
    disc = {"params": descend(disc_of(state)["params"], g_disc, RATES["disc"]), "spectral": spectral}
    assert max(differences(disc_of(new_state)["params"], disc["params"], disc_of(state)["params"])) <= GRADIENT

    fields = (example.x, example.sigma, example.target, example.weight)
    terms, gradient = plain.student_gradient(networks, disc, state, frozen, fields, batch.cond, seen=seen)
    assert metrics["loss_student"] == pytest.approx(float(0.1 * terms[0] + terms[1]), rel=1e-5)
    expected = descend(student_of(state), gradient, RATES["student"])
    assert max(differences(student_of(new_state), expected, student_of(state))) <= GRADIENT


def test_frames_that_are_seen_begin_anywhere(rng):
    first = np.asarray(judges.draw_first_frame(jax.random.key(0), 6000, 14, 9))
    counts = np.bincount(first)
    # Five standard deviations of 29.
    assert len(counts) == 6 and np.all(np.abs(counts - 1000) < 145), counts
    clips = rng.standard_normal((3, 5, 2, 1, 4), np.float32)
    frames = judges.frames_from(clips, jnp.array([2, 0, 1]), 3)
    np.testing.assert_array_equal(frames, np.stack([clips[0, 2:], clips[1, :3], clips[2, 1:4]]))
    np.testing.assert_array_equal(judges.frames_from(clips, jnp.zeros(3, int), 5), clips)


@pytest.mark.integration
def test_accumulated_gradients_are_the_batchs(toy, toy_step):
    networks, frozen, batch, state = toy
    new_state, metrics = toy_step(grad_accum=2)
    whole_state, whole = toy_step()
    # The discriminator's update is the same; the student's is against the discriminator from before it.
    assert max(differences(disc_of(new_state), disc_of(whole_state), disc_of(state))) <= GRADIENT
    assert metrics["loss_disc"] == pytest.approx(float(whole["loss_disc"]), rel=1e-5)
    draw, example_of = draw_and_example(networks)
    example = example_of(state, frozen, batch, draw(jax.random.key(3), batch))
    fields = (example.x, example.sigma, example.target, example.weight)
    terms, gradient = plain.student_gradient(networks, disc_of(state), state, frozen, fields, batch.cond)
    assert metrics["loss_student"] == pytest.approx(float(0.1 * terms[0] + terms[1]), rel=1e-5)
    expected = descend(student_of(state), gradient, RATES["student"])
    assert max(differences(student_of(new_state), expected, student_of(state))) <= GRADIENT


@pytest.mark.integration
def test_players_that_accumulate_in_turn_make_the_step_of_the_whole_batch(toy, toy_step):
    """The student's gradient is taken through the new discriminator, as it is without parts."""
    *_, state = toy
    new_state, metrics = toy_step(grad_accum=2, accumulate="in_turn")
    whole_state, whole = toy_step()
    together, _ = toy_step(grad_accum=2)
    for part in (student_of, ema_of, disc_of):
        assert max(differences(part(new_state), part(whole_state), part(state))) <= GRADIENT
    assert max(differences(student_of(together), student_of(whole_state), student_of(state))) > 10 * GRADIENT
    assert metrics.keys() == whole.keys()
    for name in ("loss_disc", "loss_adversarial", "loss_huber", "loss_student"):
        assert metrics[name] == pytest.approx(float(whole[name]), rel=1e-4)


@pytest.mark.integration
def test_half_precision_step_is_that_of_float32_about(toy):
    """The same networks, with weights that bfloat16 holds, computing in either."""
    networks, frozen = toy_networks_and_frozen(jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}
    state, batch, key = trained_state(networks, frozen), toy[2], jax.random.key(3)
    half = program(networks)(state, frozen, batch, key)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), frozen)
    assert_about_the_same_step(state, half, program(toy[0])(state, wide, batch, key))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver_steps": 100}, r"config.solver_steps=100 must lie in 1 \.\. 99"),
        ({"num_levels": 5}, r"config.solver_steps=5 must lie in 1 \.\. 4"),
        ({"level_weights": ((5, 1.0),)}, r"\(\(5, 1.0\),\): the levels that .* are 6 to 100, and 5 is none"),
        ({"level_weights": ((101, 1.0),)}, "are 6 to 100, and 101 is none"),
        ({"level_weights": ((9, 1.0), (9, 2.0))}, "that is there once, each weight a finite number above 0"),
        ({"level_weights": ((9, 0.0),)}, "each weight a finite number above 0"),
        ({"discriminator_frames": 15}, r"config.discriminator_frames=15 must lie in 1 \.\. 14"),
        ({"discriminator_blocks": ()}, r"config.discriminator_blocks=\(\) must name one block"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        osv_stage2.Stage2.check(Stage2Options(**options), num_frames=14)
