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
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from osv_jax.codec import Codec
from osv_jax.convert import lora_files, weights
from osv_jax.convert.architectures import Config, expected_params
from osv_jax.data.image import ImageLike, read_image
from osv_jax.data.video import cover
from osv_jax.diffusion import samplers
from osv_jax.diffusion.conditioning import Conditioning, added_time_ids
from osv_jax.diffusion.edm import EDMBackbone
from osv_jax.diffusion.ode import guided_denoiser
from osv_jax.errors import UserError
from osv_jax.inference.trained import Trained, is_workdir, load_trained
from osv_jax.models.clip_vision import CLIPVision
from osv_jax.models.svd_unet import SVDUNet, UNetConfig
from osv_jax.models.svd_vae import SVDVAE
from osv_jax.objectives.players import Student
from osv_jax.runtime.finite import blame_weights
from osv_jax.runtime.media import to_float, to_uint8
from osv_jax.runtime.mesh import batch_shardings, make_mesh, replicated
from osv_jax.runtime.precision import matmul_precision
from osv_jax.runtime.ranges import COUNT, FINITE, FPS, MOTION_BUCKET_ID, NUM_FRAMES, PIXELS, SEED, Range

COMPONENTS = ("unet", "vae", "image_encoder")
DTYPES = ("bfloat16", "float32")

# Compiled once in a process, and shared by all models of the same networks.
_PROGRAMS: dict[Hashable, Callable] = {}

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

    @property
    def num_evaluations(self) -> int:
        """Network evaluations a video (NFE)."""
        return samplers.num_evaluations(self.sampler, self.steps, self.guided)


@dataclasses.dataclass(frozen=True)
class Noise:
    """The random numbers of one video.

    Attributes:
        image: pixel noise of the augmentation.
        latents: the initial noise, standard normal.
        key: of what a sampler draws on its way (only `consistency` does).
    """

    image: Float[Array, "1 h w 3"]
    latents: Float[Array, "1 f latent_h latent_w c"]
    key: jax.Array


class ImageToVideo:
    """SVD, or a student of it, ready to make any number of videos of any size.

    Each program is compiled once for each size, for all models of the same networks.

    Attributes:
        notice: a sentence about the LoRA for the user, or empty.
        seconds: time spent so far by part: `compile`, `CLIP`, `VAE encode`, `UNet`, `decode`.
        on_part: called with the name of each part as it begins; for the UNet, with the number of the evaluation, too.
    """

    def __init__(
        self,
        configs: Mapping[str, Config],
        params: Mapping[str, Any],
        trained: Trained,
        dtype: Any,
        attention: str = "auto",
        notice: str = "",
        video: Mapping[str, Any] = MappingProxyType({}),
        context: int = 1,
    ):
        """Networks and their parameters by component.

        Args:
            trained: what has been merged into the UNet's.
            video: of the clips that the UNet was trained on; see `weights.load_video`.
            context: see `load`.
        """
        options = {"dtype": dtype, "param_dtype": dtype, "attention": attention}
        self.unet = SVDUNet(configs["unet"], **options)
        self.codec = Codec(SVDVAE(configs["vae"], **options), CLIPVision(configs["image_encoder"], **options))
        self.notice = notice
        self.devices = make_mesh(1, 1, context, jax.local_devices()[:context])
        self.params = jax.device_put(dict(params), replicated(self.devices))
        self.boundary = trained.config.get("boundary", "svd")
        self.num_levels = trained.config.get("num_levels", 100)
        own = {"height": 576, "width": 1024, "num_frames": self.unet.config.num_frames, "fps": 7}
        self._video = own | dict(video) | trained.video
        self.seconds = dict.fromkeys(("compile", "CLIP", "VAE encode", "UNet", "decode"), 0.0)
        self.on_part: Callable[[str], None] = lambda part: None

    @classmethod
    def load(
        cls,
        weights_folder: str | os.PathLike,
        lora: str | os.PathLike | None = None,
        ema: bool = False,
        dtype: str | None = None,
        attention: str = "auto",
        context: int = 1,
    ) -> ImageToVideo:
        """Loads a weights folder and merges what was trained into it.

        Args:
            weights_folder: what tools/convert_weights.py wrote; DINOv2 is not needed.
            lora: the workdir of a training run, a PEFT adapter folder or a LoRA .safetensors file.
            ema: of a workdir, the student's EMA instead of the student.
            dtype: of `DTYPES`; by default float32 on a CPU, bfloat16 elsewhere.
            attention: see `layers.dot_product_attention`.
            context: so many devices share every video, each making a part of its height.

        Raises:
            UserError: missing or incomplete weights, a LoRA that cannot be read or does not fit, too few devices.
        """
        return cls.load_each(weights_folder, [lora], ema, dtype, attention, context)[0]

    @classmethod
    def load_each(
        cls,
        weights_folder: str | os.PathLike,
        loras: Sequence[str | os.PathLike | None],
        ema: bool = False,
        dtype: str | None = None,
        attention: str = "auto",
        context: int = 1,
    ) -> list[ImageToVideo]:
        """As `load`, a model for each LoRA (None: the weights as they are); they share all parameters but the UNets'.

        Raises:
            UserError: as `load`.
        """
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
        available = jax.local_device_count()
        if not 1 <= context <= available:
            raise UserError(f"context={context} must lie in 1 .. {available}, the devices of this machine.")
        configs = {name: weights.load_config(weights_folder, name) for name in COMPONENTS}
        # Before the weights, which take longest.
        students = [_load_trained(lora, ema, configs["unet"]) for lora in loras]
        # The UNet as it is stored: LoRAs are merged before it is rounded.
        params = {
            name: weights.load_params(weights_folder, name, dtype=None if name == "unet" else jnp.dtype(dtype))
            for name in COMPONENTS
        }
        video = weights.load_video(weights_folder)
        models = []
        for trained, notice in students:
            with jax.default_matmul_precision("highest"):
                own = params | {"unet": trained.merge_into(params["unet"], jnp.dtype(dtype))}
            models.append(cls(configs, own, trained, jnp.dtype(dtype), attention, notice, video, context))
        return models

    def __call__(
        self, image: ImageLike, seed: int = 0, number: int = 0, **options: Any
    ) -> UInt8[np.ndarray, "f height width 3"]:
        """Makes a video of an image of any size, which is scaled to cover the video's size and cropped at the centre.

        Args:
            image: a file, a PIL image or values [h w] or [h w c]; see `data.image.read_image`.
            seed: 0 to 2^32 - 1; the same seed, number, image and options give the same video.
            number: which of several images this is, for noise of its own; 0 to 2^32 - 1.
            options: fields of `Options`.

        Raises:
            UserError: an image that cannot be read, impossible options, or frames that are not finite.
        """
        SEED.check("seed", seed)
        SEED.check("number", number)
        options = self.complete(Options(**options))
        picture = cover(read_image(image), options.height, options.width)
        key = jax.random.fold_in(jax.random.key(seed), number)
        latents = self.sample(picture, self.noise(key, options), options)
        return self.frames(latents, options.decode_chunk_size)[0]

    def complete(self, options: Options) -> Options:
        """The options with the model's own values for what is not said.

        Raises:
            UserError: a size that the VAE cannot make, or more steps than the sampler has noise levels.
        """
        own = {"steps": DEFAULT_STEPS[options.sampler], **self._video}
        own = {name: value for name, value in own.items() if getattr(options, name) is None}
        options = dataclasses.replace(options, **own)
        factor = self.codec.vae.config.downscale
        for name in ("height", "width"):
            value = getattr(options, name)
            if value % factor:
                raise UserError(f"{name}={value} is not divisible by {factor}, the VAE's factor: use a multiple of it.")
        rows, context = options.height // factor, self.devices.shape["context"]
        if rows % context:
            raise UserError(
                f"context={context} does not divide the {rows} rows of latents of height={options.height}: use a"
                f" divisor of {rows}, or another height."
            )
        most = samplers.max_steps(options.sampler, self.num_levels)
        if most is not None and options.steps > most:
            raise UserError(f"steps={options.steps} is too many for {options.sampler}: at most {most}.")
        return options

    def noise(self, key: jax.Array, options: Options) -> Noise:
        """The random numbers of one video, drawn in float32."""
        image_key, latents_key, sampler_key = jax.random.split(key, 3)
        factor, channels = self.codec.vae.config.downscale, self.unet.config.out_channels
        size = (options.height // factor, options.width // factor)
        return Noise(
            image=jax.random.normal(image_key, (1, options.height, options.width, 3)),
            latents=jax.random.normal(latents_key, (1, options.num_frames, *size, channels)),
            key=sampler_key,
        )

    def sample(
        self, image: UInt8[np.ndarray, "h w 3"], noise: Noise, options: Options
    ) -> Float[Array, "1 f latent_h latent_w c"]:
        """Latents of a video, scaled, for an image that has its size.

        Args:
            options: complete; see `complete`.
        """
        pixels = to_float(image[None])
        strength = jnp.full(1, options.noise_aug_strength)
        cond = Conditioning(
            image_embedding=self._run("CLIP", "image_encoder", self.codec.embed_image, pixels),
            image_latents=self._run("VAE encode", "vae", self.codec.encode_mode, pixels + strength * noise.image),
            added_time_ids=added_time_ids(options.fps, options.motion_bucket_id, strength),
        )
        weight = None
        if options.guided:
            weight = jnp.linspace(options.min_guidance_scale, options.max_guidance_scale, options.num_frames)

        calls = samplers.num_evaluations(options.sampler, options.steps, guided=False)
        number = itertools.count(1)

        def denoiser(x: Array, sigma: Array) -> Array:
            progress = f" {next(number)} of {calls}"
            return self._run("UNet", "unet", self._denoise, x, sigma, cond, weight, progress=progress)

        levels = samplers.even_levels
        if options.sampler == "euler":
            return samplers.euler(denoiser, noise.latents, samplers.euler_levels(options.steps))
        if options.sampler == "consistency":
            return samplers.consistency(denoiser, noise.latents, levels(options.steps, self.num_levels), noise.key)
        finer = levels(options.steps + 1, self.num_levels)
        return samplers.time_travel(denoiser, noise.latents, levels(options.steps, self.num_levels), finer)

    def decode(
        self, latents: Float[Array, "b f latent_h latent_w c"], chunk_size: int
    ) -> Float[np.ndarray, "b f h w 3"]:
        """Frames, about in [-1, 1], of scaled latents, `chunk_size` frames at a time (as diffusers does)."""
        chunks = [
            np.asarray(self._run("decode", "vae", self.codec.decode_video, latents[:, start : start + chunk_size]))
            for start in range(0, latents.shape[1], chunk_size)
        ]
        return np.concatenate(chunks, axis=1)

    def frames(
        self, latents: Float[Array, "b f latent_h latent_w c"], chunk_size: int
    ) -> UInt8[np.ndarray, "b f h w 3"]:
        """Pixels of scaled latents; see `decode`.

        Raises:
            UserError: values that are not finite, naming the weights if they are the cause.
        """
        with blame_weights(self.params):
            return to_uint8(self.decode(latents, chunk_size))

    def _denoise(self, params: Any, x: Array, sigma: Array, cond: Conditioning, guidance: Array | None) -> Array:
        def network(*inputs: Array) -> Array:
            return self.unet.apply({"params": params}, *inputs)

        backbone = EDMBackbone(network, cond, self.boundary)
        return backbone(x, sigma) if guidance is None else guided_denoiser(backbone, guidance)(x, sigma)

    def _run(self, part: str, component: str, function: Callable, *inputs: Any, progress: str = "") -> Any:
        """Calls `function(params, *inputs)`, compiled for these shapes, and adds up the time it takes."""
        params, inputs = self.params[component], jax.device_put(inputs, batch_shardings(self.devices, inputs))
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(inputs))
        networks = (self.unet, self.codec)
        program = (part, networks, self.boundary, self.devices, jax.tree.structure(inputs), shapes)
        if program not in _PROGRAMS:
            self.on_part(f"compiling {part}")
            start = time.perf_counter()
            with jax.set_mesh(self.devices), matmul_precision(self.unet.dtype):
                compiled = jax.jit(function, out_shardings=replicated(self.devices)).lower(params, *inputs).compile()
            _PROGRAMS[program] = compiled
            self.seconds["compile"] += time.perf_counter() - start
        self.on_part(part + progress)
        start = time.perf_counter()
        result = jax.block_until_ready(_PROGRAMS[program](params, *inputs))
        self.seconds[part] += time.perf_counter() - start
        return result


def _load_trained(path: str | os.PathLike | None, ema: bool, config: UNetConfig) -> tuple[Trained, str]:
    """What `--lora` names, or a student equal to its teacher, and a notice about it."""
    if path is None:
        return Trained(Student(lora={}, tuned={})), ""
    shapes, path = expected_params("unet", config), weights.locate(path)
    if is_workdir(path):
        trained = load_trained(path, ema)
        trained.check_fits(shapes, path)
        return trained, ""
    if ema:
        raise UserError(f"{path} is not a training workdir: only those have an EMA; leave out --ema.")
    read = lora_files.read_lora(path, shapes)
    return Trained(Student(lora=read.lora, tuned={})), read.notice
