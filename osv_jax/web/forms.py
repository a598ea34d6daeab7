"""What people fill in: what a video is to be made of."""

from __future__ import annotations

import abc
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import gradio as gr

from osv_jax.errors import UserError
from osv_jax.inference.text_options import GUIDANCE_SCALE
from osv_jax.web.images import ImageRequest
from osv_jax.web.studio import Request
from osv_jax.web.texts import MAX_LETTERS, TextRequest


class Form(abc.ABC):
    """The controls that only one kind of video has. Their values are given to `request` in their order.

    Attributes:
        title: of the page.
    """

    title: str

    @abc.abstractmethod
    def add(self) -> list[gr.components.Component]:
        """Puts what a video is made of on the page."""

    @abc.abstractmethod
    def add_more(self) -> list[gr.components.Component]:
        """Puts what few people change where such things are."""

    @abc.abstractmethod
    def request(self, *values: Any, **shared: Any) -> Request:
        """What is wanted.

        Args:
            values: of `add`'s controls, then of `add_more`'s.
            shared: fields of `Request`.

        Raises:
            UserError: nothing to make a video of.
        """


class ImageForm(Form):
    """An image."""

    title = "From an image to a video"

    def __init__(self, examples: Sequence[os.PathLike]):
        """`examples` are pictures to pick from."""
        self._examples = examples

    def add(self) -> list[gr.components.Component]:
        """The image, and examples of some."""
        image = gr.Image(label="Image", type="filepath", sources=["upload", "clipboard"], elem_id="image")
        # Not decoded by Gradio: files are read as everywhere here, within the limits of uploads. (Of a class
        # derived from its own Gradio would write a file beside this one.)
        vars(image)["preprocess"] = _uploaded
        if self._examples:
            gr.Examples([[os.fspath(path)] for path in self._examples], [image], cache_examples=False)
        return [image]

    def add_more(self) -> list[gr.components.Component]:
        """The amount of motion."""
        return [gr.Slider(1, 255, 127, step=1, label="Motion bucket", elem_id="motion")]

    def request(self, *values: Any, **shared: Any) -> ImageRequest:
        """See `Form`."""
        image, motion = values
        if image is None:
            raise UserError("There is no image: upload one, or pick an example.")
        return ImageRequest(image=image, motion_bucket_id=motion, **shared)


class TextForm(Form):
    """A prompt."""

    title = "From a prompt to a video"

    def add(self) -> list[gr.components.Component]:
        """The prompt, the negative one, and how far one leads away from the other."""
        texts: dict[str, Any] = {"max_length": MAX_LETTERS, "max_lines": 8}
        return [
            gr.Textbox(label="Prompt", lines=3, placeholder="What is to be seen", elem_id="prompt", **texts),
            gr.Textbox(label="Negative prompt, of ddim", lines=1, elem_id="negative", **texts),
            gr.Slider(1, 20, GUIDANCE_SCALE, step=0.5, label="Guidance scale, of ddim", elem_id="guidance"),
        ]

    def add_more(self) -> list[gr.components.Component]:
        """Nothing more."""
        return []

    def request(self, *values: Any, **shared: Any) -> TextRequest:
        """See `Form`."""
        prompt, negative, scale = values
        return TextRequest(prompt=prompt or "", negative_prompt=negative or "", guidance_scale=scale, **shared)


def example_pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    """First frames of the clips that come with the miniature, written to a folder."""
    from PIL import Image as Pillow

    from osv_jax.data.demo import held_out_clips

    pictures = []
    for number, clip in enumerate(held_out_clips()[0], start=1):
        pictures.append(folder / f"frame_{number}.png")
        Pillow.fromarray(clip[0]).save(pictures[-1])
    return pictures


def _uploaded(payload: Any) -> str | None:
    return payload.path if payload else None
