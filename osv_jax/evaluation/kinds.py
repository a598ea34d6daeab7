"""What a table's videos are made of: first frames, or prompts; and which networks make them."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from osv_jax.convert import weights
from osv_jax.convert.architectures import expected_params
from osv_jax.convert.text_to_video import video_unet_shapes
from osv_jax.errors import UserError
from osv_jax.evaluation.options import MethodOptions, TableOptions
from osv_jax.inference import options as image_options
from osv_jax.inference import pipeline, text_options, text_to_video
from osv_jax.inference.programs import Pipeline
from osv_jax.inference.trained import Trained

Video = image_options.CompleteOptions | text_options.CompleteTextOptions
Latents = Float[Array | np.ndarray, "b f latent_h latent_w c"]


class Kind(abc.ABC):
    """Weights that make videos, as a table needs them.

    Attributes:
        components: of the weights folder.
        configs: their architectures.
        shapes: of the parameters that students are merged into, by path.
        vae: which of the components decodes.
        pipeline_class: the class of the networks that make videos.
        of_prompts: whether videos are made of prompts.
    """

    components: tuple[str, ...]
    configs: Mapping[str, Any]
    shapes: Mapping[Any, Any]
    vae: str
    pipeline_class: type[pipeline.ImageToVideo] | type[text_to_video.TextToVideo]
    of_prompts: bool

    @abc.abstractmethod
    def options(self, options: TableOptions, method: MethodOptions) -> Any:
        """A method's options, as far as they are said.

        Raises:
            UserError: one that there is not for such videos, or that is not in its range.
        """

    @abc.abstractmethod
    def complete(self, said: Any, stored: Mapping[str, Any], first: Trained, trained: Trained, context: int) -> Video:
        """A method's options.

        Args:
            said: see `options`.
            stored: of the weights; see `weights.load_video`.
            first: the table's first student, which knows what it was trained on.
            trained: the method's student.
        """

    def load(self, options: TableOptions, lora: str | None, ema: bool, data: int) -> Pipeline:
        """A method's networks."""
        return self.pipeline_class.load(
            options.weights, lora, ema, options.dtype or None, context=options.context, data=data
        )

    @abc.abstractmethod
    def sample(self, model: Any, sources: np.ndarray, keys: Key[Array, " b"], video: Any) -> Latents:
        """Latents of videos, made of first frames [b h w 3] or of b prompts."""


class OfImages(Kind):
    """SVD and its students."""

    components = pipeline.COMPONENTS
    vae = "vae"
    pipeline_class = pipeline.ImageToVideo
    of_prompts = False

    def __init__(self, folder: str):
        self.configs = {name: weights.load_config(folder, name) for name in self.components}
        self.shapes = expected_params("unet", self.configs["unet"])

    def options(self, options: TableOptions, method: MethodOptions) -> image_options.Options:
        for name in ("prompts", "clip_weights"):
            if getattr(options, name):
                raise UserError(
                    f"config.{name} is for videos of prompts, and {options.weights} makes videos of images: leave it"
                    " empty."
                )
        same = ("motion_bucket_id", "noise_aug_strength")
        own = ("min_guidance_scale", "max_guidance_scale")
        return image_options.Options(
            **_shared(options, method),
            sampler=method.sampler or "consistency",
            **{name: getattr(options, name) for name in same},
            **{name: getattr(method, name) for name in own},
        )

    def complete(
        self, said: image_options.Options, stored: Mapping[str, Any], first: Trained, trained: Trained, context: int
    ) -> image_options.CompleteOptions:
        own = image_options.own_video(self.configs["unet"], stored, first)
        levels = trained.config.get("num_levels", 100)
        return image_options.complete(said, own, self.configs[self.vae].downscale, levels, context)

    def sample(
        self,
        model: pipeline.ImageToVideo,
        sources: UInt8[np.ndarray, "b h w 3"],
        keys: Key[Array, " b"],
        video: image_options.CompleteOptions,
    ) -> Latents:
        return model.sample(sources, model.noise(keys, video), video)


class OfPrompts(Kind):
    """AnimateDiff and its students."""

    components = text_to_video.COMPONENTS
    vae = "image_vae"
    pipeline_class = text_to_video.TextToVideo
    of_prompts = True

    def __init__(self, folder: str):
        self.configs = text_to_video.load_configs(folder)
        self.shapes = video_unet_shapes(self.configs["unet_2d"], self.configs["motion_adapter"])

    def options(self, options: TableOptions, method: MethodOptions) -> text_options.TextOptions:
        if options.lpips:
            raise UserError("config.lpips compares with first frames, which videos of prompts do not begin with.")
        sampler = method.sampler or ("few-step" if method.lora else "ddim")
        scale = method.guidance_scale if sampler == "ddim" else None
        return text_options.TextOptions(**_shared(options, method), sampler=sampler, guidance_scale=scale)

    def complete(
        self, said: text_options.TextOptions, stored: Mapping[str, Any], first: Trained, trained: Trained, context: int
    ) -> text_options.CompleteTextOptions:
        most = self.configs["motion_adapter"].motion_max_seq_length
        downscale = self.configs[self.vae].downscale
        return text_options.complete(said, dict(stored) | first.video, downscale, most, context=context)

    def sample(
        self,
        model: text_to_video.TextToVideo,
        sources: np.ndarray,
        keys: Key[Array, " b"],
        video: text_options.CompleteTextOptions,
    ) -> Latents:
        return model.sample(model.embed(list(sources), [""] * len(sources)), model.noise(keys, video), video)


def kind_of(folder: str) -> Kind:
    """What the weights in a folder make videos of.

    Raises:
        UserError: missing weights.
    """
    return OfPrompts(folder) if makes_videos_of_prompts(folder) else OfImages(folder)


def makes_videos_of_prompts(folder: str) -> bool:
    """Whether these are AnimateDiff's weights."""
    found = weights.locate(folder)
    return (found / "unet_2d").is_dir() and not (found / "unet").is_dir()


def _shared(options: TableOptions, method: MethodOptions) -> dict[str, Any]:
    size: dict[str, Any] = {name: getattr(options, name) or None for name in ("height", "width", "num_frames", "fps")}
    return size | {"steps": method.steps, "decode_chunk_size": options.decode_chunk_size}
