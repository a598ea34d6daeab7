"""How to make a video: what can be chosen, and what stands for what was not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from osv_jax.diffusion import samplers
from osv_jax.errors import UserError
from osv_jax.inference.trained import Trained
from osv_jax.models.svd_unet import UNetConfig
from osv_jax.runtime.ranges import COUNT, FINITE, FPS, MOTION_BUCKET_ID, NUM_FRAMES, PIXELS, Range

# Steps of a sampler when nothing is said: OSV's one, the teacher's 25.
DEFAULT_STEPS = {"tts": 1, "consistency": 1, "euler": 25}

# Of the fields of `Options`.
RANGES = {
    "steps": Range(1, 1000, whole=True),
    "height": PIXELS,
    "width": PIXELS,
    "num_frames": NUM_FRAMES,
    "fps": FPS,
    "motion_bucket_id": MOTION_BUCKET_ID,
    "noise_aug_strength": Range(0, 10),
    "min_guidance_scale": FINITE,
    "max_guidance_scale": FINITE,
    "decode_chunk_size": COUNT,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How to make a video; None is the model's own.

    Attributes:
        sampler: `tts` (OSV's Time Travel Sampler, Eq. 13), `consistency`, or `euler` (SVD's, with guidance).
        steps: of the sampler: 1 by default, 25 for Euler.
        height, width: size of the video [px]; the size it was trained at here, or else 576 x 1024.
        num_frames: those the UNet was trained on.
        fps: frames a second, which SVD is told and videos are played at; those it was trained on here, or else 7.
        motion_bucket_id: SVD's amount of motion, 1 to 255.
        noise_aug_strength: standard deviation of the noise on the image that the VAE sees.
        min_guidance_scale, max_guidance_scale: Euler's guidance weight at the first and at the last frame.
        decode_chunk_size: frames decoded at a time: fewer take less memory, more are more consistent.

    Raises:
        UserError: an unknown sampler, or a number that is not in its range.
    """

    sampler: str = "tts"
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    motion_bucket_id: float = 127
    noise_aug_strength: float = 0.02
    min_guidance_scale: float = 1.0
    max_guidance_scale: float = 3.0
    decode_chunk_size: int = 7

    def __post_init__(self) -> None:
        if self.sampler not in samplers.SAMPLERS:
            raise UserError(f"sampler={self.sampler!r} is not one of {', '.join(samplers.SAMPLERS)}.")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if value is not None or defaults[name] is not None:
                allowed.check(name, value)

    @property
    def guided(self) -> bool:
        """Whether the sampler evaluates the network without its condition, too (diffusers' rule)."""
        return self.sampler == "euler" and self.max_guidance_scale > 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompleteOptions(Options):
    """Options that leave nothing to the model; see `complete`."""

    steps: int
    height: int
    width: int
    num_frames: int
    fps: float

    @property
    def num_evaluations(self) -> int:
        """Network evaluations a video (NFE)."""
        return samplers.num_evaluations(self.sampler, self.steps, self.guided)


def own_video(unet: UNetConfig, stored: Mapping[str, Any], trained: Trained) -> dict[str, Any]:
    """`height`, `width`, `num_frames` and `fps` of the clips that a model was trained on, or else SVD's.

    Args:
        stored: of the weights; see `weights.load_video`.
        trained: what is merged into the UNet, whose clips were seen last.
    """
    own = {"height": 576, "width": 1024, "num_frames": unet.num_frames, "fps": 7}
    return own | dict(stored) | trained.video


def complete(
    options: Options, own: Mapping[str, Any], downscale: int, num_levels: int, context: int = 1
) -> CompleteOptions:
    """The options with a model's own values for what is not said.

    Args:
        own: see `own_video`.
        downscale: the VAE's factor.
        num_levels: of the noise that the model was trained with.
        context: devices that share a video's height.

    Raises:
        UserError: a size that the VAE cannot make, or more steps than the sampler has noise levels.
    """
    said = {name: value for name, value in vars(options).items() if value is not None}
    made = CompleteOptions(**({"steps": DEFAULT_STEPS[options.sampler], **own} | said))
    check_size(made.height, made.width, downscale, context)
    most = samplers.max_steps(made.sampler, num_levels)
    if most is not None and made.steps > most:
        raise UserError(f"steps={made.steps} is too many for {made.sampler}: at most {most}.")
    return made


def check_size(height: int, width: int, downscale: int, context: int) -> None:
    """Raises UserError unless the VAE can make such frames, and `context` devices can share them."""
    for name, value in (("height", height), ("width", width)):
        if value % downscale:
            raise UserError(f"{name}={value} is not divisible by {downscale}, the VAE's factor: use a multiple of it.")
    rows = height // downscale
    if rows % context:
        raise UserError(
            f"context={context} does not divide the {rows} rows of latents of height={height}: use a divisor of {rows},"
            " or another height."
        )
