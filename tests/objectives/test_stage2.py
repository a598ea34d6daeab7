"""The step of stage 2 against OSV's Eq. 8 to 10 written out plainly, and who learns from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_stage2 as plain
import pytest
import tiny
from conftest import flat, relative_error
from flax.traverse_util import flatten_dict
from students import (
    GRADIENT,
    RATES,
    SGD,
    TRAINABLE,
    differences,
    one_level_networks_and_frozen,
    perturbed,
    toy_networks_and_frozen,
    trained_state,
)

from osv_jax.diffusion.edm import denoise
from osv_jax.models import groups
from osv_jax.models.discriminator import discriminate_pixels
from osv_jax.objectives import adversarial, osv_stage2
from osv_jax.objectives.adversarial import AdversarialOptions
from osv_jax.objectives.osv_stage2 import Stage2Options
from osv_jax.objectives.players import Student, init_state, update_ema


@functools.cache
def draw_and_pose(networks, options=AdversarialOptions(), own=Stage2Options()):  # noqa: B008
    """What stage 2 gives to the step that the stages share."""
    given = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adversarial, "make_step", lambda *args: given.extend(args) or print)
        osv_stage2.make_step(networks, *SGD, options, own)
    return [jax.jit(function) for function in given[-2:]]


@functools.cache
def program(networks, options=AdversarialOptions(), own=Stage2Options()):  # noqa: B008
    return jax.jit(osv_stage2.make_step(networks, *SGD, options, own))


@jax.jit
def descend(tree, gradient, rate):
    return jax.tree.map(lambda x, g: x - rate * g, tree, gradient)


# ---- The real UNet, one step.


@pytest.fixture(scope="module")
def real():
    networks, frozen = one_level_networks_and_frozen()
    return networks, frozen, tiny.tiny_batch(), trained_state(networks, frozen)


@pytest.fixture(scope="module")
def real_step(real):
    """One step: its key, the new state, the metrics."""
    networks, frozen, batch, state = real
    key = jax.random.key(3)
    return key, *program(networks)(state, frozen, batch, key)


def test_an_untrained_student_is_the_teacher(real):
    networks, frozen, batch, _ = real
    state = jax.jit(lambda key, unet: init_state(key, networks, unet, *SGD, 4, "all", TRAINABLE))(
        jax.random.key(0), frozen["unet"]
    )
    assert flatten_dict(state.student.tuned) and flatten_dict(state.student.lora)
    sigma = jnp.array([700.0, 0.3])
    # Not compiled: the programs would differ, and with them the last bits.
    answer = lambda variables: denoise(networks.unet_with(variables), batch.latents, sigma, batch.cond)  # noqa: E731
    teacher = answer({"params": frozen["unet"]})
    np.testing.assert_array_equal(answer(state.student.variables(frozen["unet"])), teacher)
    np.testing.assert_array_equal(answer(state.ema.variables(frozen["unet"])), teacher)
    trained = answer(perturbed(state.student, 1).variables(frozen["unet"]))
    assert relative_error(trained, teacher) > 1e-3


def test_step_is_equations_8_to_10(real, real_step):
    networks, frozen, batch, state = real
    key, new_state, metrics = real_step
    draws = draw_and_pose(networks)[0](key, batch)
    denoiser = plain.denoiser(networks)
    guidance = np.tile(np.linspace(1, 3, batch.latents.shape[1]), (2, 1)).astype(np.float32)
    question = plain.question(denoiser, state, frozen, batch, draws["index"], draws["noise"], guidance)

    fake = denoiser(plain.variables(frozen["unet"], state.student), *question[:2], batch.cond)
    loss_disc, g_disc, spectral = plain.disc_gradient(networks, state.disc, frozen, question[2], fake)
    disc = {"params": descend(state.disc["params"], g_disc, RATES["disc"]), "spectral": spectral}
    (gan, huber), g_student = plain.student_gradient(networks, disc, state, frozen, question, batch.cond)
    student = descend(state.student, g_student, RATES["student"])
    ema = jax.jit(lambda old, new: jax.tree.map(lambda x, y: 0.95 * x + 0.05 * y, old, new))(state.ema, student)

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
        ("student", new_state.student, student, state.student),
        ("ema", new_state.ema, ema, state.ema),
        ("disc", new_state.disc["params"], disc["params"], state.disc["params"]),
        ("spectral", new_state.disc["spectral"], spectral, None),
    ):
        value, change = differences(actual, wanted, before)
        print(f"{name}: relative error {value:.1e}, of the change {change:.1e}")
        assert value <= 1e-5 and change <= GRADIENT
    assert new_state.step == state.step + 1


def test_what_is_selected_learns_and_nothing_else(real, real_step):
    _, frozen, _, state = real
    _, new_state, _ = real_step
    selected = groups.select(frozen["unet"], TRAINABLE)
    assert flatten_dict(new_state.student.tuned).keys() == flatten_dict(selected).keys()
    assert {groups.group_of(path) for path in flatten_dict(new_state.student.tuned)} == {"temporal_transformer"}
    for part, before in (("student", state.student), ("ema", state.ema), ("disc", state.disc["params"])):
        after = new_state.disc["params"] if part == "disc" else getattr(new_state, part)
        pairs = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
        still = [jax.tree_util.keystr(path) for (path, old), new in pairs if np.array_equal(old, new)]
        assert not still, (part, still)
    variables = flatten_dict(new_state.student.variables(frozen["unet"])["params"])
    base = flatten_dict(frozen["unet"])
    changed = {path for path in base if not np.array_equal(base[path], variables[path])}
    assert variables.keys() == base.keys() and changed == flatten_dict(selected).keys()


def gradients_of_inputs(networks, frozen, batch, state, options, wanted):
    """d(loss_student + loss_disc) with respect to each input by itself: the teacher's parameters are the student's
    base too, and are told apart here."""
    draw, pose = draw_and_pose(networks, options)

    def total(inputs, key):
        def pose_with(state, frozen, batch, draws):
            return pose(state.replace(ema=inputs["ema"]), frozen | {"unet": inputs["teacher"]}, batch, draws)

        step = adversarial.make_step(networks, *SGD, options, draw, pose_with)
        others = frozen | {"dinov2": inputs["dinov2"], "vae": inputs["vae"]}
        _, metrics = step(state.replace(student=inputs["student"]), others, batch, key)
        return metrics["loss_student"] + metrics["loss_disc"]

    inputs = {"teacher": frozen["unet"], "dinov2": frozen["dinov2"], "vae": frozen["vae"]}
    inputs |= {"ema": state.ema, "student": state.student}

    @jax.jit
    def run(inputs, key):
        of = {name: inputs[name] for name in wanted}
        return jax.grad(lambda of: total(inputs | of, key))(of)

    return run(inputs, jax.random.key(3))


def nonzero_leaves(tree):
    return [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(tree) if np.any(leaf)]


def test_no_gradient_reaches_teacher_target_and_dinov2(real):
    gradients = gradients_of_inputs(*real, AdversarialOptions(), ("teacher", "ema", "dinov2"))
    assert len(jax.tree.leaves(gradients)) > 300
    assert nonzero_leaves(gradients) == []


# ---- A toy UNet, for everything else.


@pytest.fixture(scope="module")
def toy():
    networks, frozen = toy_networks_and_frozen()
    return networks, frozen, tiny.tiny_batch(), trained_state(networks, frozen)


def test_through_the_decoder_too_only_the_student_gets_a_gradient(toy):
    wanted = ("teacher", "ema", "dinov2", "vae", "student")
    gradients = gradients_of_inputs(*toy, AdversarialOptions(decode=True), wanted)
    assert len(nonzero_leaves(gradients.pop("student"))) == len(jax.tree.leaves(toy[-1].student))
    assert nonzero_leaves(gradients) == []


GRIDS = [(100, 5), (17, 8), (9, 8), (40, 1)]


@pytest.mark.parametrize(
    ("num_levels", "steps", "kind"),
    [(*GRIDS[0], "linspace"), (*GRIDS[0], "constant"), *((*grid, "range") for grid in GRIDS)],
)
def test_question_and_target_for_every_guidance_and_grid(toy, num_levels, steps, kind):
    """At both ends of the grid: t_1 is reached, and t_N is started from."""
    networks, frozen, batch, state = toy
    own = Stage2Options(num_levels, steps, kind, guidance_min=1.5, guidance_max=4.0, weight_exponent=0.1)
    draw, pose = draw_and_pose(networks, own=own)
    draws = draw(jax.random.key(5), batch) | {"index": jnp.array([0, num_levels - steps - 1])}
    example = pose(state, frozen, batch, draws)
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
    x, _, target, weight = plain.question(plain.denoiser(networks), *arguments)
    assert relative_error(example.x, x) <= 1e-6
    for clip in range(2):
        assert relative_error(example.target[clip], target[clip]) <= 1e-5
    np.testing.assert_allclose(example.weight, weight, rtol=1e-5)
    assert example.cond is not None and jax.tree.all(jax.tree.map(np.array_equal, example.cond, batch.cond))


def test_index_is_uniform_from_1_to_n_minus_m(toy):
    draw, _ = draw_and_pose(toy[0])
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
        other = draw_and_pose(toy[0], own=Stage2Options(num_levels, steps))[0](jax.random.key(0), batch)
        assert np.unique(other["index"]).tolist() == list(range(num_levels - steps))


def test_weight_of_the_distance():
    high, low = np.array([700.0, 0.01], np.float32), np.array([500.0, 0.002], np.float32)
    np.testing.assert_allclose(osv_stage2.distance_weight(high, low, 0.1), [200.0**-0.1, 0.008**-0.1], rtol=1e-5)
    np.testing.assert_allclose(osv_stage2.distance_weight(high, low, 1.0), [1 / 200, 125], rtol=1e-5)
    np.testing.assert_array_equal(osv_stage2.distance_weight(high, low, 0.0), [1, 1])


@pytest.fixture(scope="module")
def toy_step(toy):
    """`(options, stage 2's own) -> (new state, metrics)` of one step with the same key, compiled once for each."""
    networks, frozen, batch, state = toy
    done = {}

    def run(options=AdversarialOptions(), own=Stage2Options()):  # noqa: B008
        if (options, own) not in done:
            done[options, own] = program(networks, options, own)(state, frozen, batch, jax.random.key(3))
        return done[options, own]

    return run


def test_decoded_clips_are_judged_instead_of_latents(toy, toy_step):
    networks, frozen, batch, state = toy
    latents, decoded = toy_step(), toy_step(AdversarialOptions(decode=True))
    assert np.isfinite(flat(decoded)).all()
    # The teacher's part is the same, the discriminator's another.
    assert decoded[1]["loss_huber"] == pytest.approx(float(latents[1]["loss_huber"]), rel=1e-6)
    assert abs(decoded[1]["loss_disc"] - latents[1]["loss_disc"]) > 1e-4
    # The upsampler has nothing to do, and does not learn.
    before, after = state.disc["params"]["upsampler"], decoded[0].disc["params"]["upsampler"]
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    assert not np.array_equal(before["kernel"], latents[0].disc["params"]["upsampler"]["kernel"])

    draw, pose = draw_and_pose(networks)

    @jax.jit
    def logits_of_target(state, frozen, batch):
        target = pose(state, frozen, batch, draw(jax.random.key(3), batch)).target
        pixels = networks.decode_video(frozen["vae"], target) / 2 + 0.5
        assert pixels.shape == (*target.shape[:2], 2 * target.shape[2], 2 * target.shape[3], 3)
        arguments = (networks.discriminator, networks.dinov2, state.disc, frozen["dinov2"], pixels)
        return discriminate_pixels(*arguments, update_stats=True)[0]

    logits = logits_of_target(state, frozen, batch)
    for kind in ("spatial", "temporal"):
        # Not relative to the mean, which is near zero by chance: rounding is in proportion to the logits themselves.
        bound = 1e-4 * float(logits[kind].std())
        assert decoded[1][f"logits_real/{kind}"] == pytest.approx(float(logits[kind].mean()), abs=bound)


def test_without_the_adversarial_loss(toy, toy_step):
    """Table 2: the student follows the target alone, whatever the discriminator learns beside it."""
    networks, frozen, batch, state = toy
    new_state, metrics = toy_step(AdversarialOptions(adversarial_weight=0.0))
    assert metrics["loss_student"] == metrics["loss_huber"] > 0 and metrics["loss_adversarial"] > 0
    draw, pose = draw_and_pose(networks)
    example = pose(state, frozen, batch, draw(jax.random.key(3), batch))
    question = (example.x, example.sigma, example.target, example.weight)
    terms, gradient = plain.student_gradient(networks, state.disc, state, frozen, question, batch.cond, gan=0.0)
    assert metrics["loss_huber"] == pytest.approx(float(terms[1]), rel=1e-5)
    expected = descend(state.student, gradient, RATES["student"])
    assert max(differences(new_state.student, expected, state.student)) <= GRADIENT
    assert max(differences(new_state.student, toy_step()[0].student, state.student)) > 1e-2


def test_the_discriminator_may_see_a_part_of_each_clip(toy, toy_step):
    """The same frames of the target and of the answer; the distance stays that of whole clips."""
    networks, frozen, batch, state = toy
    new_state, metrics = toy_step(AdversarialOptions(disc_frames=2))
    key, frame_key = jax.random.split(jax.random.key(3))
    first = np.asarray(adversarial.draw_first_frame(frame_key, 2, 3, 2))

    def seen(clips):
        return jnp.stack([clip[start : start + 2] for clip, start in zip(clips, first, strict=True)])

    draw, pose = draw_and_pose(networks)
    example = pose(state, frozen, batch, draw(key, batch))
    denoiser = plain.denoiser(networks)
    student = plain.variables(frozen["unet"], state.student)
    fake = denoiser(student, example.x, example.sigma, batch.cond)
    value, g_disc, spectral = plain.disc_gradient(networks, state.disc, frozen, seen(example.target), seen(fake))
    assert metrics["loss_disc"] == pytest.approx(float(value), rel=1e-5)
    disc = {"params": descend(state.disc["params"], g_disc, RATES["disc"]), "spectral": spectral}
    assert max(differences(new_state.disc["params"], disc["params"], state.disc["params"])) <= GRADIENT

    question = (example.x, example.sigma, example.target, example.weight)
    terms, gradient = plain.student_gradient(networks, disc, state, frozen, question, batch.cond, seen=seen)
    assert metrics["loss_student"] == pytest.approx(float(0.1 * terms[0] + terms[1]), rel=1e-5)
    expected = descend(state.student, gradient, RATES["student"])
    assert max(differences(new_state.student, expected, state.student)) <= GRADIENT


def test_frames_that_are_seen_begin_anywhere(rng):
    first = np.asarray(adversarial.draw_first_frame(jax.random.key(0), 6000, 14, 9))
    counts = np.bincount(first)
    # Five standard deviations of 29.
    assert len(counts) == 6 and np.all(np.abs(counts - 1000) < 145), counts
    clips = rng.standard_normal((3, 5, 2, 1, 4), np.float32)
    frames = adversarial.frames_from(clips, jnp.array([2, 0, 1]), 3)
    np.testing.assert_array_equal(frames, np.stack([clips[0, 2:], clips[1, :3], clips[2, 1:4]]))
    np.testing.assert_array_equal(adversarial.frames_from(clips, jnp.zeros(3, int), 5), clips)


def test_accumulated_gradients_are_the_batchs(toy, toy_step):
    networks, frozen, batch, state = toy
    new_state, metrics = toy_step(AdversarialOptions(grad_accum=2))
    whole_state, whole = toy_step()
    # The discriminator's update is the same; the student's is against the discriminator from before it.
    assert max(differences(new_state.disc, whole_state.disc, state.disc)) <= GRADIENT
    assert metrics["loss_disc"] == pytest.approx(float(whole["loss_disc"]), rel=1e-5)
    draw, pose = draw_and_pose(networks)
    example = pose(state, frozen, batch, draw(jax.random.key(3), batch))
    question = (example.x, example.sigma, example.target, example.weight)
    terms, gradient = plain.student_gradient(networks, state.disc, state, frozen, question, batch.cond)
    assert metrics["loss_student"] == pytest.approx(float(0.1 * terms[0] + terms[1]), rel=1e-5)
    expected = descend(state.student, gradient, RATES["student"])
    assert max(differences(new_state.student, expected, state.student)) <= GRADIENT


def test_half_precision_step_is_that_of_float32_about(toy):
    """The same networks, with weights that bfloat16 holds, computing in either."""
    networks, frozen = toy_networks_and_frozen(jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}
    state, batch, key = trained_state(networks, frozen), tiny.tiny_batch(), jax.random.key(3)
    new_state, metrics = program(networks)(state, frozen, batch, key)
    assert {leaf.dtype for leaf in jax.tree.leaves(new_state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), frozen)
    expected_state, expected = program(toy[0])(state, wide, batch, key)
    # bfloat16 has 256 numbers from 1 to 2, and errors of some thousandths add up to about one hundredth here.
    for name in ("loss_disc", "loss_adversarial", "loss_huber", "loss_student"):
        assert metrics[name] == pytest.approx(float(expected[name]), rel=0.1)
    for before, half, full in (
        (state.student, new_state.student, expected_state.student),
        (state.disc["params"], new_state.disc["params"], expected_state.disc["params"]),
    ):
        change, wanted = flat(half) - flat(before), flat(full) - flat(before)
        length, expected_length = np.linalg.norm(change), np.linalg.norm(wanted)
        assert 1 - change @ wanted / (length * expected_length) < 0.05
        assert abs(length / expected_length - 1) < 0.15
    assert relative_error(flat(new_state.disc["spectral"]), flat(expected_state.disc["spectral"])) < 1e-5


def test_average_keeps_changes_that_half_precision_would_lose():
    average, student = Student({}, {"w": jnp.ones(3)}), Student({}, {"w": jnp.full(3, 1 + 1e-4)})
    for _ in range(2):
        average = update_ema(average, student, 0.95)
    # Numbers near 1 are 1.2e-7 apart.
    np.testing.assert_allclose(average.tuned["w"] - 1, 1e-4 * (1 - 0.95**2), rtol=0, atol=1e-6)
    assert jnp.bfloat16(1 + 1e-4) == 1


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (Stage2Options(guidance_kind="cosine"), "guidance_kind must be one of .*, got 'cosine'"),
        (Stage2Options(solver_steps=0), r"solver_steps must lie in 1 \.\. 99, got 0"),
        (Stage2Options(solver_steps=100), r"solver_steps must lie in 1 \.\. 99, got 100"),
        (Stage2Options(num_levels=5), r"solver_steps must lie in 1 \.\. 4, got 5"),
    ],
)
def test_impossible_options_are_refused(toy, own, words):
    with pytest.raises(ValueError, match=words):
        osv_stage2.make_step(toy[0], *SGD, AdversarialOptions(), own)
