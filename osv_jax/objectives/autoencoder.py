"""Training of the VAE: all of it on images, or its temporal decoder alone on clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from osv_jax.models.layers import apply
from osv_jax.models.svd_vae import SVDVAE
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Metrics, Objective, register
from osv_jax.objectives.options import NUM_STEPS, setting
from osv_jax.objectives.players import Player, TrainState, global_norm, start
from osv_jax.runtime.media import to_float
from osv_jax.runtime.ranges import NOT_NEGATIVE

# Of two batches of images in [-1, 1], image by image.
Distance = Callable[[Array, Array], Array]
PARTS = ("all", "decoder")


@dataclasses.dataclass(frozen=True)
class AutoencoderOptions:
    """Hyperparameters of the VAE's training.

    Attributes:
        train: the parameters that learn: `all`, or those of the `decoder`, which leaves the latents as they are.
        learning_rate: at the beginning; it falls to 0 at the end of `num_steps`, along a cosine.
        num_steps: of the run.
        kl_weight, lpips_weight: weights of the losses of `vae_losses`; that of `l1` is 1.
    """

    train: str = setting("all", PARTS)
    learning_rate: float = setting(1e-3, NOT_NEGATIVE)
    num_steps: int = setting(3000, NUM_STEPS)
    kl_weight: float = setting(1e-6, NOT_NEGATIVE)
    lpips_weight: float = setting(0.0, NOT_NEGATIVE)


@register
class Autoencoder(Objective):
    """Reconstruction of images or clips. Its player is the part of the VAE that learns; the rest is frozen.

    Args:
        perceptual: see `vae_losses`; needed where `lpips_weight` is not 0.
    """

    name = "autoencoder"
    Options = AutoencoderOptions
    components = ("vae",)
    curves = ("loss_l1", "loss_kl")
    product = "vae"

    def __init__(
        self,
        vae: SVDVAE,
        options: AutoencoderOptions,
        optimizers: Mapping[str, optax.GradientTransformation] | None = None,
        perceptual: Distance | None = None,
    ):
        super().__init__(vae, options, optimizers)
        self.perceptual = perceptual

    def make_optimizers(self) -> dict[str, optax.GradientTransformation]:
        rate = optax.cosine_decay_schedule(self.options.learning_rate, self.options.num_steps)
        return {"vae": optax.adam(rate)}

    def init(self, key: jax.Array, frozen: Params) -> dict[str, Player]:
        """The VAE's parameters in `frozen`, or the part of them that learns."""
        return {"vae": start(trained_part(frozen["vae"], self.options.train), self.optimizers["vae"])}

    def batch(
        self, frozen: Params, clips: Mapping[str, Array], key: jax.Array, data: ConfigDict
    ) -> Float[Array, "b f h w 3"]:
        """A random crop of each clip, in [-1, 1]."""
        height, width = data.crop
        return random_crop(to_float(clips["video"]), height, width, key)

    def step(self, state: TrainState, frozen: Params, batch: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
        return step(self, state, frozen, batch, key)


def trained_part(params: Params, train: str) -> Params:
    """The parameters that learn: all, or the decoder's."""
    return {name: part for name, part in params.items() if train == "all" or name == "decoder"}


def step(
    objective: Autoencoder, state: TrainState, frozen: Params, video: Float[Array, "b f h w 3"], key: jax.Array
) -> tuple[TrainState, Metrics]:
    """One update on clips in [-1, 1]."""
    player = state.players["vae"]
    gradient, metrics = jax.grad(mean_loss, has_aux=True)(player.params, objective, frozen["vae"], video, key)
    player = player.update(gradient, objective.optimizers["vae"])
    norm = global_norm({**frozen["vae"], **player.params})
    metrics |= {"grad_norm": global_norm(gradient), "param_norm": norm}
    return TrainState(step=state.step + 1, players={"vae": player}), metrics


def mean_loss(
    part: Params, objective: Autoencoder, rest: Params, video: Float[Array, "b f h w 3"], key: jax.Array
) -> tuple[Float[Array, ""], Metrics]:
    """The weighted sum of `vae_losses`, each a mean over the clips."""
    options = objective.options
    weights = {"l1": 1.0, "kl": options.kl_weight, "lpips": options.lpips_weight}
    losses = vae_losses(objective.networks, {**rest, **part}, video, key, objective.perceptual)
    means = {name: loss.mean() for name, loss in losses.items()}
    total = sum(weights[name] * mean for name, mean in means.items())
    return total, {"loss": total} | {f"loss_{name}": mean for name, mean in means.items()}


def vae_losses(
    vae: SVDVAE,
    params: Params,
    video: Float[Array, "b f h w 3"],
    key: jax.Array,
    perceptual: Distance | None = None,
) -> dict[str, Float[Array, " b"]]:
    """`l1`: mean absolute error of every clip's reconstruction; `kl`: KL divergence of its latents from N(0, 1).

    The KL divergence is the sum over a clip's latents divided by the number of its PIXEL values, so that its weight is
    that of latent diffusion's code (1e-6), which sums both (Rombach et al. 2022, appendix G).

    Args:
        perceptual: a distance of images; its mean over each clip's frames is then returned as `lpips`.
    """
    b, f, *image = video.shape
    mean, logvar = apply(vae, {"params": params}, video.reshape(-1, *image), method="encode")
    latents = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
    output = apply(vae, {"params": params}, latents.reshape(b, f, *latents.shape[1:]), method="decode")
    output = output.astype(jnp.float32)
    losses = {
        "l1": jnp.abs(output - video).reshape(b, -1).mean(axis=1),
        "kl": gaussian_kl(mean, logvar).reshape(b, f).sum(axis=1) / (video.size // b),
    }
    if perceptual is not None:
        distance = perceptual(output.reshape(-1, *image), video.reshape(-1, *image))
        losses["lpips"] = distance.reshape(b, f).mean(axis=1)
    return losses


def gaussian_kl(mean: Float[Array, "n h w c"], logvar: Float[Array, "n h w c"]) -> Float[Array, " n"]:
    """KL(N(mean, exp(logvar)) || N(0, 1)), summed over each image's latents (Kingma and Welling 2014, appendix B)."""
    kl = (mean**2 + jnp.exp(logvar) - 1 - logvar) / 2
    return kl.reshape(kl.shape[0], -1).sum(axis=1)


def random_crop(
    video: Float[Array, "b f h w 3"], height: int, width: int, key: jax.Array
) -> Float[Array, "b f {height} {width} 3"]:
    """A part of each clip, at random."""
    rows, columns = video.shape[2] - height, video.shape[3] - width
    top, left = jax.random.randint(key, (2, video.shape[0]), 0, jnp.array([[rows], [columns]]) + 1)

    def crop(clip: Array, top: Array, left: Array) -> Array:
        return jax.lax.dynamic_slice(clip, (0, top, left, 0), (clip.shape[0], height, width, 3))

    return jax.vmap(crop)(video, top, left)


def without_neighbours(params: Any) -> Any:
    """The parameters with temporal convolutions that see one frame only: all taps but the middle one are zero.

    A VAE that is then trained on images decodes clips as well, frame by frame: an image has no neighbours, so that the
    zero taps have no gradient.
    """

    def middle(leaf: Array) -> Array:
        if leaf.ndim != 5:
            return leaf
        mask = jnp.arange(leaf.shape[0]) == leaf.shape[0] // 2
        return leaf * mask[:, None, None, None, None].astype(leaf.dtype)

    return jax.tree.map(middle, params)


def frame_psnr(
    output: Float[Array | np.ndarray, "b f h w 3"], video: Float[Array | np.ndarray, "b f h w 3"]
) -> Float[Array, "b f"]:
    """Peak signal to noise ratio [dB] of every frame in [-1, 1], the output clipped to that."""
    error = jnp.mean((output.clip(-1, 1) - video) ** 2, axis=(2, 3, 4))
    return 10 * jnp.log10(4 / error)
