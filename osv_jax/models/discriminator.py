"""The video discriminator of OSV: latents -> learned upsampling -> frozen image backbone -> small trainable heads.

Only the upsampling and the heads are here and learn (psi). The backbone (DINOv2) is passed in and stays frozen.
References: OSV Fig. 3, 4, 9 and appendix D; SF-V Table 2 for why heads look along space and along time.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from osv_jax.models.heads import Head, Projection, over_frames, over_tracks, project
from osv_jax.models.layers import Conv, Dtype, apply, parameter
from osv_jax.models.products import shares_images

# What each latent channel (rows) of Stable Diffusion contributes to red, green and blue in [-1, 1].
_LATENT_TO_RGB = np.array(
    [
        [0.3512, 0.2297, 0.3227],
        [0.3250, 0.4974, 0.2350],
        [-0.2829, 0.1762, 0.2721],
        [-0.2120, -0.2616, -0.7177],
    ],
    np.float32,
)
_IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)

Logits = dict[str, Float[Array, "b n"]]


class Discriminator(nn.Module):
    """The trainable part: `upsampler`, `spatial_<level>`, `temporal_<level>`.

    Variables: `params`, and `spectral`, which holds the estimated first singular vector of every head convolution.

    Args (attributes):
        blocks: the backbone's blocks whose features are judged, counted from 0; a level each.
        read: which tokens of the backbone are judged, see `Dinov2`.
        upscale: side of the sub-pixel upsampling (r of Fig. 9).
        condition_width: of the projection of a condition, as in ADD; 0: logits depend on no condition.
        dtype: of the computation; logits are float32 always.
    """

    blocks: tuple[int, ...] = (2, 5, 8, 11)
    read: str = "patches"
    upscale: int = 4
    condition_width: int = 0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.upsampler = _Upsampler(self.upscale, **dtypes)
        values = self.condition_width or 1
        self.spatial = [Head((3, 3), values, **dtypes) for _ in self.blocks]
        self.temporal = [Head((3,), values, **dtypes) for _ in self.blocks]
        if self.condition_width:
            self.condition = Projection(self.condition_width, **dtypes)

    def __call__(
        self,
        latents: Float[Array, "b f h w 4"],
        features: tuple[Float[Array, "b f gh gw c"], ...],
        condition: Float[Array, "b k"] | None = None,
    ) -> tuple[Float[Array, "b f H W 3"], Logits]:
        """Both halves one after the other; only `init` needs it."""
        return self.pixels(latents), self.score(features, False, condition)

    def pixels(self, latents: Float[Array, "b f h w 4"]) -> Float[Array, "b f H W 3"]:
        """Frames, about in [0, 1] and `upscale` times as large, of scaled latents."""
        return (self.upsampler(latents).astype(jnp.float32) + 1) / 2

    def score(
        self,
        features: tuple[Float[Array, "b f gh gw c"], ...],
        update_stats: bool,
        condition: Float[Array, "b k"] | None = None,
    ) -> Logits:
        """The heads' logits, all levels one after the other along n.

        Args:
            features: one array a level.
            update_stats: improve the singular vectors by one power iteration first; `spectral` must be mutable then.
            condition: where `condition_width` is not 0.

        Raises:
            UserError: on features whose width is not a multiple of 32 (the norms' groups).
            ValueError: on another number of levels than `blocks` has, or a condition too many or too few.
        """
        spatial, temporal = [], []
        for x, spatial_head, temporal_head in zip(features, self.spatial, self.temporal, strict=True):
            spatial.append(over_frames(spatial_head, x, update_stats))
            temporal.append(over_tracks(temporal_head, x, update_stats))
        if (condition is None) == bool(self.condition_width):
            raise ValueError("A condition is needed where condition_width is not 0, and only there.")
        if condition is not None:
            projection = self.condition(condition)[:, None, None, None]
            spatial, temporal = ([project(x, projection) for x in values] for values in (spatial, temporal))
        else:
            spatial, temporal = ([x.reshape(x.shape[0], -1) for x in values] for values in (spatial, temporal))
        return {"spatial": jnp.concatenate(spatial, axis=1), "temporal": jnp.concatenate(temporal, axis=1)}


class _Upsampler(nn.Module):
    """Sub-pixel convolution to RGB; starts as the linear latent-to-RGB map, every latent pixel repeated."""

    upscale: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, latents: Float[Array, "b f h w 4"]) -> Float[Array, "b f H W 3"]:
        features = 3 * self.upscale**2

        def start(_key: PRNGKeyArray) -> Float[Array, "3 3 4 features"]:
            kernel = np.zeros((3, 3, len(_LATENT_TO_RGB), features), np.float32)
            kernel[1, 1] = np.repeat(_LATENT_TO_RGB, self.upscale**2, axis=1)
            return jnp.asarray(kernel, self.param_dtype)

        params = {"kernel": self.param("kernel", start)}
        params["bias"] = parameter(self, "bias", nn.initializers.zeros, (features,), self.param_dtype)
        x = apply(Conv(features, (3, 3), dtype=self.dtype, parent=None), {"params": params}, latents)
        return pixel_shuffle(x, self.upscale)


def pixel_shuffle(x: Float[Array, "*batch h w crr"], upscale: int) -> Float[Array, "*batch H W c"]:
    """Each pixel's channels, ordered (colour, row, column), become an `upscale` x `upscale` block (as in PyTorch)."""
    *batch, height, width, channels = x.shape
    x = x.reshape(-1, height, width, channels // upscale**2, upscale, upscale)
    x = x.transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(*batch, height * upscale, width * upscale, -1)


def init_discriminator(
    disc: Discriminator, key: PRNGKeyArray, feature_width: int, condition_size: int = 0
) -> dict[str, Any]:
    """Fresh variables, `params` and `spectral`, for a backbone whose features are `feature_width` wide.

    Args:
        condition_size: numbers in the condition, where the discriminator has one.
    """
    latents = jnp.zeros((1, 1, 1, 1, len(_LATENT_TO_RGB)))
    features = (jnp.zeros((1, 1, 1, 1, feature_width)),) * len(disc.blocks)
    return dict(disc.init(key, latents, features, jnp.zeros((1, condition_size)) if condition_size else None))


def discriminate(
    disc: Discriminator,
    backbone: nn.Module,
    disc_variables: dict[str, Any],
    backbone_params: dict[str, Any],
    latents: Float[Array, "b f h w 4"],
    update_stats: bool,
) -> tuple[Logits, dict[str, Any]]:
    """Judges latent videos.

    Args:
        disc, disc_variables: the trainable part; variables as `init_discriminator` makes them.
        backbone, backbone_params: see `backbone_features`; no gradient reaches the parameters.
        latents: scaled latents.
        update_stats: whether this call improves the spectral statistics (in training, once a discriminator update).

    Returns:
        The logits of all heads (`spatial` and `temporal`; positive means real), and the collection `spectral` to
        store: the one passed in unless `update_stats`.
    """
    pixels = apply(disc, disc_variables, latents, method="pixels")
    return discriminate_pixels(disc, backbone, disc_variables, backbone_params, pixels, update_stats)


def discriminate_pixels(
    disc: Discriminator,
    backbone: nn.Module,
    disc_variables: dict[str, Any],
    backbone_params: dict[str, Any],
    pixels: Float[Array, "b f h w 3"],
    update_stats: bool,
) -> tuple[Logits, dict[str, Any]]:
    """Judges videos in [0, 1] of any size, e.g. decoded ones (the discriminator of ADD); else as `discriminate`."""
    features = backbone_features(backbone, lax.stop_gradient(backbone_params), pixels, disc.blocks, disc.read)
    return discriminate_features(disc, disc_variables, features, update_stats)


def discriminate_features(
    disc: Discriminator,
    disc_variables: dict[str, Any],
    features: tuple[Float[Array, "b f gh gw c"], ...],
    update_stats: bool,
    condition: Float[Array, "b k"] | None = None,
) -> tuple[Logits, dict[str, Any]]:
    """Judges videos by their features, see `backbone_features`; else as `discriminate`."""
    arguments = (disc_variables, features, update_stats, condition)
    if not update_stats:
        return apply(disc, *arguments, method="score"), disc_variables["spectral"]
    logits, updated = apply(disc, *arguments, method="score", mutable=["spectral"])
    return logits, updated["spectral"]


def backbone_features(
    backbone: nn.Module,
    params: dict[str, Any],
    pixels: Float[Array, "b f h w 3"],
    blocks: tuple[int, ...],
    read: str = "patches",
) -> tuple[Float[Array, "b f *grid c"], ...]:
    """What a discriminator is given of the frames of videos in [0, 1] of any size: features of some blocks.

    The backbone is any module with `config.patch_size` that maps ImageNet-normalised images [n h w 3], block numbers
    and `read` (see `Dinov2`) to a tuple of [n gh gw c], or [n c].
    """
    batch, frames = pixels.shape[:2]
    pixels = _share_out(pixels)
    images = (pixels.reshape(-1, *pixels.shape[2:]) - _IMAGENET_MEAN) / _IMAGENET_STD
    images = _resize_to_patches(images, backbone.config.patch_size)
    features = apply(backbone, {"params": params}, images, blocks, read)
    return tuple(x.reshape(batch, frames, *x.shape[1:]) for x in features)


def _share_out(pixels: Float[Array, "b f h w 3"]) -> Float[Array, "b f h w 3"]:
    """Devices that share a clip's height share its frames from here on, or each would compute the backbone of all.

    It attends within an image, whose tokens cannot be split, and computes nothing across images.
    """
    if not shares_images():
        return pixels
    # By height up to here: or the frames would be shared out, by propagation, in parts of the UNet as well.
    pixels = lax.with_sharding_constraint(pixels, PartitionSpec(("data", "fsdp"), None, "context"))
    return lax.with_sharding_constraint(pixels, PartitionSpec(("data", "fsdp"), "context"))


def _resize_to_patches(images: Float[Array, "n h w 3"], patch: int) -> Float[Array, "n H W 3"]:
    """Bilinear, without antialiasing, to the nearest multiples of the patch size (halves go up; at least one patch)."""
    n, *sides, channels = images.shape
    height, width = (max(1, (side + patch // 2) // patch) * patch for side in sides)
    return jax.image.resize(images, (n, height, width, channels), "bilinear", antialias=False)
