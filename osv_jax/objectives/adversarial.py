"""The step that both stages of OSV take: an adversarial and a pseudo-Huber loss towards a target (Eq. 6, 7, 9, 10).

The stages differ only in what they put to the student, and what they hold against its answer: see `stage1`, `stage2`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import struct
from jaxtyping import Array, Float, Int

from osv_jax.diffusion.conditioning import Conditioning
from osv_jax.diffusion.edm import denoise
from osv_jax.models.discriminator import discriminate, discriminate_pixels
from osv_jax.objectives import losses
from osv_jax.objectives.accumulation import mean_over_parts, split_batch
from osv_jax.objectives.networks import Networks, Params
from osv_jax.objectives.players import TrainState, global_norm, update_ema

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class AdversarialOptions:
    """Hyperparameters that the stages share; the defaults are the paper's.

    Attributes:
        adversarial_weight: lambda^LGP and lambda^ACD (appendix C).
        huber_c: c of the pseudo-Huber distance (appendix C).
        ema_decay: of the student's average.
        lora_scale: alpha / rank.
        boundary: see `edm.scalings`.
        grad_accum: equal parts that a batch is worked through in, one after the other.
        decode: the discriminator sees clips decoded by the VAE instead of its own upsampling of latents (Table 2e).
        disc_frames: consecutive frames of each clip that the discriminator sees, to save memory, from another frame on
            in every step; 0: all of them, as in the paper.
    """

    adversarial_weight: float = 0.1
    huber_c: float = 1e-3
    ema_decay: float = 0.95
    lora_scale: float = 1.0
    boundary: str = "svd"
    grad_accum: int = 1
    decode: bool = False
    disc_frames: int = 0


@struct.dataclass
class Batch:
    """Clips as a step takes them.

    Attributes:
        latents: x_0, scaled video latents, float32.
        cond: what the networks are conditioned on.
    """

    latents: Float[Array, "b f h w c"]
    cond: Conditioning


@struct.dataclass
class Example:
    """What the student is asked, and what its answer is held against.

    Attributes:
        x, sigma, cond: the arguments of the student f.
        target: what the discriminator takes for real, and what the answer is drawn to.
        weight: of the distance to the target, per clip.
    """

    x: Float[Array, "b f h w c"]
    sigma: Float[Array, " b"]
    cond: Conditioning
    target: Float[Array, "b f h w c"]
    weight: Float[Array, " b"]


# All random numbers of a step, each with the batch as its first axis: drawn at once, so that neither the number of
# devices nor `grad_accum` changes them.
Draws = dict[str, Array]
Draw = Callable[[jax.Array, Batch], Draws]
Pose = Callable[[TrainState, Params, Batch, Draws], Example]
Step = Callable[[TrainState, Params, Batch, jax.Array], tuple[TrainState, Metrics]]


def make_step(
    networks: Networks,
    optimizer_student: optax.GradientTransformation,
    optimizer_disc: optax.GradientTransformation,
    options: AdversarialOptions,
    draw: Draw,
    pose: Pose,
) -> Step:
    """The step `(state, frozen, batch, key) -> (state, metrics)`.

    One forward pass of the student serves both players: the discriminator is updated on its output as a constant,
    then the student's loss is differentiated with respect to that output through the NEW discriminator and pulled
    back once. With `grad_accum` > 1 the parts share one update of each player, so every part sees the discriminator
    from before the step.

    Args:
        draw: the stage's random numbers.
        pose: the stage's question and target; no gradient flows through it.
    """

    def draw_all(key: jax.Array, batch: Batch) -> Draws:
        if not options.disc_frames:
            return draw(key, batch)
        key, frame_key = jax.random.split(key)
        clips, num_frames = batch.latents.shape[:2]
        return draw(key, batch) | {"first_frame": draw_first_frame(frame_key, clips, num_frames, options.disc_frames)}

    def student_forward(state: TrainState, frozen: Params, example: Example) -> tuple[Array, Callable]:
        """f_theta(x, sigma), and the function that pulls a gradient back to the student's parameters."""

        def student(trainable: Any) -> Array:
            network = networks.unet_with(trainable.variables(frozen["unet"], options.lora_scale))
            return denoise(network, example.x, example.sigma, example.cond, options.boundary)

        return jax.vjp(student, state.student)

    def seen(latents: Array, draws: Draws) -> Array:
        """What the discriminator sees of the clips."""
        return frames_from(latents, draws["first_frame"], options.disc_frames) if options.disc_frames else latents

    def judge(disc: dict[str, Params], frozen: Params, latents: Array, update_stats: bool) -> Any:
        """D_psi: logits by head kind, and the spectral statistics."""
        arguments = (networks.discriminator, networks.dinov2, disc, frozen["dinov2"])
        if not options.decode:
            return discriminate(*arguments, latents, update_stats)
        pixels = (networks.decode_video(jax.lax.stop_gradient(frozen["vae"]), latents) + 1) / 2
        return discriminate_pixels(*arguments, pixels, update_stats)

    def disc_gradient(
        disc: dict[str, Params], frozen: Params, example: Example, draws: Draws, fake: Array
    ) -> tuple[Params, Params, Metrics]:
        """Gradient of Eq. 6 / Eq. 9, and the spectral statistics after it."""

        def loss_fn(params: Params) -> tuple[Array, tuple[Params, Metrics]]:
            # Real and fake side by side for each clip, so that a sharded batch stays where it is.
            pairs = jnp.stack([seen(example.target, draws), seen(jax.lax.stop_gradient(fake), draws)], axis=1)
            pairs = rearrange(pairs, "b two f h w c -> (b two) f h w c")
            logits, spectral = judge({**disc, "params": params}, frozen, pairs, True)
            logits = {kind: rearrange(values, "(b two) n -> two b n", two=2) for kind, values in logits.items()}
            real, fake_logits = ({kind: values[i] for kind, values in logits.items()} for i in (0, 1))
            loss = losses.hinge_discriminator(real, fake_logits).mean()
            metrics = {f"logits_real/{kind}": values.mean() for kind, values in real.items()}
            metrics |= {f"logits_fake/{kind}": values.mean() for kind, values in fake_logits.items()}
            return loss, (spectral, {"loss_disc": loss, **metrics})

        gradient, (spectral, metrics) = jax.grad(loss_fn, has_aux=True)(disc["params"])
        return gradient, spectral, metrics

    def student_gradient(
        disc: dict[str, Params], frozen: Params, example: Example, draws: Draws, fake: Array, pull_back: Callable
    ) -> tuple[Any, Metrics]:
        """Gradient of Eq. 7 / Eq. 10, taken at the student's output and pulled back."""

        def loss_fn(fake: Array) -> tuple[Array, Metrics]:
            logits, _ = judge(disc, frozen, seen(fake, draws), False)
            adversarial = losses.hinge_generator(logits).mean()
            distance = (example.weight * losses.pseudo_huber(example.target, fake, options.huber_c)).mean()
            loss = options.adversarial_weight * adversarial + distance
            return loss, {"loss_student": loss, "loss_adversarial": adversarial, "loss_huber": distance}

        gradient, metrics = jax.grad(loss_fn, has_aux=True)(fake)
        return pull_back(gradient)[0], metrics

    def pose_constant(state: TrainState, frozen: Params, batch: Batch, draws: Draws) -> Example:
        return jax.lax.stop_gradient(pose(state, frozen, batch, draws))

    def update_disc(state: TrainState, gradient: Params, spectral: Params) -> tuple[dict[str, Params], Any]:
        updates, opt_disc = optimizer_disc.update(gradient, state.opt_disc, state.disc["params"])
        return {"params": optax.apply_updates(state.disc["params"], updates), "spectral": spectral}, opt_disc

    def gradients_of_part(state: TrainState, frozen: Params, part: tuple[Batch, Draws]) -> Any:
        """Both players' gradients at the state before the step."""
        example, draws = pose_constant(state, frozen, *part), part[1]
        fake, pull_back = student_forward(state, frozen, example)
        g_disc, spectral, metrics = disc_gradient(state.disc, frozen, example, draws, fake)
        g_student, metrics_student = student_gradient(state.disc, frozen, example, draws, fake, pull_back)
        # The spectral statistics depend on the weights alone: the mean over parts is that of equal values.
        return g_disc, spectral, g_student, metrics | metrics_student

    def step(state: TrainState, frozen: Params, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        draws = draw_all(key, batch)
        if options.grad_accum == 1:
            example = pose_constant(state, frozen, batch, draws)
            fake, pull_back = student_forward(state, frozen, example)
            g_disc, spectral, metrics = disc_gradient(state.disc, frozen, example, draws, fake)
            disc, opt_disc = update_disc(state, g_disc, spectral)
            g_student, metrics_student = student_gradient(disc, frozen, example, draws, fake, pull_back)
            metrics |= metrics_student
        else:
            parts = split_batch((batch, draws), options.grad_accum)
            g_disc, spectral, g_student, metrics = mean_over_parts(
                lambda part: gradients_of_part(state, frozen, part), parts, options.grad_accum
            )
            disc, opt_disc = update_disc(state, g_disc, spectral)

        updates, opt_student = optimizer_student.update(g_student, state.opt_student, state.student)
        student = optax.apply_updates(state.student, updates)
        metrics |= {
            "grad_norm/student": global_norm(g_student),
            "grad_norm/disc": global_norm(g_disc),
            "param_norm/student": global_norm(student),
            "param_norm/disc": global_norm(disc["params"]),
        }
        new_state = TrainState(
            step=state.step + 1,
            student=student,
            ema=update_ema(state.ema, student, options.ema_decay),
            disc=disc,
            opt_student=opt_student,
            opt_disc=opt_disc,
        )
        return new_state, metrics

    return step


def draw_first_frame(key: jax.Array, clips: int, num_frames: int, seen: int) -> Int[Array, " b"]:
    """Where the `seen` consecutive frames of each clip begin, all places being equally likely."""
    return jax.random.randint(key, (clips,), 0, num_frames - seen + 1)


def frames_from(clips: Float[Array, "b f h w c"], first: Int[Array, " b"], count: int) -> Float[Array, "b n h w c"]:
    """`count` consecutive frames of each clip, from its own `first` on."""
    return jax.vmap(lambda clip, start: jax.lax.dynamic_slice_in_dim(clip, start, count))(clips, first)
