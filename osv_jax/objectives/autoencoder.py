"""Training of the VAE: all of it as an autoencoder of images, or the temporal decoder alone, on clips."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from osv_jax.models.svd_vae import SVDVAE
from osv_jax.objectives.networks import Params
from osv_jax.objectives.players import global_norm

Metrics = dict[str, Array]
# Of two batches of images in [-1, 1], image by image.
Distance = Callable[[Array, Array], Array]
PARTS = ("all", "decoder")


@struct.dataclass
class VAEState:
    """Everything that a checkpoint holds of a run.

    Attributes:
        step: optimizer steps done.
        params: of `SVDVAE`, float32.
        optimizer: state of the optimizer, over `trained_part(params)`.
    """

    step: Int[Array, ""]
    params: Params
    optimizer: optax.OptState


def trained_part(params: Params, train: str) -> Params:
    """The parameters that learn: all, or the decoder's, the latents then staying as they are."""
    return {name: part for name, part in params.items() if train == "all" or name == "decoder"}


def make_step(
    vae: SVDVAE,
    optimizer: optax.GradientTransformation,
    weights: Mapping[str, float],
    train: str,
    perceptual: Distance | None = None,
) -> Callable[[VAEState, Array, jax.Array], tuple[VAEState, Metrics]]:
    """The step `(state, video [b f h w 3] in [-1, 1], key) -> (state, metrics)`.

    Args:
        weights: of the losses that `vae_losses` names.
        train: one of `PARTS`.
        perceptual: see `vae_losses`.
    """

    def mean_loss(part: Params, rest: Params, video: Array, key: jax.Array) -> tuple[Array, Metrics]:
        losses = vae_losses(vae, {**rest, **part}, video, key, perceptual)
        means = {name: loss.mean() for name, loss in losses.items()}
        total = sum(weights[name] * mean for name, mean in means.items())
        return total, {"loss": total} | {f"loss_{name}": mean for name, mean in means.items()}

    def step(state: VAEState, video: Array, key: jax.Array) -> tuple[VAEState, Metrics]:
        part = trained_part(state.params, train)
        gradient, metrics = jax.grad(mean_loss, has_aux=True)(part, state.params, video, key)
        updates, opt_state = optimizer.update(gradient, state.optimizer, part)
        params = {**state.params, **optax.apply_updates(part, updates)}
        metrics |= {"grad_norm": global_norm(gradient), "param_norm": global_norm(params)}
        return VAEState(step=state.step + 1, params=params, optimizer=opt_state), metrics

    return step


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
        perceptual: a distance of images, whose mean over each clip's frames is then there as `lpips`.
    """
    b, f, *image = video.shape
    mean, logvar = vae.apply({"params": params}, video.reshape(-1, *image), method="encode")
    latents = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
    output = vae.apply({"params": params}, latents.reshape(b, f, *latents.shape[1:]), method="decode")
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
    """Convolutions along the frames that at first see one frame only.

    A VAE that is trained on images then decodes clips as well, frame by frame: its gradients with respect to what is
    zero here are zero, for an image has no neighbours.
    """

    def middle(leaf: Array) -> Array:
        if leaf.ndim != 5:
            return leaf
        mask = jnp.arange(leaf.shape[0]) == leaf.shape[0] // 2
        return leaf * mask[:, None, None, None, None].astype(leaf.dtype)

    return jax.tree.map(middle, params)


def frame_psnr(output: Float[Array, "b f h w 3"], video: Float[Array, "b f h w 3"]) -> Float[Array, "b f"]:
    """Peak signal to noise ratio [dB] of every frame in [-1, 1], the output clipped to that."""
    error = jnp.mean((output.clip(-1, 1) - video) ** 2, axis=(2, 3, 4))
    return 10 * jnp.log10(4 / error)
