"""From prompts to videos in Python: AnimateDiff, or a few-step student of it.

    model = TextToVideo.load("weights/animatediff")
    frames = model("a cat on a car", seed=0)
    media.write_video("cat.mp4", frames, fps=8)

`osv_jax.sample --prompt` is the same as a program.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from osv_jax.codec import TextCodec, parameter_dtype
from osv_jax.convert import text_to_video as converted
from osv_jax.convert import weights
from osv_jax.convert.tokenizer import Tokenizer, Tokens
from osv_jax.diffusion import ddpm
from osv_jax.diffusion.ode import guided_denoiser
from osv_jax.errors import UserError
from osv_jax.inference.programs import (
    DECODE_DTYPES,
    DTYPES,
    Pipeline,
    check_choices,
    check_devices,
    chunks_of,
    default_dtype,
    normal,
    video_key,
)
from osv_jax.inference.text_options import CompleteTextOptions, TextOptions, complete
from osv_jax.inference.trained import Trained, read_student
from osv_jax.models.clip_text import CLIPText
from osv_jax.models.layers import apply
from osv_jax.models.svd_vae import ImageVAE
from osv_jax.models.text_unet import TextUNet

COMPONENTS = ("unet_2d", "motion_adapter", "image_vae", "text_encoder")
PARTS = ("compile", "text", "UNet", "decode")


class TextNoise(NamedTuple):
    """The random numbers of a batch of videos: initial noise, standard normal, and keys of a sampler's others."""

    latents: Float[Array, "b f latent_h latent_w c"]
    keys: Key[Array, " b"]


class TextToVideo(Pipeline):
    """AnimateDiff, or a student of it, ready to make any number of videos of any size.

    Attributes:
        notice: a sentence about the LoRA for the user, or empty.
    """

    def __init__(
        self,
        configs: Mapping[str, Any],
        params: Mapping[str, Any],
        tokenizer: Tokenizer,
        trained: Trained,
        dtype: Any,
        attention: str = "auto",
        notice: str = "",
        video: Mapping[str, Any] | None = None,
        context: int = 1,
        data: int = 1,
        decode_dtype: Any = None,
    ):
        """Configs of `COMPONENTS`; parameters of `unet` (the video UNet), `image_vae` and `text_encoder`.

        Args:
            trained: what has been merged into the UNet's.
            video: of the clips that the UNet was trained on; see `weights.load_video`.
            context, data, decode_dtype: see `pipeline.ImageToVideo.load`.
        """
        super().__init__(PARTS, params, context, data)
        options = {"dtype": dtype, "param_dtype": dtype, "attention": attention}
        self.unet = TextUNet(configs["unet_2d"], configs["motion_adapter"], **options)
        vae = ImageVAE(configs["image_vae"], **options | {"dtype": dtype if decode_dtype is None else decode_dtype})
        self.codec = TextCodec(vae, CLIPText(configs["text_encoder"], **options))
        self.notice = notice
        self._max_frames = configs["motion_adapter"].motion_max_seq_length
        self._tokenizer = tokenizer
        self._trained = trained
        self._video = dict(video or {}) | trained.video

    @classmethod
    def load(
        cls,
        weights_folder: str | os.PathLike,
        lora: str | os.PathLike | None = None,
        ema: bool = False,
        dtype: str | None = None,
        attention: str = "auto",
        context: int = 1,
        data: int = 1,
        decode_dtype: str | None = None,
    ) -> TextToVideo:
        """Loads a weights folder and merges what was trained into it; see `pipeline.ImageToVideo.load`.

        Raises:
            UserError: missing or incomplete weights, networks that are not made for each other, a LoRA that cannot be
                read or does not fit, too few devices.
        """
        dtype = dtype or default_dtype()
        decode_dtype = decode_dtype or dtype
        check_choices({"dtype": (dtype, DTYPES), "decode_dtype": (decode_dtype, DECODE_DTYPES)})
        check_devices(context)
        configs = load_configs(weights_folder)
        tokenizer = Tokenizer(converted.tokenizer_of(weights_folder))
        if tokenizer.vocab_size != configs["text_encoder"].vocab_size:
            raise UserError(
                f"{weights_folder} has a tokenizer of {tokenizer.vocab_size} tokens and a text encoder of"
                f" {configs['text_encoder'].vocab_size}: convert both from one checkpoint, with --overwrite."
            )
        # Before the weights, which take longest.
        shapes = converted.video_unet_shapes(configs["unet_2d"], configs["motion_adapter"])
        trained, notice = read_student(lora, ema, shapes)
        # The UNet as it is stored: LoRAs are merged before it is rounded.
        params: dict[str, Any] = {
            name: weights.load_params(weights_folder, name, dtype=parameter_dtype(name, dtype))
            for name in ("image_vae", "text_encoder")
        }
        stored = (weights.load_params(weights_folder, name) for name in ("unet_2d", "motion_adapter"))
        with jax.default_matmul_precision("highest"):
            params["unet"] = trained.merge_into(converted.video_unet(*stored), jnp.dtype(dtype))
        video = weights.load_video(weights_folder)
        dtypes = jnp.dtype(dtype), jnp.dtype(decode_dtype)
        return cls(configs, params, tokenizer, trained, dtypes[0], attention, notice, video, context, data, dtypes[1])

    def __call__(
        self, prompt: str, seed: int = 0, number: int = 0, negative_prompt: str = "", **options: Any
    ) -> UInt8[np.ndarray, "f height width 3"]:
        """Makes a video of what a prompt says.

        Args:
            prompt: what is to be seen; what is beyond 77 tokens is cut off, see `tokenize`.
            seed: 0 to 2^32 - 1; the same seed, number, prompt and options give the same video.
            number: which of several prompts this is, for noise of its own; 0 to 2^32 - 1.
            negative_prompt: what guidance leads away from.
            options: fields of `TextOptions`.

        Raises:
            UserError: impossible options, or frames that are not finite.
        """
        key = video_key(seed, number)
        video = self.complete(TextOptions(**options))
        cond = self.embed([prompt], [negative_prompt])
        latents = self.sample(cond, self.noise(key[None], video), video)
        return self.frames(latents, video.decode_chunk_size)[0]

    def complete(self, options: TextOptions) -> CompleteTextOptions:
        """The options with the model's own values for what is not said.

        Raises:
            UserError: a size that the VAE cannot make, too many steps, or more frames than there are positions for.
        """
        return complete(
            options,
            self._video,
            self.codec.vae.config.downscale,
            self._max_frames,
            is_student=self._trained.step > 0 and not self._trained.is_teacher,
            context=self.devices.shape["context"],
        )

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """The tokens of prompts, and what of each did not fit into the text encoder."""
        return self._tokenizer(prompts, self.codec.text_encoder.config.max_position_embeddings)

    def embed(self, prompts: Sequence[str], negative_prompts: Sequence[str]) -> ddpm.TextConditioning:
        """Prompts and the negative ones, as many, as the UNet looks at them."""
        tokens = self.tokenize([*prompts, *negative_prompts]).ids
        states = [
            self._run("text", "text_encoder", self.codec.embed_text, jnp.asarray(part))
            for part in (tokens[: len(prompts)], tokens[len(prompts) :])
        ]
        return ddpm.TextConditioning(*states)

    def noise(self, keys: Key[Array, " b"], options: CompleteTextOptions) -> TextNoise:
        """The random numbers of a batch of videos, drawn in float32, each video's from its own key."""
        factor, channels = self.codec.vae.config.downscale, self.unet.config.in_channels
        shape = (options.num_frames, options.height // factor, options.width // factor, channels)
        latents_keys, sampler_keys = jax.vmap(lambda key: jax.random.split(key, 2), out_axes=1)(keys)
        return TextNoise(normal(latents_keys, shape), sampler_keys)

    def sample(
        self, cond: ddpm.TextConditioning, noise: TextNoise, options: CompleteTextOptions
    ) -> Float[Array, "b f latent_h latent_w c"]:
        """Latents of videos, scaled.

        Args:
            cond: see `embed`.
            options: see `complete`.
        """
        weight = None
        if options.guided:
            weight = jnp.full((len(noise.latents), options.num_frames), options.guidance_scale)
        number = itertools.count(1)

        def denoiser(x: Array, t: Array) -> Array:
            progress = f" {next(number)} of {options.steps}"
            return self._run("UNet", "unet", self._denoise, x, t, cond, weight, progress=progress)

        schedule = ddpm.animatediff_schedule()
        if options.sampler == "ddim":
            return ddpm.ddim(denoiser, noise.latents, ddpm.ddim_times(options.steps), schedule)
        return ddpm.few_step(denoiser, noise.latents, ddpm.few_step_times(options.steps), schedule, noise.keys)

    def start_decoding(
        self, latents: Float[Array | np.ndarray, "b f latent_h latent_w c"], chunk_size: int
    ) -> list[Float[Array, "b _f h w 3"]]:
        """Frames, about in [-1, 1], of scaled latents, `chunk_size` frames at a time; each is an image of its own."""
        return [
            self._run("decode", "image_vae", self.codec.decode_video, chunk) for chunk in chunks_of(latents, chunk_size)
        ]

    @property
    def identity(self) -> Hashable:
        return self.unet, self.codec

    def dtype_of(self, component: str) -> Any:
        return self.codec.vae.dtype if component == "image_vae" else self.unet.dtype

    def _denoise(self, params: Any, x: Array, t: Array, cond: ddpm.TextConditioning, guidance: Array | None) -> Array:
        def network(*inputs: Array) -> Array:
            return apply(self.unet, {"params": params}, *inputs)

        backbone = ddpm.DDPMBackbone(network, cond, ddpm.animatediff_schedule())
        return backbone(x, t) if guidance is None else guided_denoiser(backbone, guidance)(x, t)


def load_configs(weights_folder: str | os.PathLike) -> dict[str, Any]:
    """The architectures of `COMPONENTS` in a weights folder.

    Raises:
        UserError: one that is missing, or that is not made for the others.
    """
    folder = weights.locate(weights_folder)
    if (folder / "unet").is_dir() and not (folder / "unet_2d").is_dir():
        raise UserError(
            f"{weights_folder} makes videos of images: give --image, or the weights of Stable Diffusion and a motion"
            " adapter (docs/text_to_video.md)."
        )
    configs = {name: weights.load_config(weights_folder, name) for name in COMPONENTS}
    converted.check_motion_fits(configs["motion_adapter"], configs["unet_2d"], weights_folder)
    converted.check_text_fits(configs["text_encoder"], configs["unet_2d"], weights_folder)
    return configs
