"""What a discriminator sees of clips: a value that an objective is given, not a branch inside its step."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from osv_jax.codec import Codec, Params
from osv_jax.diffusion.conditioning import Conditioning
from osv_jax.diffusion.edm import discretised_lognormal, network_inputs, per_clip, scalings, sigma_grid
from osv_jax.models.dinov2 import Dinov2
from osv_jax.models.discriminator import (
    Discriminator,
    backbone_features,
    discriminate,
    discriminate_features,
    init_discriminator,
)
from osv_jax.models.layers import apply
from osv_jax.models.svd_unet import SVDUNet
from osv_jax.models.unet_heads import UNetHeads
from osv_jax.objectives.losses import Logits

# T_d of SF-V.
_NOISE_LEVELS = 1000


class Judge(abc.ABC):
    """D_psi: clips to logits. What is frozen in it sees, what learns scores what has been seen."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> tuple[Params, Params]:
        """Fresh parameters and statistics of the part that learns."""

    def draw(self, key: jax.Array, shape: Sequence[int]) -> tuple[jax.Array, dict[str, Array]]:
        """A key for other uses, and the judge's own random numbers of a step, with the clips as first axis.

        Args:
            shape: of the latents, b f h w c.
        """
        return key, {}

    @abc.abstractmethod
    def see(self, frozen: Params, x: Float[Array, "b f h w c"], cond: Any, draws: dict[str, Array]) -> Any:
        """What the part that learns is given of clips: a tree with the clips as first axis.

        Args:
            frozen: parameters of the frozen networks, which no gradient reaches.
            x: scaled latents without noise: real ones, a training target, or a student's output.
            cond: `Example.judge_cond` of the clips.
            draws: what `draw` returned, for these clips.
        """

    @abc.abstractmethod
    def score(
        self, params: Params, stats: Params, frozen: Params, seen: Any, update_stats: bool = False
    ) -> tuple[Logits, Params]:
        """Logits by kind of head, positive for real, and the statistics after it.

        Args:
            params, stats: of the part that learns.
            seen: what `see` returned.
            update_stats: whether this call updates the statistics.
        """


@dataclasses.dataclass(frozen=True)
class LatentJudge(Judge):
    """Latents through a learned upsampling and DINOv2 (OSV Fig. 3, 4, 9)."""

    discriminator: Discriminator
    dinov2: Dinov2

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        variables = init_discriminator(self.discriminator, key, self.dinov2.config.hidden_size)
        return variables["params"], variables["spectral"]

    def see(self, frozen: Params, x: Float[Array, "b f h w c"], cond: Any, draws: dict[str, Array]) -> Any:
        return x

    def score(
        self, params: Params, stats: Params, frozen: Params, seen: Any, update_stats: bool = False
    ) -> tuple[Logits, Params]:
        variables = {"params": params, "spectral": stats}
        return discriminate(self.discriminator, self.dinov2, variables, frozen["dinov2"], seen, update_stats)


@dataclasses.dataclass(frozen=True)
class PixelJudge(LatentJudge):
    """Pixels decoded by the VAE through DINOv2 (OSV Table 2e). No learned upsampling."""

    codec: Codec

    def features(
        self, frozen: Params, x: Float[Array, "b f h w c"], blocks: tuple[int, ...], read: str
    ) -> tuple[Array, ...]:
        """DINOv2's of the decoded frames, see `backbone_features`."""
        frozen = jax.lax.stop_gradient({name: frozen[name] for name in ("vae", "dinov2")})
        pixels = (self.codec.decode_video(frozen["vae"], x) + 1) / 2
        return backbone_features(self.dinov2, frozen["dinov2"], pixels, blocks, read)

    def see(self, frozen: Params, x: Float[Array, "b f h w c"], cond: Any, draws: dict[str, Array]) -> Any:
        return self.features(frozen, x, self.discriminator.blocks, self.discriminator.read)

    def score(
        self, params: Params, stats: Params, frozen: Params, seen: Any, update_stats: bool = False
    ) -> tuple[Logits, Params]:
        return discriminate_features(self.discriminator, {"params": params, "spectral": stats}, seen, update_stats)


@dataclasses.dataclass(frozen=True)
class ConditionedPixelJudge(PixelJudge):
    """As `PixelJudge`, with logits that depend on the image too, by projection (ADD, section 3.1).

    It has to be given `condition` for its condition.
    """

    clip_width: int

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        width = self.dinov2.config.hidden_size
        variables = init_discriminator(self.discriminator, key, width, width + self.clip_width)
        return variables["params"], variables["spectral"]

    def condition(self, frozen: Params, cond: Conditioning) -> Float[Array, "b k"]:
        """DINOv2's class token of the decoded image, and the image's CLIP embedding."""
        image = cond.image_latents[:, None] * self.codec.vae.config.scaling_factor
        (token,) = self.features(frozen, image, (self.dinov2.config.num_hidden_layers - 1,), "class")
        return jnp.concatenate([token[:, 0].astype(jnp.float32), cond.image_embedding], axis=-1)

    def see(self, frozen: Params, x: Float[Array, "b f h w c"], cond: Any, draws: dict[str, Array]) -> Any:
        return super().see(frozen, x, cond, draws), cond

    def score(
        self, params: Params, stats: Params, frozen: Params, seen: Any, update_stats: bool = False
    ) -> tuple[Logits, Params]:
        features, condition = seen
        variables = {"params": params, "spectral": stats}
        return discriminate_features(self.discriminator, variables, features, update_stats, condition)


@dataclasses.dataclass(frozen=True)
class UNetJudge(Judge):
    """Noised latents through the frozen teacher's UNet, and heads after its blocks (SF-V section 3.2; LADD).

    Attributes:
        heads: the part that learns.
        unet: the module that is the teacher with the parameters `frozen["unet"]`.
        blocks: whose features are seen, of `svd_unet.FEATURES`.
        log_mean, log_std: of the noise that is added, see `edm.discretised_lognormal`.
    """

    heads: UNetHeads
    unet: SVDUNet
    blocks: str
    log_mean: float
    log_std: float

    @property
    def levels(self) -> Float[np.ndarray, " n"]:
        """sigma'_1 .. sigma'_{T_d - 1} (Eq. 5 with T_d = 1,000)."""
        return sigma_grid(_NOISE_LEVELS)[1:]

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        config = self.unet.config
        widths = [*config.block_out_channels]
        if self.blocks == "unet":
            widths += [widths[-1], *reversed(widths)]
        features = tuple(jnp.zeros((1, 1, 1, 1, width)) for width in widths)
        variables = self.heads.init(key, features, jnp.zeros((1, config.cross_attention_dim)), jnp.zeros(1), False)
        return variables["params"], variables["spectral"]

    def draw(self, key: jax.Array, shape: Sequence[int]) -> tuple[jax.Array, dict[str, Array]]:
        key, level_key, noise_key = jax.random.split(key, 3)
        levels = self.levels
        probabilities = jnp.asarray(discretised_lognormal(levels, self.log_mean, self.log_std))
        index = jax.random.choice(level_key, len(levels), (shape[0],), p=probabilities)
        return key, {"judge_index": index, "judge_noise": jax.random.normal(noise_key, shape)}

    def see(self, frozen: Params, x: Float[Array, "b f h w c"], cond: Any, draws: dict[str, Array]) -> Any:
        level = jnp.asarray(self.levels)[draws["judge_index"]]
        noisy = x + per_clip(level) * draws["judge_noise"]
        network = functools.partial(apply, self.unet, {"params": jax.lax.stop_gradient(frozen["unet"])})
        features = network(*network_inputs(noisy, level, cond), features=self.blocks)
        return features, cond.image_embedding, scalings(level).c_noise

    def score(
        self, params: Params, stats: Params, frozen: Params, seen: Any, update_stats: bool = False
    ) -> tuple[Logits, Params]:
        inputs = ({"params": params, "spectral": stats}, *seen)
        if not update_stats:
            return apply(self.heads, *inputs, False), stats
        logits, updated = apply(self.heads, *inputs, True, mutable=["spectral"])
        return logits, updated["spectral"]


@dataclasses.dataclass(frozen=True)
class FramesJudge(Judge):
    """A judge that sees `count` consecutive frames of each clip, starting at a random one in every step."""

    judge: Judge
    count: int

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        return self.judge.init(key)

    def draw(self, key: jax.Array, shape: Sequence[int]) -> tuple[jax.Array, dict[str, Array]]:
        key, frame_key = jax.random.split(key)
        clips, frames, *rest = shape
        key, draws = self.judge.draw(key, (clips, self.count, *rest))
        return key, draws | {"first_frame": draw_first_frame(frame_key, clips, frames, self.count)}

    def see(self, frozen: Params, x: Float[Array, "b f h w c"], cond: Any, draws: dict[str, Array]) -> Any:
        return self.judge.see(frozen, frames_from(x, draws["first_frame"], self.count), cond, draws)

    def score(
        self, params: Params, stats: Params, frozen: Params, seen: Any, update_stats: bool = False
    ) -> tuple[Logits, Params]:
        return self.judge.score(params, stats, frozen, seen, update_stats)


def draw_first_frame(key: jax.Array, clips: int, num_frames: int, seen: int) -> Int[Array, " b"]:
    """Where the `seen` consecutive frames of each clip begin, uniform over all places."""
    return jax.random.randint(key, (clips,), 0, num_frames - seen + 1)


def frames_from(clips: Float[Array, "b f h w c"], first: Int[Array, " b"], count: int) -> Float[Array, "b n h w c"]:
    """`count` consecutive frames of each clip, from its own `first` on."""
    return jax.vmap(lambda clip, start: jax.lax.dynamic_slice_in_dim(clip, start, count))(clips, first)


def real_and_fake(
    judge: Judge, params: Params, stats: Params, frozen: Params, real: Any, fake: Any
) -> tuple[Logits, Logits, Params]:
    """Logits of real and of fake clips in one batch, and the statistics after it.

    Args:
        real, fake: what `Judge.see` returned of them.
    """
    # Side by side for each clip, so that a sharded batch stays where it is.
    pairs = jax.tree.map(lambda one, other: jnp.stack([one, other], axis=1).reshape(-1, *one.shape[1:]), real, fake)
    logits, stats = judge.score(params, stats, frozen, pairs, update_stats=True)
    logits = {kind: values.reshape(-1, 2, values.shape[-1]) for kind, values in logits.items()}
    real_logits, fake_logits = ({kind: values[:, i] for kind, values in logits.items()} for i in (0, 1))
    return real_logits, fake_logits, stats
