"""How to make a video of a prompt: what can be chosen, and what stands for what was not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from osv_jax.diffusion.ddpm import NUM_TIMES
from osv_jax.errors import UserError
from osv_jax.inference.options import RANGES, check_size
from osv_jax.runtime.ranges import FINITE

TEXT_SAMPLERS = ("ddim", "few-step")
GUIDANCE_SCALE = 7.5
# Of each sampler: steps when nothing is said, those of the paper's teacher and student; and the most there can be.
DEFAULT_STEPS = {"ddim": 25, "few-step": 4}
_MOST_STEPS = {"ddim": NUM_TIMES // 2, "few-step": NUM_TIMES}
# AnimateDiff's clips.
_OWN = {"height": 512, "width": 512, "num_frames": 16, "fps": 8}

_SHARED = ("steps", "height", "width", "num_frames", "fps", "decode_chunk_size")
_RANGES = {name: RANGES[name] for name in _SHARED} | {"guidance_scale": FINITE}


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """How to make a video of a prompt; None is the model's own.

    Attributes:
        sampler: `ddim`, AnimateDiff's, with guidance; or `few-step`, a student's (AVDM2 section 4.1), without. By
            default few-step for what a run trained.
        steps: of the sampler: 25 for DDIM, 4 for a student.
        guidance_scale: DDIM's, 7.5 by default; 1 or less is none, as in diffusers.
        height, width: size of the video [px]; the size it was trained at here, or else 512 x 512.
        num_frames: those it was trained on here, or else 16.
        fps: frames a second, that videos are played at; those it was trained on here, or else 8.
        decode_chunk_size: frames decoded at a time: fewer take less memory.

    Raises:
        UserError: an unknown sampler, a number that is not in its range, or guidance for a student.
    """

    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    decode_chunk_size: int = 4

    def __post_init__(self) -> None:
        if self.sampler not in (None, *TEXT_SAMPLERS):
            raise UserError(f"sampler={self.sampler!r} is not one of {', '.join(TEXT_SAMPLERS)}, those of prompts.")
        for name, allowed in _RANGES.items():
            if (value := getattr(self, name)) is not None:
                allowed.check(name, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompleteTextOptions(TextOptions):
    """Options that leave nothing to the model; see `complete`."""

    sampler: str
    steps: int
    guidance_scale: float
    height: int
    width: int
    num_frames: int
    fps: float

    @property
    def guided(self) -> bool:
        """Whether the network is evaluated for the negative prompt, too (diffusers' rule)."""
        return self.guidance_scale > 1

    @property
    def num_evaluations(self) -> int:
        """Network evaluations a video (NFE)."""
        return self.steps * (2 if self.guided else 1)


def complete(
    options: TextOptions,
    own: Mapping[str, Any],
    downscale: int,
    max_frames: int,
    is_student: bool = False,
    context: int = 1,
) -> CompleteTextOptions:
    """The options with a model's own values for what is not said.

    Args:
        own: of the clips that it was trained on here, as far as they are known.
        downscale: the VAE's factor.
        max_frames: that the motion adapter has positions for.
        is_student: whether a run has trained it.
        context: devices that share a video's height.

    Raises:
        UserError: a size that the VAE cannot make, too many steps or frames, guidance for a student.
    """
    said = {name: value for name, value in vars(options).items() if value is not None}
    sampler = said.get("sampler", "few-step" if is_student else "ddim")
    if sampler == "few-step" and said.get("guidance_scale", 1) > 1:
        raise UserError("guidance_scale is for sampler=ddim: a few-step student is sampled without guidance.")
    steps, scale = DEFAULT_STEPS[sampler], GUIDANCE_SCALE if sampler == "ddim" else 1.0
    defaults: dict[str, Any] = {**_OWN, **own, "sampler": sampler, "steps": steps, "guidance_scale": scale}
    made = CompleteTextOptions(**defaults | said)
    check_size(made.height, made.width, downscale, context)
    if made.steps > _MOST_STEPS[sampler]:
        raise UserError(f"steps={made.steps} is too many for {sampler}: at most {_MOST_STEPS[sampler]}.")
    if made.num_frames > max_frames:
        raise UserError(
            f"num_frames={made.num_frames} is too many for this motion adapter, which has positions for {max_frames}."
        )
    return made
