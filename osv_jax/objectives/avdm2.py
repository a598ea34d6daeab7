"""AVDM2 (Zhu et al. 2024): text to video in four steps, from AnimateDiff; Eq. 1 to 9 and Algorithm 1.

Three networks learn: the student, a head on the frozen teacher's encoder, and the fake score, which follows the
student's distribution. Eq. 3, the KL divergence, has no function: what is computed of it is its gradient, Eq. 4 and 8.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from osv_jax.diffusion.ddpm import (
    NUM_TIMES,
    DDPMBackbone,
    TextConditioning,
    add_noise,
    animatediff_schedule,
    few_step,
    few_step_input,
    few_step_times,
    stable_diffusion_schedule,
)
from osv_jax.diffusion.ode import Denoiser, guided_denoiser
from osv_jax.diffusion.samplers import fresh_noises
from osv_jax.errors import UserError
from osv_jax.models.layers import apply
from osv_jax.models.multiscale_head import MultiscaleHead
from osv_jax.objectives import losses
from osv_jax.objectives.avdm2_options import AVDM2Options, adamw, clipped
from osv_jax.objectives.batches import TextBatch
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Draws, Metrics, register
from osv_jax.objectives.players import Player, Student, TrainState, norms, start
from osv_jax.objectives.text_objective import (
    TextObjective,
    clip_keys,
    draw_frames,
    student_parts,
    take_frames,
    to_float32,
)

# Metrics of the student's losses.
_OF_STUDENT = ("loss_student", "loss_sdm", "loss_adversarial")


@register
class AVDM2(TextObjective):
    """A few-step student of a text-to-video teacher, by a video GAN and by matching scores."""

    name = "avdm2"
    Options = AVDM2Options
    curves = ("loss_sdm", "loss_adversarial", "loss_disc", "loss_fake_score")
    product = "text-to-video student"
    # In the steps in which the student does not learn.
    may_be_missing = (*_OF_STUDENT, "grad_norm/student")

    @classmethod
    def check(cls, options: AVDM2Options, num_frames: int) -> None:
        super().check(options, num_frames)
        count = options.sdm_frames
        if options.sdm == "frames" and count > num_frames:
            raise UserError(f"config.sdm_frames={count} must be at most {num_frames}, the frames of a clip.")

    def make_optimizers(self) -> dict[str, optax.GradientTransformation]:
        chosen = self.options.optimizer
        rates = {"motion": chosen.motion_learning_rate, "unet": chosen.unet_learning_rate}
        student = optax.multi_transform({part: adamw(chosen, rate) for part, rate in rates.items()}, student_parts)
        clip = optax.clip_by_global_norm(chosen.max_grad_norm)
        return {
            # Clipped by the norm over all parts.
            "student": optax.chain(clip, student) if chosen.max_grad_norm else student,
            "disc": clipped(chosen, chosen.disc_learning_rate),
            "fake_score": clipped(chosen, chosen.fake_score_learning_rate),
        }

    def init(self, key: jax.Array, frozen: Params) -> dict[str, Player]:
        """A student equal to the video teacher, a fresh head, and a fake score equal to the real one (line 2)."""
        unet, side = self.networks.unet, 2 ** len(self.networks.unet.config.block_out_channels)
        batch = jnp.zeros((1, 1, side, side, unet.config.in_channels))
        context = jnp.zeros((1, 1, unet.config.cross_attention_dim))
        see = functools.partial(apply, unet, features=True)
        features = jax.eval_shape(see, {"params": self.teacher(frozen)}, batch, jnp.zeros(1), context)
        head = self.head.init(key, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), features))["params"]
        student = Student(lora={}, tuned=to_float32(self.teacher(frozen)))
        given = {"student": student, "disc": head, "fake_score": to_float32(self.real_score(frozen))}
        return {name: start(params, self.optimizers[name]) for name, params in given.items()}

    def step(self, state: TrainState, frozen: Params, batch: TextBatch, key: jax.Array) -> tuple[TrainState, Metrics]:
        return step(self, state, frozen, batch, key)

    @property
    def head(self) -> MultiscaleHead:
        """The part of the discriminator that learns."""
        return MultiscaleHead(self.options.discriminator_width, dtype=self.networks.unet.dtype)

    @property
    def times(self) -> Int[Any, " k"]:
        """The student's, descending."""
        return few_step_times(self.options.steps)

    def real_score(self, frozen: Params) -> Params:
        """Those of the network whose scores are matched."""
        return frozen["unet_2d"] if self.options.sdm == "frames" else self.teacher(frozen)

    def score(self, params: Params, cond: TextConditioning) -> DDPMBackbone:
        """The denoiser of a score, real or fake, with the schedule that it was trained with."""
        if self.options.sdm == "video":
            return DDPMBackbone(self.networks.unet_with({"params": params}), cond, animatediff_schedule())
        network = functools.partial(apply, self.networks.unet_2d, {"params": params})
        return DDPMBackbone(network, cond, stable_diffusion_schedule())

    @property
    def preview_label(self) -> str:
        return f"sample, {self.options.steps} steps"

    def preview(self, denoiser: Denoiser, noise: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
        return few_step(denoiser, noise, self.times, animatediff_schedule(), clip_keys(jax.random.key(0), len(noise)))


def step(
    objective: AVDM2, state: TrainState, frozen: Params, batch: TextBatch, key: jax.Array
) -> tuple[TrainState, Metrics]:
    """One round of Algorithm 1. In the student's turn it learns from the other players as they were before the round;
    then these learn from what it had made, with new noise.
    """
    draws, players = draw(key, batch, objective.options), state.players
    fake, pull_back = student_forward(objective, players["student"].params, frozen, batch, draws)

    def learn() -> tuple[Student, Metrics]:
        value = functools.partial(student_loss, objective, players, frozen, batch, draws)
        g_fake, metrics = jax.grad(value, has_aux=True)(fake)
        return pull_back(g_fake)[0], metrics

    turn = (state.step + 1) % objective.options.student_every == 0
    metrics = dict.fromkeys(_OF_STUDENT, jnp.zeros(()))
    rest = lambda: (jax.tree.map(jnp.zeros_like, players["student"].params), metrics)  # noqa: E731
    g_student, of_student = jax.lax.cond(turn, learn, rest)
    made = jax.lax.stop_gradient(fake)
    g_disc, of_disc = jax.grad(disc_loss, has_aux=True)(players["disc"].params, objective, frozen, batch, draws, made)
    score = players["fake_score"].params
    g_score, of_score = jax.grad(fake_score_loss, has_aux=True)(score, objective, batch, draws, made)
    gradients = {"student": g_student, "disc": g_disc, "fake_score": g_score}
    updated = {name: players[name].update(gradients[name], objective.optimizers[name]) for name in gradients}
    # Chosen leaf by leaf, so that the new ones can take the place of the old ones in memory.
    keep = functools.partial(jnp.where, turn)
    updated["student"] = jax.tree.map(keep, updated["student"], players["student"])
    metrics = of_student | of_disc | of_score | norms(gradients, updated)
    missing = {name: jnp.where(turn, metrics[name], jnp.nan) for name in objective.may_be_missing}
    return TrainState(step=state.step + 1, players=updated), metrics | missing


def draw(key: jax.Array, batch: TextBatch, options: AVDM2Options) -> Draws:
    """All random numbers of a step; `stop`, of all clips together, is the only one without them as its first axis."""
    stop_key, noise_key, fresh_key, *keys = jax.random.split(key, 7)
    clips, frames, *size = batch.latents.shape
    noise = jax.random.normal(noise_key, batch.latents.shape)
    fresh = fresh_noises(clip_keys(fresh_key, clips), options.steps - 1, noise)
    draws = {"stop": jax.random.randint(stop_key, (), 0, options.steps), "noise": noise, "fresh": fresh.swapaxes(0, 1)}
    matched = options.sdm_frames if options.sdm == "frames" else frames
    for name, own_key in zip(("adm", "disc", "sdm", "fake"), keys, strict=True):
        time_key, own_noise_key, frame_key = jax.random.split(own_key, 3)
        is_score = name in ("sdm", "fake")
        low, high = options.sdm_times if is_score else options.adm_times
        draws[f"{name}_t"] = draw_times(time_key, clips, low, high)
        draws[f"{name}_noise"] = jax.random.normal(own_noise_key, (clips, matched if is_score else frames, *size))
        if is_score:
            draws[f"{name}_frames"] = draw_frames(frame_key, clips, frames, matched)
    return draws


def draw_times(key: jax.Array, clips: int, low: float, high: float) -> Int[Array, " b"]:
    """Times, uniform in [low T, high T], both ends included; T itself is no time of a network, so T - 1 is the last."""
    return jax.random.randint(key, (clips,), round(low * NUM_TIMES), min(round(high * NUM_TIMES), NUM_TIMES - 1) + 1)


def student_forward(
    objective: AVDM2, student: Student, frozen: Params, batch: TextBatch, draws: Draws
) -> tuple[Float[Array, "b f h w c"], Any]:
    """G(z_T) by backward simulation up to a random step, the last one with a gradient, and what pulls one back."""
    times, schedule = objective.times, animatediff_schedule()
    simulated = few_step_input(
        objective.backbone(frozen, student, batch.cond), draws["noise"], draws["fresh"], draws["stop"], times, schedule
    )
    x, t = jax.lax.stop_gradient(simulated), jnp.full(len(simulated), jnp.asarray(times)[draws["stop"]])
    return jax.vjp(lambda params: objective.backbone(frozen, params, batch.cond)(x, t), student)


def student_loss(
    objective: AVDM2, players: Mapping[str, Player], frozen: Params, batch: TextBatch, draws: Draws, fake: Array
) -> tuple[Float[Array, ""], Metrics]:
    """lambda_SDM L_SDM + lambda_ADM L_ADM (Eq. 9) of the student's clips."""
    options = objective.options
    noisy = add_noise(fake, draws["adm_noise"], draws["adm_t"], animatediff_schedule())
    seen = see(objective, frozen, batch.cond, noisy, draws["adm_t"])
    adversarial = losses.softplus_generator(judge(objective, players["disc"].params, seen)).mean()
    frames = take_frames(fake, draws["sdm_frames"])
    fake_score = players["fake_score"].params
    gradient = jax.lax.stop_gradient(matching_gradient(objective, fake_score, frozen, batch.cond, draws, frames))
    matching = losses.with_gradient(frames, gradient).mean()
    loss = options.sdm_weight * matching + options.adm_weight * adversarial
    return loss, {"loss_student": loss, "loss_sdm": matching, "loss_adversarial": adversarial}


def matching_gradient(
    objective: AVDM2, fake_score: Params, frozen: Params, cond: TextConditioning, draws: Draws, frames: Array
) -> Float[Array, "b k h w c"]:
    """The gradient of Eq. 8 with respect to the frames; the real score is guided, the fake one is not."""
    real = objective.score(objective.real_score(frozen), cond)
    fake = objective.score(fake_score, cond)
    noisy = add_noise(frames, draws["sdm_noise"], draws["sdm_t"], real.schedule)
    guidance = objective.options.sdm_guidance
    # At 1, guidance is the condition alone.
    denoiser = real if guidance == 1 else guided_denoiser(real, jnp.full(frames.shape[1], guidance))
    t = draws["sdm_t"]
    return losses.distribution_matching_gradient(frames, denoiser(noisy, t), fake(noisy, t))


def disc_loss(
    params: Params, objective: AVDM2, frozen: Params, batch: TextBatch, draws: Draws, fake: Float[Array, "b f h w c"]
) -> tuple[Float[Array, ""], Metrics]:
    """Eq. 6 of real and generated clips with the same noise (Algorithm 1, lines 16 to 18)."""
    # Side by side for each clip, so that a sharded batch stays where it is.
    both = jnp.stack([batch.latents, fake], axis=1).reshape(-1, *fake.shape[1:])
    noise, t, cond = jax.tree.map(
        lambda x: jnp.repeat(x, 2, axis=0), (draws["disc_noise"], draws["disc_t"], batch.cond)
    )
    seen = see(objective, frozen, cond, add_noise(both, noise, t, animatediff_schedule()), t)
    logits = judge(objective, params, seen)["video"].reshape(len(fake), 2, -1)
    real, generated = {"video": logits[:, 0]}, {"video": logits[:, 1]}
    loss = losses.softplus_discriminator(real, generated).mean()
    means = {"logits_real/video": logits[:, 0].mean(), "logits_fake/video": logits[:, 1].mean()}
    return loss, {"loss_disc": loss} | means


def see(
    objective: AVDM2, frozen: Params, cond: TextConditioning, noisy: Float[Array, "b f h w c"], t: Int[Array, " b"]
) -> tuple[Array, ...]:
    """What the discriminator's head is given of noised clips: the frozen teacher's features."""
    teacher = {"params": jax.lax.stop_gradient(objective.teacher(frozen))}
    seen: tuple[Array, ...] = apply(
        objective.networks.unet, teacher, noisy, t.astype(jnp.float32), cond.context, features=True
    )
    return seen


def judge(objective: AVDM2, params: Params, seen: tuple[Array, ...]) -> losses.Logits:
    """The head's logits, of which D is the sigmoid."""
    return {"video": apply(objective.head, {"params": params}, seen)}


def fake_score_loss(
    params: Params, objective: AVDM2, batch: TextBatch, draws: Draws, fake: Float[Array, "b f h w c"]
) -> tuple[Float[Array, ""], Metrics]:
    """||eps_psi(x_t, t) - eps||^2 (Eq. 2) of frames that the student made, K new ones (lines 13 to 15)."""
    score, t, noise = objective.score(params, batch.cond), draws["fake_t"], draws["fake_noise"]
    noisy = add_noise(take_frames(fake, draws["fake_frames"]), noise, t, score.schedule)
    predicted = score.network(noisy, t.astype(jnp.float32), batch.cond.context)
    loss = losses.squared_error(predicted, noise).mean()
    return loss, {"loss_fake_score": loss}
