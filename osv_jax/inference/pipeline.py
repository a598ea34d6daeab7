"""From an image to a video in Python.

    model = ImageToVideo.load("weights/svd", lora="runs/stage2")
    frames = model("cat.png", sampler="tts", steps=1, seed=0)
    media.write_video("cat.mp4", frames, fps=7)

`osv_jax.sample` is the same as a program.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from osv_jax.codec import DECODERS, Codec, check_tiny_decoder, parameter_dtype
from osv_jax.convert import weights
from osv_jax.convert.architectures import expected_params
from osv_jax.data.image import ImageLike, read_image
from osv_jax.data.video import cover
from osv_jax.diffusion import samplers
from osv_jax.diffusion.conditioning import Conditioning, added_time_ids
from osv_jax.diffusion.edm import EDMBackbone
from osv_jax.diffusion.ode import guided_denoiser
from osv_jax.inference.options import CompleteOptions, Options, complete, own_video
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
from osv_jax.inference.trained import Trained, read_student
from osv_jax.models.clip_vision import CLIPVision
from osv_jax.models.layers import apply
from osv_jax.models.svd_unet import SVDUNet
from osv_jax.models.svd_vae import SVDVAE
from osv_jax.models.tiny_decoder import TinyDecoder
from osv_jax.runtime.media import to_float

COMPONENTS = ("unet", "vae", "image_encoder")
PARTS = ("compile", "CLIP", "VAE encode", "UNet", "decode")


@dataclasses.dataclass(frozen=True)
class Noise:
    """The random numbers of a batch of videos.

    Attributes:
        image: pixel noise of the augmentation.
        latents: the initial noise, standard normal.
        keys: of what a sampler draws on its way (only `consistency` does), one for each video.
    """

    image: Float[Array, "b h w 3"]
    latents: Float[Array, "b f latent_h latent_w c"]
    keys: Key[Array, " b"]


class ImageToVideo(Pipeline):
    """SVD, or a student of it, ready to make any number of videos of any size.

    Each program is compiled once for each size, for all models of the same networks.

    Attributes:
        notice: a sentence about the LoRA for the user, or empty.
    """

    def __init__(
        self,
        configs: Mapping[str, Any],
        params: Mapping[str, Any],
        trained: Trained,
        dtype: Any,
        attention: str = "auto",
        notice: str = "",
        video: Mapping[str, Any] = MappingProxyType({}),
        context: int = 1,
        data: int = 1,
        decode_dtype: Any = None,
    ):
        """Networks and their parameters by component: `COMPONENTS`, and `tiny_decoder` if that is to decode.

        Args:
            trained: what has been merged into the UNet's.
            video: of the clips that the UNet was trained on; see `weights.load_video`.
            context, data, decode_dtype: see `load`.
        """
        super().__init__(PARTS, params, context, data)
        options = {"dtype": dtype, "param_dtype": dtype, "attention": attention}
        self.unet = SVDUNet(configs["unet"], **options)
        decode_dtype = dtype if decode_dtype is None else decode_dtype
        vae = SVDVAE(configs["vae"], **options | {"dtype": decode_dtype})
        tiny = configs.get("tiny_decoder")
        decoder = tiny and TinyDecoder(tiny, decode_dtype, decode_dtype)
        self.codec = Codec(vae, CLIPVision(configs["image_encoder"], **options), decoder)
        self.notice = notice
        self.boundary = trained.config.get("boundary", "svd")
        self.num_levels = trained.config.get("num_levels", 100)
        self._video = own_video(self.unet.config, video, trained)

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
        decoder: str = "vae",
    ) -> ImageToVideo:
        """Loads a weights folder and merges what was trained into it.

        Args:
            weights_folder: what osv_jax.convert_weights wrote; DINOv2 is not needed.
            lora: the workdir of a training run, a PEFT adapter folder or a LoRA .safetensors file.
            ema: of a workdir, the student's EMA instead of the student.
            dtype: of `DTYPES`; by default float32 on a CPU, bfloat16 elsewhere.
            attention: see `attention.dot_product_attention`.
            context: so many devices share every video, each making a part of its height.
            data: so many groups of these devices share a batch of videos, which must be a multiple of that.
            decode_dtype: of `DECODE_DTYPES`, what the decoder computes in; by default `dtype`. The VAE's encoder always
                computes in float32.
            decoder: of `DECODERS`.

        Raises:
            UserError: missing or incomplete weights, a LoRA that cannot be read or does not fit, too few devices.
        """
        dtype = dtype or default_dtype()
        decode_dtype = decode_dtype or dtype
        check_choices(
            {
                "dtype": (dtype, DTYPES),
                "decode_dtype": (decode_dtype, DECODE_DTYPES),
                "decoder": (decoder, DECODERS),
            }
        )
        check_devices(context)
        components = (*COMPONENTS, *["tiny_decoder"] * (decoder == "tiny"))
        configs = {name: weights.load_config(weights_folder, name) for name in components}
        if decoder == "tiny":
            check_tiny_decoder(configs["tiny_decoder"], configs["vae"])
        # Before the weights, which take longest.
        trained, notice = read_student(lora, ema, expected_params("unet", configs["unet"]))
        # The UNet as it is stored: LoRAs are merged before it is rounded.
        held = {name: parameter_dtype(name, dtype) for name in COMPONENTS} | {"unet": None}
        held["tiny_decoder"] = jnp.dtype(decode_dtype)
        params = {name: weights.load_params(weights_folder, name, dtype=held[name]) for name in components}
        with jax.default_matmul_precision("highest"):
            params["unet"] = trained.merge_into(params["unet"], jnp.dtype(dtype))
        video = weights.load_video(weights_folder)
        dtypes = jnp.dtype(dtype), jnp.dtype(decode_dtype)
        return cls(configs, params, trained, dtypes[0], attention, notice, video, context, data, dtypes[1])

    def __call__(
        self, image: ImageLike, seed: int = 0, number: int = 0, **options: Any
    ) -> UInt8[np.ndarray, "f height width 3"]:
        """Makes a video of an image of any size; see `sample` for what of it is seen.

        Args:
            image: a file, a PIL image or values [h w] or [h w c]; see `data.image.read_image`.
            seed: 0 to 2^32 - 1; the same seed, number, image and options give the same video.
            number: which of several images this is, for noise of its own; 0 to 2^32 - 1.
            options: fields of `Options`.

        Raises:
            UserError: an image that cannot be read, impossible options, or frames that are not finite.
        """
        key = video_key(seed, number)
        video = self.complete(Options(**options))
        latents = self.sample(read_image(image)[None], self.noise(key[None], video), video)
        return self.frames(latents, video.decode_chunk_size)[0]

    def complete(self, options: Options) -> CompleteOptions:
        """The options with the model's own values for what is not said.

        Raises:
            UserError: a size that the VAE cannot make, or more steps than the sampler has noise levels.
        """
        context = self.devices.shape["context"]
        return complete(options, self._video, self.codec.vae.config.downscale, self.num_levels, context)

    def noise(self, keys: Key[Array, " b"], options: CompleteOptions) -> Noise:
        """The random numbers of a batch of videos, drawn in float32, each video's from its own key."""
        factor, channels = self.codec.vae.config.downscale, self.unet.config.out_channels
        latents = (options.num_frames, options.height // factor, options.width // factor, channels)
        image_keys, latents_keys, sampler_keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
        return Noise(
            image=normal(image_keys, (options.height, options.width, 3)),
            latents=normal(latents_keys, latents),
            keys=sampler_keys,
        )

    def sample(
        self, images: UInt8[np.ndarray, "b h0 w0 3"], noise: Noise, options: CompleteOptions
    ) -> Float[Array, "b f latent_h latent_w c"]:
        """Latents of videos, scaled, for images of any size.

        CLIP sees all of an image, squeezed into a square, as in diffusers. The VAE, whose latents the video begins
        with, sees the image scaled until it covers the video's size, and cropped at the centre.

        Args:
            options: see `complete`.
        """
        # Outside of the program, which is then the same for images of all sizes.
        whole = self.codec.clip_pixels(to_float(jnp.asarray(images)))
        pixels = to_float(np.stack([cover(image, options.height, options.width) for image in images]))
        strength = jnp.full(len(images), options.noise_aug_strength)
        cond = Conditioning(
            image_embedding=self._run("CLIP", "image_encoder", self.codec.embed_pixels, whole),
            image_latents=self._run(
                "VAE encode", "vae", self.codec.encode_mode, pixels + strength[:, None, None, None] * noise.image
            ),
            added_time_ids=added_time_ids(options.fps, options.motion_bucket_id, strength),
        )
        weight = None
        if options.guided:
            weight = jnp.linspace(options.min_guidance_scale, options.max_guidance_scale, options.num_frames)
            weight = jnp.tile(weight, (len(images), 1))

        calls = samplers.num_evaluations(options.sampler, options.steps, guided=False)
        number = itertools.count(1)

        def denoiser(x: Array, sigma: Array) -> Array:
            progress = f" {next(number)} of {calls}"
            return self._run("UNet", "unet", self._denoise, x, sigma, cond, weight, progress=progress)

        levels = samplers.even_levels
        if options.sampler == "euler":
            return samplers.euler(denoiser, noise.latents, samplers.euler_levels(options.steps))
        if options.sampler == "consistency":
            return samplers.consistency(denoiser, noise.latents, levels(options.steps, self.num_levels), noise.keys)
        finer = levels(options.steps + 1, self.num_levels)
        return samplers.time_travel(denoiser, noise.latents, levels(options.steps, self.num_levels), finer)

    def start_decoding(
        self, latents: Float[Array | np.ndarray, "b f latent_h latent_w c"], chunk_size: int
    ) -> list[Float[Array, "b _f h w 3"]]:
        """Frames, about in [-1, 1], of scaled latents, `chunk_size` frames at a time (as diffusers does)."""
        chunks = chunks_of(latents, chunk_size)
        if self.codec.tiny_decoder is None:
            return [self._run("decode", "vae", self.codec.decode_video, chunk) for chunk in chunks]
        decoded, memory = [], self.codec.tiny_decoder.memory(jnp.asarray(chunks[0]))
        for chunk in chunks:
            frames, memory = self._run("decode", "tiny_decoder", self.codec.decode_fast, chunk, memory)
            decoded.append(frames)
        return decoded

    def decode(
        self, latents: Float[Array | np.ndarray, "b f latent_h latent_w c"], chunk_size: int
    ) -> Float[np.ndarray, "b f h w 3"]:
        """What `start_decoding` starts, all of it."""
        return np.concatenate([np.asarray(chunk) for chunk in self.start_decoding(latents, chunk_size)], axis=1)

    @property
    def identity(self) -> Hashable:
        return self.unet, self.codec, self.boundary

    def dtype_of(self, component: str) -> Any:
        return self.unet.dtype if component in ("unet", "image_encoder") else self.codec.vae.dtype

    def _denoise(self, params: Any, x: Array, sigma: Array, cond: Conditioning, guidance: Array | None) -> Array:
        def network(*inputs: Array) -> Array:
            return apply(self.unet, {"params": params}, *inputs)

        backbone = EDMBackbone(network, cond, self.boundary)
        return backbone(x, sigma) if guidance is None else guided_denoiser(backbone, guidance)(x, sigma)
