"""What the page of prompts computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from jaxtyping import UInt8

from osv_jax.errors import UserError
from osv_jax.inference import prompts
from osv_jax.inference.text_options import DEFAULT_STEPS, CompleteTextOptions, TextOptions
from osv_jax.inference.text_to_video import PARTS, TextToVideo
from osv_jax.web.studio import Request, Size, Studio

# A longer prompt is refused; the text encoder sees 77 tokens of it.
MAX_LETTERS = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRequest(Request):
    """What one person wants to see, and to see nothing of; how far guidance goes between them, where there is any."""

    prompt: str
    negative_prompt: str = ""
    guidance_scale: float


class TextStudio(Studio[TextRequest]):
    """Videos of prompts."""

    default_steps = DEFAULT_STEPS
    student_sampler, teacher_sampler = "few-step", "ddim"
    # Two prompts of letters of up to four bytes, and what stands around them.
    max_bytes = 2 * 4 * MAX_LETTERS
    _pipeline, _options, _parts = TextToVideo, TextOptions, PARTS

    def _inputs(self, request: TextRequest, plan: Mapping[str, CompleteTextOptions]) -> dict[str, Any]:
        prompts.check_prompts([request.prompt], request.negative_prompt)
        for text in (request.prompt, request.negative_prompt):
            if len(text) > MAX_LETTERS:
                raise UserError(f"A prompt has {len(text):,} letters, more than {MAX_LETTERS:,}: shorten it.")
        if request.negative_prompt and not any(options.guided for options in plan.values()):
            raise UserError(
                "The negative prompt has no effect without guidance: remove it, or choose the sampler ddim and a"
                " guidance scale above 1."
            )
        return {"prompt": request.prompt, "negative_prompt": request.negative_prompt}

    def _example(self, size: Size) -> dict[str, Any]:
        return {"prompt": ""}

    def _chosen(self, request: TextRequest, sampler: str) -> dict[str, Any]:
        return {"guidance_scale": request.guidance_scale} if sampler == "ddim" else {}

    def _about(self, request: TextRequest) -> dict[str, Any]:
        given = [request.prompt, request.negative_prompt]
        tokens = cast(TextToVideo, self.models[self.main]).tokenize(given)
        return {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "guidance_scale": request.guidance_scale,
            "notices": prompts.cut_warnings(given, tokens),
        }

    def _picture(
        self, inputs: Mapping[str, Any], made: Mapping[str, UInt8[np.ndarray, "f h w 3"]], size: Size
    ) -> UInt8[np.ndarray, "h w 3"]:
        """The first frame."""
        return next(iter(made.values()))[0]
