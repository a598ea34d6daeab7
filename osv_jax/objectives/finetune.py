"""SVD's own training: denoising in the EDM framework (SF-V Eq. 1 to 3), to fine-tune it or to begin from nothing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from osv_jax.diffusion.conditioning import Conditioning
from osv_jax.diffusion.edm import Network, denoise, per_clip
from osv_jax.objectives import losses
from osv_jax.objectives.accumulation import mean_over_parts, split_batch
from osv_jax.objectives.adversarial import Batch, Draws, Metrics, Step
from osv_jax.objectives.networks import Networks, Params
from osv_jax.objectives.players import Student, TrainState, global_norm, update_ema

# Lower and upper ends of the noise levels whose losses are told apart: about thirds of SVD's distribution.
BANDS = {"low": (0.0, 1.0), "mid": (1.0, 4.0), "high": (4.0, float("inf"))}
BAND_METRIC = "loss/sigma_"


@dataclasses.dataclass(frozen=True)
class FinetuneOptions:
    """Hyperparameters of denoising training.

    Attributes:
        sigma_log_mean, sigma_log_std: P_mean and P_std of ln sigma; the defaults are SVD's.
        min_snr_gamma: see `losses.denoising_weight`.
        drop_embedding, drop_latents, drop_both: probabilities with which a clip loses its CLIP embedding alone, its
            image latents alone, or both, as guidance wants it; see `drop_conditions`.
        ema_decay: of the parameters' average.
        lora_scale: alpha / rank.
        grad_accum: equal parts that a batch is worked through in, one after the other.
    """

    sigma_log_mean: float = 0.7
    sigma_log_std: float = 1.6
    min_snr_gamma: float = 0.0
    drop_embedding: float = 0.1
    drop_latents: float = 0.1
    drop_both: float = 0.1
    ema_decay: float = 0.999
    lora_scale: float = 1.0
    grad_accum: int = 1


def make_step(networks: Networks, optimizer: optax.GradientTransformation, options: FinetuneOptions) -> Step:
    """The step `(state, frozen, batch, key) -> (state, metrics)`; the state has no discriminator.

    With `grad_accum` > 1 the result is the same, for the gradient is a mean over clips.
    """

    def loss_fn(student: Student, frozen: Params, batch: Batch, draws: Draws) -> tuple[Array, Metrics]:
        network = networks.unet_with(student.variables(frozen["unet"], options.lora_scale))
        loss, sigma = denoising_loss(network, batch, draws, options)
        return loss.mean(), {"loss": loss.mean()} | band_sums(loss, sigma)

    def gradient_of_part(student: Student, frozen: Params, part: tuple[Batch, Draws]) -> tuple[Student, Metrics]:
        return jax.grad(loss_fn, has_aux=True)(student, frozen, *part)

    def step(state: TrainState, frozen: Params, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        whole = (batch, draw(key, batch))
        if options.grad_accum == 1:
            gradient, sums = gradient_of_part(state.student, frozen, whole)
        else:
            parts = split_batch(whole, options.grad_accum)
            gradient, sums = mean_over_parts(
                lambda part: gradient_of_part(state.student, frozen, part), parts, options.grad_accum
            )
        updates, opt_student = optimizer.update(gradient, state.opt_student, state.student)
        student = optax.apply_updates(state.student, updates)
        metrics = {"loss": sums["loss"]} | band_means(sums)
        metrics |= {"grad_norm/student": global_norm(gradient), "param_norm/student": global_norm(student)}
        new_state = state.replace(
            step=state.step + 1,
            student=student,
            ema=update_ema(state.ema, student, options.ema_decay),
            opt_student=opt_student,
        )
        return new_state, metrics

    return step


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
    sigma = log_normal_sigma(draws["normal"], options.sigma_log_mean, options.sigma_log_std)
    cond = drop_conditions(batch.cond, draws["uniform"], options)
    noisy = batch.latents + per_clip(sigma) * draws["noise"]
    error = losses.squared_error(denoise(network, noisy, sigma, cond), batch.latents)
    return losses.denoising_weight(sigma, options.min_snr_gamma) * error, sigma


def log_normal_sigma(normal: Float[Array, " b"], log_mean: float, log_std: float) -> Float[Array, " b"]:
    """Noise levels with ln sigma ~ N(P_mean, P_std^2) (EDM Table 1, the training distribution of SF-V Eq. 1)."""
    return jnp.exp(log_mean + log_std * normal)


def drop_conditions(cond: Conditioning, uniform: Float[Array, " b"], options: FinetuneOptions) -> Conditioning:
    """Conditions without the CLIP embedding, the image latents (zeros in their place) or both, clip by clip.

    The three cases exclude one another and take the first, second and third stretch of [0, 1). Having each of them, as
    InstructPix2Pix does, a network can be guided by either condition; SVD's guidance needs only `drop_both`.
    The added time ids are always kept.

    Args:
        uniform: random numbers in [0, 1).
    """
    embedding_end = options.drop_embedding
    latents_end = embedding_end + options.drop_latents
    both = (uniform >= latents_end) & (uniform < latents_end + options.drop_both)
    no_embedding = (uniform < embedding_end) | both
    no_latents = ((uniform >= embedding_end) & (uniform < latents_end)) | both
    return cond.replace(
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
