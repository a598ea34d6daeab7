"""ADD's step against its equations written out plainly, and who gets no gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain_stage2 as plain
import pytest
import tiny
from conftest import flat, quick_jit
from students import (
    assert_about_the_same_step,
    differences,
    disc_of,
    ema_of,
    nonzero_leaves,
    student_of,
    toy_add,
)

from osv_jax.diffusion.edm import sigma_grid
from osv_jax.objectives.add import ADD, ADDOptions
from osv_jax.objectives.gradient_penalty import PenaltyOptions

KEY = jax.random.key(3)
# Relative error of gradients.
GRADIENT = 1e-4
RATES = {"student": 0.5, "disc": 0.01}
SGD = {name: optax.sgd(rate) for name, rate in RATES.items()}
OPTIONS = ADDOptions(discriminator_blocks=(-1, 0), condition_width=8, trainable=("lora",), r1=PenaltyOptions(1e3))
IMAGENET = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


@pytest.fixture(scope="module")
def toy():
    objective, frozen, state = toy_add(OPTIONS, SGD)
    # Two rows and columns of patches: in one alone, norms have too little to take their variance from.
    return objective, frozen, tiny.tiny_batch(frames=4, height=12, width=12), state


@functools.cache
def program(objective):
    return jax.jit(objective.step)


def dinov2_of(networks, frozen, latents, blocks, read):
    """Decoded to [0, 1], normalised, resized to whole patches."""
    pixels = (networks.codec.decode_video(frozen["vae"], latents) + 1) / 2
    images = (pixels.reshape(-1, *pixels.shape[2:]) - IMAGENET[0]) / IMAGENET[1]
    size = [max(1, round(side / 14)) * 14 for side in images.shape[1:3]]
    images = jax.image.resize(images, (len(images), *size, 3), "bilinear", antialias=False)
    features = networks.dinov2.apply({"params": frozen["dinov2"]}, images, blocks, read)
    return [x.reshape(*latents.shape[:2], *x.shape[1:]) for x in features]


@pytest.mark.integration
def test_step_is_a_conditioned_hinge_r1_of_features_and_score_distillation(toy):
    objective, frozen, batch, state = toy
    networks, cond = objective.networks, batch.cond
    new, metrics = program(objective)(state, frozen, batch, KEY)
    draws = quick_jit(objective.draw)(KEY, batch)
    denoiser = plain.denoiser(networks)
    sigma = sigma_grid(5)[np.asarray(draws["index"])]
    x = batch.latents + plain.column(sigma) * draws["noise"]
    teacher_sigma = sigma_grid(1000)[np.asarray(draws["teacher_index"])]
    weight = 2.5 / np.sqrt(teacher_sigma**2 + 1)

    @quick_jit
    def plainly(state, frozen):
        disc_module = networks.discriminator.clone(read="sum", condition_width=8)
        image = cond.image_latents[:, None] * networks.vae.config.scaling_factor
        (token,) = dinov2_of(networks, frozen, image, (0,), "class")
        condition = jnp.concatenate([token[:, 0], cond.image_embedding], axis=-1)

        def judged(disc, features, update):
            arguments = (disc, features, update, condition)
            logits, updated = disc_module.apply(*arguments, method="score", mutable=["spectral"])
            return jnp.concatenate(jax.tree.leaves(logits), axis=1), updated["spectral"] if update else disc["spectral"]

        features_of = functools.partial(dinov2_of, networks, frozen, blocks=(-1, 0), read="sum")
        prediction = lambda student: denoiser(plain.variables(frozen["unet"], student), x, sigma, cond)  # noqa: E731
        fake, real_features = prediction(student_of(state)), features_of(batch.latents)

        def disc_loss(params):
            disc = {"params": params, "spectral": disc_of(state)["spectral"]}
            real, spectral = judged(disc, real_features, True)
            generated, _ = judged(disc, features_of(fake), True)
            now = {"params": params, "spectral": spectral}
            slopes = jax.grad(lambda features: judged(now, features, False)[0].sum())(real_features)
            r1 = sum(jnp.sum(slope**2) for slope in slopes) / 2
            return jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + generated)) + 1e3 * r1, (spectral, r1)

        (value, (spectral, r1)), g_disc = jax.value_and_grad(disc_loss, has_aux=True)(disc_of(state)["params"])
        params = jax.tree.map(lambda p, g: p - RATES["disc"] * g, disc_of(state)["params"], g_disc)
        disc = {"params": params, "spectral": spectral}
        noisy = fake + plain.column(teacher_sigma) * draws["teacher_noise"]
        target = denoiser({"params": frozen["unet"]}, noisy, teacher_sigma, cond)

        def student_loss(student):
            output = prediction(student)
            adversarial = -jnp.mean(judged(disc, features_of(output), False)[0])
            distillation = jnp.mean(weight * ((output - target) ** 2).mean(axis=(1, 2, 3, 4)))
            return adversarial + distillation, (adversarial, distillation)

        (_, terms), g_student = jax.value_and_grad(student_loss, has_aux=True)(student_of(state))
        student = jax.tree.map(lambda p, g: p - RATES["student"] * g, student_of(state), g_student)
        ema = jax.tree.map(lambda old, new: 0.95 * old + 0.05 * new, ema_of(state), student)
        return value, r1, terms, g_disc, g_student, disc, student, ema

    value, r1, (adversarial, distillation), g_disc, g_student, disc, student, ema = plainly(state, frozen)
    assert len(nonzero_leaves(g_student)) == len(jax.tree.leaves(student_of(state)))
    # What is near zero is measured by the hinge's 1.
    assert float(metrics["loss_disc"]) == pytest.approx(float(value), rel=GRADIENT)
    # The square of a gradient.
    assert float(metrics["r1"]) == pytest.approx(float(r1), rel=2 * GRADIENT) and 1e3 * float(r1) > 1e-2
    assert float(metrics["loss_adversarial"]) == pytest.approx(float(adversarial), abs=GRADIENT)
    assert float(metrics["loss_distillation"]) == pytest.approx(float(distillation), rel=1e-4)
    assert float(metrics["grad_norm/disc"]) == pytest.approx(np.linalg.norm(flat(g_disc)), rel=GRADIENT)
    assert float(metrics["grad_norm/student"]) == pytest.approx(np.linalg.norm(flat(g_student)), rel=GRADIENT)
    for actual, expected, before in (
        (disc_of(new)["params"], disc["params"], disc_of(state)["params"]),
        (student_of(new), student, student_of(state)),
        (ema_of(new), ema, ema_of(state)),
    ):
        # The step is as large as what it changes: its error is what counts.
        _, change = differences(actual, expected, before)
        assert change < GRADIENT
    assert differences(disc_of(new)["spectral"], disc["spectral"])[0] < 1e-5


@pytest.mark.integration  # Compiles for long.
def test_half_precision_step_is_that_of_float32_about(toy):
    objective, _, batch, state = toy
    halves, frozen, _ = toy_add(OPTIONS, SGD, jnp.bfloat16)
    half = program(halves)(state, frozen, batch, KEY)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), frozen)
    assert_about_the_same_step(state, half, program(objective)(state, wide, batch, KEY))


class ApartADD(ADD):
    """The teacher's parameters, which are the student's base too, as something of their own."""

    def backbone(self, frozen, student, cond):
        return super().backbone({"unet": frozen["teacher"]} if student is None else frozen, student, cond)


@pytest.mark.integration
def test_no_gradient_reaches_what_is_frozen(toy):
    objective, frozen, batch, state = toy
    apart = ApartADD(objective.networks, OPTIONS, SGD)

    def loss(inputs):
        _, metrics = apart.step(state, frozen | inputs, batch, KEY)
        return metrics["loss_student"] + metrics["loss_disc"]

    inputs = {"teacher": frozen["unet"], "vae": frozen["vae"], "dinov2": frozen["dinov2"]}
    assert nonzero_leaves(quick_jit(jax.grad(loss))(inputs)) == []
