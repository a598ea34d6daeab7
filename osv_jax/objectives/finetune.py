"""SVD's own training: denoising in the EDM framework (SF-V Eq. 1 to 3), to fine-tune it or to train it from scratch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from osv_jax.diffusion.conditioning import Conditioning
from osv_jax.diffusion.edm import EDMBackbone, Network, per_clip
from osv_jax.diffusion.ode import Denoiser, guided_denoiser
from osv_jax.diffusion.samplers import euler, euler_levels
from osv_jax.errors import UserError
from osv_jax.objectives import losses
from osv_jax.objectives.accumulation import mean_over_batch
from osv_jax.objectives.batches import Batch
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Draws, Metrics, StudentObjective, register
from osv_jax.objectives.options import StudentOptions, setting
from osv_jax.objectives.players import Student, TrainState, norms
from osv_jax.runtime.ranges import DECAY, NOT_NEGATIVE, PROBABILITY, Range

# Bands of noise levels whose losses are reported separately: about thirds of SVD's distribution.
BANDS = {"low": (0.0, 1.0), "mid": (1.0, 4.0), "high": (4.0, float("inf"))}
BAND_METRIC = "loss/sigma_"
# What pictures are sampled with, as SVD's are.
_EULER_STEPS = 25
_MAX_GUIDANCE = 3.0


@dataclasses.dataclass(frozen=True)
class SigmaOptions:
    """The distribution of noise levels; the defaults are SVD's.

    Attributes:
        log_mean, log_std: P_mean and P_std of ln sigma (e^20 is beyond all noise levels).
    """

    log_mean: float = setting(0.7, Range(-20, 20))
    log_std: float = setting(1.6, Range(0, 20, above_low=True))


@dataclasses.dataclass(frozen=True)
class DropoutOptions:
    """Probabilities with which a clip loses conditions, for classifier-free guidance; see `drop_conditions`.

    Attributes:
        embedding: its CLIP embedding alone.
        latents: its image latents alone.
        both: both.
    """

    embedding: float = setting(0.1, PROBABILITY)
    latents: float = setting(0.1, PROBABILITY)
    both: float = setting(0.1, PROBABILITY)


@dataclasses.dataclass(frozen=True)
class FinetuneOptions(StudentOptions):
    """Hyperparameters of denoising training.

    `grad_accum` does not change the result: the gradient is a mean over clips.

    Attributes:
        sigma: of the noise levels.
        min_snr_gamma: see `losses.denoising_weight`.
        dropout: of the conditions.
    """

    ema_decay: float = setting(0.999, DECAY)
    sigma: SigmaOptions = dataclasses.field(default_factory=SigmaOptions)
    min_snr_gamma: float = setting(0.0, NOT_NEGATIVE)
    dropout: DropoutOptions = dataclasses.field(default_factory=DropoutOptions)


@register
class Finetune(StudentObjective):
    """Denoising of real clips, which makes a teacher."""

    name = "finetune"
    Options = FinetuneOptions
    curves = ("loss", "grad_norm/student")
    product = "teacher"
    # Noise levels that no clip of a batch has have no loss.
    may_be_missing = (BAND_METRIC,)

    @classmethod
    def check(cls, options: FinetuneOptions, num_frames: int) -> None:
        dropout = dataclasses.asdict(options.dropout)
        if sum(dropout.values()) > 1:
            raise UserError(f"config.dropout={dropout} must be probabilities with a sum of at most 1.")

    def step(self, state: TrainState, frozen: Params, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        return step(self, state, frozen, batch, key)

    @property
    def preview_label(self) -> str:
        return f"sample, {_EULER_STEPS} Euler steps"

    def preview_denoiser(self, backbone: EDMBackbone, num_frames: int) -> Denoiser:
        return guided_denoiser(backbone, jnp.linspace(1.0, _MAX_GUIDANCE, num_frames))

    def preview(self, denoiser: Denoiser, noise: Array) -> Array:
        return euler(denoiser, noise, euler_levels(_EULER_STEPS))


def step(
    objective: Finetune, state: TrainState, frozen: Params, batch: Batch, key: jax.Array
) -> tuple[TrainState, Metrics]:
    """One update of the student on a weighted denoising loss."""
    options, student = objective.options, state.players["student"]
    whole = (batch, draw(key, batch))

    def gradient_of(part: tuple[Batch, Draws]) -> tuple[Student, Metrics]:
        return jax.grad(mean_loss, has_aux=True)(student.params, objective, frozen, *part)

    gradient, sums = mean_over_batch(gradient_of, whole, options.grad_accum)
    players = {"student": student.update(gradient, objective.optimizers["student"], options.ema_decay)}
    metrics = {"loss": sums["loss"]} | band_means(sums) | norms({"student": gradient}, players)
    return TrainState(step=state.step + 1, players=players), metrics


def mean_loss(
    student: Student, objective: Finetune, frozen: Params, batch: Batch, draws: Draws
) -> tuple[Float[Array, ""], Metrics]:
    """The mean of `denoising_loss`, and the sums that `band_means` takes."""
    network = objective.networks.unet_with(student.variables(frozen["unet"], objective.options.lora.scale))
    loss, sigma = denoising_loss(network, batch, draws, objective.options)
    return loss.mean(), {"loss": loss.mean()} | band_sums(loss, sigma)


def draw(key: jax.Array, batch: Batch) -> Draws:
    """All random numbers of a step."""
    sigma_key, noise_key, drop_key = jax.random.split(key, 3)
    clips = batch.latents.shape[:1]
    return {
        "normal": jax.random.normal(sigma_key, clips),
        "noise": jax.random.normal(noise_key, batch.latents.shape),
        "uniform": jax.random.uniform(drop_key, clips),
    }


def denoising_loss(
    network: Network, batch: Batch, draws: Draws, options: FinetuneOptions
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """lambda_sigma ||D(x_0 + n; sigma, c) - x_0||^2 (SF-V Eq. 1 to 3) of every clip, and the sigmas drawn."""
    sigma = log_normal_sigma(draws["normal"], options.sigma.log_mean, options.sigma.log_std)
    cond = drop_conditions(batch.cond, draws["uniform"], options.dropout)
    noisy = batch.latents + per_clip(sigma) * draws["noise"]
    error = losses.squared_error(EDMBackbone(network, cond)(noisy, sigma), batch.latents)
    return losses.denoising_weight(sigma, options.min_snr_gamma) * error, sigma


def log_normal_sigma(normal: Float[Array, " b"], log_mean: float, log_std: float) -> Float[Array, " b"]:
    """Noise levels with ln sigma ~ N(P_mean, P_std^2) (EDM Table 1, the training distribution of SF-V Eq. 1)."""
    return jnp.exp(log_mean + log_std * normal)


def drop_conditions(cond: Conditioning, uniform: Float[Array, " b"], dropout: DropoutOptions) -> Conditioning:
    """Conditions without the CLIP embedding, the image latents (zeros in their place) or both, clip by clip.

    The three cases exclude one another and take the first, second and third stretch of [0, 1). With each of them, as in
    InstructPix2Pix, a network can be guided by either condition; SVD's guidance needs only `both`.
    The added time ids are always kept.

    Args:
        uniform: random numbers in [0, 1).
    """
    embedding_end = dropout.embedding
    latents_end = embedding_end + dropout.latents
    both = (uniform >= latents_end) & (uniform < latents_end + dropout.both)
    no_embedding = (uniform < embedding_end) | both
    no_latents = ((uniform >= embedding_end) & (uniform < latents_end)) | both
    return dataclasses.replace(
        cond,
        image_embedding=jnp.where(no_embedding[:, None], 0.0, cond.image_embedding),
        image_latents=jnp.where(no_latents[:, None, None, None], 0.0, cond.image_latents),
    )


def band_sums(loss: Float[Array, " b"], sigma: Float[Array, " b"]) -> Metrics:
    """For every band of noise levels the sum of its clips' losses and their number, each divided by the batch."""
    sums = {}
    for name, (low, high) in BANDS.items():
        inside = (sigma >= low) & (sigma < high)
        # Not a product: the loss of another band may be infinite.
        sums[f"sum_{name}"] = jnp.where(inside, loss, 0.0).mean()
        sums[f"count_{name}"] = inside.mean(dtype=jnp.float32)
    return sums


def band_means(sums: Metrics) -> Metrics:
    """The mean loss of every band; NaN for one that no clip of the batch fell into."""
    return {f"{BAND_METRIC}{name}": sums[f"sum_{name}"] / sums[f"count_{name}"] for name in BANDS}
