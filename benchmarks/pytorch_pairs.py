"""What `beside_pytorch` times: the same networks, weights and inputs here and in PyTorch, of several sizes."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from flax.traverse_util import flatten_dict
from safetensors.torch import save_file

from osv_jax.codec import Codec, parameter_dtype
from osv_jax.convert import naming
from osv_jax.convert.exporters import unet_json
from osv_jax.diffusion.conditioning import Conditioning
from osv_jax.diffusion.edm import EDMBackbone
from osv_jax.models.clip_vision import CLIPVision, CLIPVisionConfig
from osv_jax.models.dinov2 import Dinov2, Dinov2Config
from osv_jax.models.layers import apply
from osv_jax.models.lora import init_lora, target_modules
from osv_jax.models.svd_unet import SVDUNet, UNetConfig
from osv_jax.models.svd_vae import SVDVAE, VAEConfig
from osv_jax.objectives.random_networks import random_frozen
from osv_jax.runtime.media import to_uint8, write_video

RANK = 16
# Where a one-step student begins.
SIGMA = 700.0
# LoRA of attention: what PEFT and we call the same layers.
TORCH_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclasses.dataclass(frozen=True)
class Size:
    """Networks and a clip.

    Attributes:
        height, width: of frames [pixels]; latents are smaller by the VAE's factor.
        discriminator_blocks: of DINOv2, whose features the discriminator sees.
    """

    unet: UNetConfig
    vae: VAEConfig
    dinov2: Dinov2Config
    image_encoder: CLIPVisionConfig
    num_frames: int
    height: int
    width: int
    discriminator_blocks: tuple[int, ...] = (2, 5, 8, 11)

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """The shape of one clip's latents, without their channels."""
        return 1, self.num_frames, self.height // self.vae.downscale, self.width // self.vae.downscale


SIZES = {
    "tiny": Size(
        UNetConfig(
            block_out_channels=(32, 64),
            layers_per_block=1,
            num_attention_heads=(2, 4),
            has_attention=(True, False),
            cross_attention_dim=32,
            addition_time_embed_dim=16,
        ),
        VAEConfig(block_out_channels=(32, 32)),
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28),
        CLIPVisionConfig(32, 64, projection_dim=32, num_hidden_layers=2, num_attention_heads=2, image_size=28),
        num_frames=4,
        height=32,
        width=48,
        discriminator_blocks=(0, 1),
    ),
    # 137 M parameters: what a CPU can be measured with.
    "small": Size(
        UNetConfig(
            block_out_channels=(96, 192, 384, 384),
            num_attention_heads=(3, 6, 6, 6),
            cross_attention_dim=256,
            addition_time_embed_dim=64,
        ),
        VAEConfig(block_out_channels=(32, 64, 64)),
        Dinov2Config(hidden_size=192, num_hidden_layers=6, num_attention_heads=3),
        CLIPVisionConfig(192, 768, projection_dim=256, num_hidden_layers=6, num_attention_heads=3),
        num_frames=14,
        height=128,
        width=192,
        discriminator_blocks=(0, 2, 4, 5),
    ),
    "full": Size(UNetConfig(), VAEConfig(), Dinov2Config(), CLIPVisionConfig(), num_frames=14, height=576, width=1024),
}


def as_array(value: Any) -> np.ndarray:
    """A result of ours: an array, or gradients by path, in the order of their paths."""
    if isinstance(value, dict):
        return np.concatenate([np.asarray(value[path], np.float32).ravel() for path in sorted(value)])
    return np.asarray(value, np.float32)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One thing that both sides compute.

    Attributes:
        ours: a jitted function; its result is compared with the reference's.
        arguments: of `ours`.
        theirs: the reference, without arguments.
        compare: the reference's result in our layout, as NumPy; parts that are compared one by one, by name.
        finish: what the host does with either result, if that is to be timed, too.
        read: our result as NumPy, as `compare` has the reference's.
    """

    ours: Any
    arguments: tuple[Any, ...]
    theirs: Callable[[], Any]
    compare: Callable[[Any], Any]
    finish: Callable[[np.ndarray], None] | None = None
    read: Callable[[Any], Any] = as_array


def state_dict(params: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Our weights by the names that a checkpoint has for them."""
    named = (naming.to_torch(path, np.asarray(leaf, np.float32)) for path, leaf in flatten_dict(params).items())
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in named}


def weights(component: str, config: Any) -> Mapping[str, Any]:
    return random_frozen({component: config}, np.float32)[component]


class Bench:
    """Inputs and networks of one size, on one device, in one dtype."""

    def __init__(self, size: Size, dtype: str, compile_reference: bool) -> None:
        self.size, self.dtype, self.compile_reference = size, jnp.dtype(dtype), compile_reference
        self.torch_dtype = getattr(torch, dtype)
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self.rng = np.random.default_rng(0)

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape, np.float32)

    def on_torch(self, value: np.ndarray) -> torch.Tensor:
        return torch.tensor(value, device=self.device, dtype=self.torch_dtype)

    def reference(self, model: Any, values: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> Any:
        """A PyTorch network with these weights; none may be missing or left over."""
        model.load_state_dict(values)
        # Not diffusers' own `to`, which warns of layers that these networks do not have.
        model = torch.nn.Module.to(model, self.device, dtype or self.torch_dtype).eval().requires_grad_(False)
        return torch.compile(model) if self.compile_reference else model

    def through_checkpoint(self, cls: Any, config: Any, values: Mapping[str, torch.Tensor]) -> Any:
        """`reference` of a network of transformers, whose checkpoints have other names than its modules."""
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            save_file(dict(values), f"{folder}/model.safetensors")
            loaded = cls.from_pretrained(folder)
        return self.reference(loaded, loaded.state_dict())

    def on_device(self, params: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), params)

    def dtypes(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.dtype}

    def unet_inputs(self) -> tuple[np.ndarray, ...]:
        size = self.size
        sample = self.normal(*size.latents, size.unet.in_channels)
        return sample, np.full(1, 0.3, np.float32), self.normal(1, size.unet.cross_attention_dim), np.ones((1, 3), "f")

    def torch_unet(self, params: Mapping[str, Any]) -> Any:
        config = dataclasses.replace(self.size.unet, num_frames=self.size.num_frames)
        return self.reference(UNetSpatioTemporalConditionModel.from_config(unet_json(config)), state_dict(params))

    def unet_arguments(self, inputs: tuple[np.ndarray, ...]) -> tuple[torch.Tensor, ...]:
        sample, time, embedding, ids = (self.on_torch(value) for value in inputs)
        return sample.movedim(-1, 2).contiguous(), time, embedding[:, None], ids

    def unet(self) -> Pair:
        """The denoiser's network, without gradients."""
        params, inputs = weights("unet", self.size.unet), self.unet_inputs()
        network = SVDUNet(self.size.unet, **self.dtypes())
        ours = jax.jit(lambda params, *inputs: network.apply({"params": params}, *inputs))
        model, arguments = self.torch_unet(params), self.unet_arguments(inputs)
        arguments_of_ours = (self.on_device(params), *map(jnp.asarray, inputs))
        return Pair(ours, arguments_of_ours, lambda: model(*arguments).sample, lambda y: numpy(y.movedim(2, -1)))

    def torch_student(self, params: Mapping[str, Any], lora: Mapping[str, Any]) -> tuple[Any, dict[Any, Any]]:
        """The reference with PEFT's LoRA, not compiled, and the LoRA's matrices, float32, by our paths."""
        model = self.torch_unet(params)
        # Of a compiled module PEFT would wrap what is compiled: first PEFT, then the compiler.
        bare = getattr(model, "_orig_mod", model)
        student = peft.get_peft_model(bare, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TORCH_TARGETS))
        parameters = dict(student.named_parameters())
        named = {
            path: parameters[
                f"base_model.model.{naming.torch_module(path[:-1])}.lora_{path[-1].upper()}.default.weight"
            ]
            for path in flatten_dict(lora)
        }
        for path, leaf in flatten_dict(lora).items():
            named[path].data = torch.tensor(np.asarray(leaf).T.copy(), device=self.device)
        return student, named

    def student_lora(self, params: Mapping[str, Any]) -> Any:
        """Matrices of which none is zero, so that both of a pair have a gradient."""
        lora = init_lora(jax.random.key(0), params, RANK, target_modules(params, "attention"))
        return jax.tree.map(lambda leaf: jnp.asarray(self.normal(*leaf.shape) * leaf.shape[0] ** -0.5), lora)

    def autocast(self) -> Any:
        return torch.autocast(self.device, self.torch_dtype, self.torch_dtype != torch.float32)

    def student(self) -> Pair:
        """The network with LoRA on attention, and the LoRA's gradient."""
        params, inputs = weights("unet", self.size.unet), self.unet_inputs()
        network = SVDUNet(self.size.unet, **self.dtypes())
        lora = self.student_lora(params)

        def loss(lora: Any, params: Any, *inputs: Any) -> Any:
            y = apply(network, {"params": params, "lora": lora}, *inputs)
            return jnp.mean(jnp.square(y.astype(jnp.float32)))

        gradient = jax.grad(loss)
        ours = jax.jit(lambda *arguments: flatten_dict(gradient(*arguments)))
        student, named = self.torch_student(params, lora)
        # In the order in which `as_array` has our gradients.
        adapters = [named[path] for path in sorted(named)]
        run = torch.compile(student) if self.compile_reference else student
        arguments = self.unet_arguments(inputs)

        def theirs() -> list[torch.Tensor]:
            student.zero_grad(set_to_none=True)
            with torch.enable_grad(), self.autocast():
                run(*arguments).sample.float().square().mean().backward()
            return adapters

        def compare(adapters: list[torch.Tensor]) -> np.ndarray:
            return np.concatenate([numpy(adapter.grad).T.ravel() for adapter in adapters])

        return Pair(ours, (lora, self.on_device(params), *map(jnp.asarray, inputs)), theirs, compare)

    def torch_vae(self, params: Mapping[str, Any], dtype: torch.dtype | None = None) -> Any:
        config = self.size.vae
        depth = len(config.block_out_channels)
        model = AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * depth,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
        )
        return self.reference(model, state_dict(params), dtype)

    def vae_encode(self) -> Pair:
        """The mean of the latents of every frame."""
        params, network = weights("vae", self.size.vae), SVDVAE(self.size.vae, **self.dtypes())
        images = self.normal(self.size.num_frames, self.size.height, self.size.width, 3)
        ours = jax.jit(lambda params, x: network.apply({"params": params}, x, method="encode")[0])
        model, x = self.torch_vae(params), self.on_torch(images).movedim(-1, 1).contiguous()
        theirs = lambda: model.encode(x).latent_dist.mean  # noqa: E731
        return Pair(ours, (self.on_device(params), jnp.asarray(images)), theirs, lambda y: numpy(y.movedim(1, -1)))

    def vae_decode(self) -> Pair:
        """All frames of a clip at once."""
        params, network = weights("vae", self.size.vae), SVDVAE(self.size.vae, **self.dtypes())
        latents = self.normal(*self.size.latents, self.size.vae.latent_channels)
        ours = jax.jit(lambda params, x: network.apply({"params": params}, x, method="decode")[0])
        model, x = self.torch_vae(params), self.on_torch(latents)[0].movedim(-1, 1).contiguous()
        theirs = lambda: model.decode(x, num_frames=self.size.num_frames).sample  # noqa: E731
        return Pair(ours, (self.on_device(params), jnp.asarray(latents)), theirs, lambda y: numpy(y.movedim(1, -1)))

    def torch_dinov2(self, params: Mapping[str, Any]) -> Any:
        config = self.size.dinov2
        unused = {"embeddings.mask_token": torch.zeros(1, config.hidden_size)}
        original = transformers.Dinov2Config(**dataclasses.asdict(config))
        return self.through_checkpoint(transformers.Dinov2Model, original, state_dict(params) | unused)

    def dinov2(self) -> Pair:
        """The discriminator's backbone on every frame: patch tokens of the last block."""
        config = self.size.dinov2
        params, network = weights("dinov2", config), Dinov2(config, **self.dtypes())
        side = max(1, round(self.size.height / 14)) * 14, max(1, round(self.size.width / 14)) * 14
        images, block = self.normal(self.size.num_frames, *side, 3), config.num_hidden_layers - 1
        ours = jax.jit(lambda params, x: network.apply({"params": params}, x, (block,))[0])
        model = self.torch_dinov2(params)
        x = self.on_torch(images).movedim(-1, 1).contiguous()
        theirs = lambda: model(x, output_hidden_states=True).hidden_states[-1]  # noqa: E731
        return Pair(ours, (self.on_device(params), jnp.asarray(images)), theirs, lambda y: numpy(y[:, 1:]))

    def image_to_latents(self) -> Pair:
        """One step from pure noise: CLIP, the VAE's encoder in float32 on both sides, and the UNet once."""
        return self.image_to(lambda codec, vae_params, x: x, lambda vae, x: x.movedim(2, -1))

    def image_to_mp4(self) -> Pair:
        """The same, all frames decoded at once, and an H.264 file by the same encoder."""
        factor, num_frames = self.size.vae.scaling_factor, self.size.num_frames

        def decoded(vae: Any, x: torch.Tensor) -> torch.Tensor:
            frames = vae.decode((x[0] / factor).to(self.torch_dtype), num_frames=num_frames).sample
            return frames.movedim(1, -1)[None]

        def write(frames: np.ndarray) -> None:
            with tempfile.TemporaryDirectory() as folder:
                write_video(f"{folder}/clip.mp4", to_uint8(frames[0]), 7)

        pair = self.image_to(lambda codec, vae_params, x: codec.decode_video(vae_params, x), decoded)
        return dataclasses.replace(pair, finish=write)

    def image_to(self, ours_then: Callable[..., Any], theirs_then: Callable[..., Any]) -> Pair:
        """From an image to latents, and what is then done with them. CLIP's input is resized before, for both sides.

        Args:
            ours_then: of our codec, the VAE's parameters and scaled latents [1 f h w c].
            theirs_then: of the reference's VAE and scaled latents [1 f c h w]; its result is in our layout.
        """
        size, dtypes = self.size, self.dtypes()
        params = {name: weights(name, getattr(size, name)) for name in ("unet", "vae", "image_encoder")}
        codec = Codec(SVDVAE(size.vae, **dtypes), CLIPVision(size.image_encoder, **dtypes))
        unet = SVDUNet(size.unet, **dtypes)
        image = self.rng.uniform(-1, 1, (1, size.height, size.width, 3)).astype(np.float32)
        noise, pixels = (
            self.normal(*size.latents, size.vae.latent_channels),
            np.asarray(codec.clip_pixels(jnp.asarray(image))),
        )
        ids = np.array([[6, 127, 0.02]], np.float32)

        def run(params: Any, pixels: Any, image: Any, noise: Any) -> Any:
            embedding = codec.embed_pixels(params["image_encoder"], pixels)
            cond = Conditioning(embedding, codec.encode_mode(params["vae"], image), jnp.asarray(ids))
            denoiser = EDMBackbone(lambda *inputs: apply(unet, {"params": params["unet"]}, *inputs), cond)
            return ours_then(codec, params["vae"], denoiser(SIGMA * noise, jnp.full(1, SIGMA)))

        held = {
            name: jax.tree.map(lambda leaf, name=name: jnp.asarray(leaf, parameter_dtype(name, self.dtype)), tree)
            for name, tree in params.items()
        }
        original = transformers.CLIPVisionConfig(**dataclasses.asdict(size.image_encoder))
        clip = self.through_checkpoint(
            transformers.CLIPVisionModelWithProjection, original, state_dict(params["image_encoder"])
        )
        encoder, vae = self.torch_vae(params["vae"], torch.float32), self.torch_vae(params["vae"])
        model, norm = self.torch_unet(params["unet"]), float(np.sqrt(SIGMA**2 + 1))
        seen = self.on_torch(pixels).movedim(-1, 1).contiguous()
        first_frame = torch.tensor(image, device=self.device).movedim(-1, 1).contiguous()
        x = SIGMA * torch.tensor(noise, device=self.device).movedim(-1, 2)
        time, told = torch.full((1,), 0.25 * float(np.log(SIGMA)), device=self.device), self.on_torch(ids)

        def theirs() -> torch.Tensor:
            embedding = clip(seen).image_embeds[:, None]
            first = encoder.encode(first_frame).latent_dist.mode()
            sample = torch.cat([x / norm, first[:, None].expand(-1, size.num_frames, -1, -1, -1)], dim=2)
            v = model(sample.to(self.torch_dtype), time.to(self.torch_dtype), embedding, told).sample.float()
            return theirs_then(vae, x / norm**2 - SIGMA / norm * v)

        arguments = (held, jnp.asarray(pixels), jnp.asarray(image), jnp.asarray(noise))
        return Pair(jax.jit(run), arguments, theirs, numpy)


def numpy(value: torch.Tensor) -> np.ndarray:
    return value.detach().float().cpu().numpy()
