"""CLIPScore of videos: how well their frames fit the prompts that they were made of.

A frame's score is 100 max(cos(E_image, E_text), 0) with CLIP's embeddings, as in torchmetrics' `CLIPScore`; Hessel et
al. 2021 have the factor 2.5 in place of 100. A video's is the mean over its frames, and the result the mean over videos
(AVDM2 section 5.1).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from osv_jax.convert import weights
from osv_jax.convert.text_to_video import tokenizer_of
from osv_jax.convert.tokenizer import Tokenizer
from osv_jax.diffusion.conditioning import CLIP_MEAN, CLIP_STD
from osv_jax.errors import UserError
from osv_jax.models.clip_text import CLIPTextProjection
from osv_jax.models.clip_vision import CLIPVision
from osv_jax.models.layers import apply
from osv_jax.runtime.finite import NotFinite, blame_weights, is_finite
from osv_jax.runtime.precision import matmul_precision

# Of a weights folder, beside the tokenizer.
TOWERS = ("clip_text", "clip_vision")
_FACTOR = 100.0


class CLIPScore:
    """CLIP in float32, for videos of any size.

    Args:
        folder: weights with `clip_text`, `clip_vision` and `tokenizer`.

    Raises:
        UserError: as `weights.load_params`; towers of two models.
    """

    def __init__(self, folder: str):
        text, vision = (weights.load_config(folder, name) for name in TOWERS)
        self._tokenizer = Tokenizer(tokenizer_of(folder))
        sizes = text.projection_dim, vision.projection_dim, text.vocab_size, self._tokenizer.vocab_size
        if sizes[0] != sizes[1] or sizes[2] != sizes[3]:
            raise UserError(
                f"{folder} has parts of different models: embeddings of {sizes[0]} and {sizes[1]} channels, {sizes[2]}"
                f" and {sizes[3]} tokens; convert CLIP again with --overwrite."
            )
        self._length, self._side = text.max_position_embeddings, vision.image_size
        self._text, self._vision = CLIPTextProjection(text), CLIPVision(vision)
        self._params = {name: weights.load_params(folder, name, dtype=jnp.float32) for name in TOWERS}

    def __call__(self, frames: UInt8[np.ndarray, "f h w 3"], prompt: str) -> float:
        """A video's score, 0 to 100; of a long prompt, its beginning counts.

        Raises:
            UserError: embeddings that are not finite, and whether the weights are to blame.
        """
        tokens = self._tokenizer([prompt], self._length).ids
        pixels = np.stack([clip_pixels(frame, self._side) for frame in frames])
        with matmul_precision(jnp.float32):
            cosines = np.asarray(_cosines(self._text, self._vision, self._params, tokens, pixels))
        with blame_weights(self._params):
            if not is_finite(cosines):
                raise NotFinite("CLIP gives embeddings that are NaN or infinite; use other weights.")
        return float(_FACTOR * np.maximum(cosines, 0).mean())


def clip_pixels(image: UInt8[np.ndarray, "h w 3"], side: int) -> Float[np.ndarray, "side side 3"]:
    """As CLIP's own preprocessing: the short side resized (bicubic), the centre cut out, normalised."""
    height, width = image.shape[:2]
    short = min(height, width)
    # (Rounded down, as transformers does.)
    resized = Image.fromarray(image).resize((width * side // short, height * side // short), Image.Resampling.BICUBIC)
    left, top = (resized.width - side) // 2, (resized.height - side) // 2
    cut = np.asarray(resized.crop((left, top, left + side, top + side)), np.float32)
    return (cut / 255 - CLIP_MEAN) / CLIP_STD


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cosines(
    text: CLIPTextProjection,
    vision: CLIPVision,
    params: Any,
    tokens: Int[Array, "1 t"],
    pixels: Float[Array, "f s s 3"],
) -> Float[Array, " f"]:
    of_text = apply(text, {"params": params["clip_text"]}, tokens)
    of_frames = apply(vision, {"params": params["clip_vision"]}, pixels)
    norms = jnp.linalg.norm(of_text, axis=-1) * jnp.linalg.norm(of_frames, axis=-1)
    return (of_frames @ of_text[0]) / norms


def pair(videos: Sequence[Any], prompts: Sequence[str]) -> list[tuple[Any, str]]:
    """Videos in their order and their prompts; raises UserError unless there are as many of each."""
    if len(videos) != len(prompts):
        raise UserError(f"There are {len(videos)} videos and {len(prompts)} prompts: give the file they were made of.")
    return list(zip(videos, prompts, strict=True))
