"""Samples of what a run has trained so far, made on the run's own devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from osv_jax.models.tiny_decoder import Memory
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Objective
from osv_jax.objectives.players import Student
from osv_jax.runtime import media, mesh
from osv_jax.runtime.compiler import compiler_options


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Programs that are compiled once and serve every step of a run. Every process has whole results.

    Attributes:
        config: of the run.
        devices: those of the run.
    """

    config: ConfigDict
    objective: Objective
    devices: jax.sharding.Mesh

    def encode(
        self, frozen: Params, clips: Mapping[str, Array | np.ndarray], key: jax.Array, noise_key: jax.Array
    ) -> tuple[Any, Float[Array, "b f h w c"]]:
        """The condition of clips, as a step would draw it, and standard normal noise for their latents."""
        return self._encode(frozen, clips, key, noise_key)

    def student(
        self, student: Student, frozen: Params, cond: Any, noise: Float[Array, "b f h w c"]
    ) -> Float[Array, "b f h w c"]:
        """Latents by the objective's `preview`."""
        denoiser = functools.partial(self._student, student, frozen, cond)
        return self.objective.preview(denoiser, noise)

    def teacher(
        self, frozen: Params, cond: Any, noise: Float[Array, "b f h w c"], steps: int
    ) -> Float[Array, "b f h w c"]:
        """Latents of the frozen UNet, as the objective's teacher is sampled."""
        denoiser = functools.partial(self._teacher, frozen, cond)
        return self.objective.teacher_sample(denoiser, noise, steps)

    def frames(self, frozen: Params, latents: Float[Array, "b f h w c"]) -> UInt8[np.ndarray, "b f h2 w2 3"]:
        """Pixels of scaled latents."""
        # Two frames at a time: decoding a whole clip at 576 x 1024 takes more memory than a training step.
        chunks = [
            self._decode(frozen[self.objective.vae], latents[:, i : i + 2]) for i in range(0, latents.shape[1], 2)
        ]
        return media.to_uint8(np.concatenate([np.asarray(chunk) for chunk in chunks], axis=1))

    def fast_frames(self, tiny: Params, latents: Float[Array, "b f h w c"]) -> UInt8[np.ndarray, "b f h2 w2 3"]:
        """The same by the tiny decoder.

        Args:
            tiny: its parameters.
        """
        decoder, decoded = self.objective.networks.tiny_decoder, []
        assert decoder is not None, "there is no tiny decoder"
        memory = decoder.memory(latents)
        for i in range(0, latents.shape[1], 2):
            frames, memory = self._decode_fast(tiny, latents[:, i : i + 2], memory)
            decoded.append(np.asarray(frames))
        return media.to_uint8(np.concatenate(decoded, axis=1))

    @functools.cached_property
    def _whole(self) -> jax.sharding.NamedSharding:
        return mesh.replicated(self.devices)

    def _program(self, function: Callable) -> Callable:
        return jax.jit(function, out_shardings=self._whole, compiler_options=compiler_options())

    def _split(self, batch: Any) -> Any:
        """Each device takes its part of a batch that can be split, and not the whole."""
        parts = self.devices.shape["data"] * self.devices.shape["fsdp"]
        if len(jax.tree.leaves(batch)[0]) % parts:
            return batch
        return jax.lax.with_sharding_constraint(batch, mesh.batch_shardings(self.devices, batch))

    @functools.cached_property
    def _encode(self) -> Callable:
        def encode(
            frozen: Params, clips: Mapping[str, Array], key: jax.Array, noise_key: jax.Array
        ) -> tuple[Any, Array]:
            batch = self.objective.batch(frozen, self._split(clips), key, self.config.data)
            return batch.cond, jax.random.normal(noise_key, batch.latents.shape)

        return self._program(encode)

    @functools.cached_property
    def _student(self) -> Callable:
        def denoised(student: Student, frozen: Params, cond: Any, x: Array, sigma: Array) -> Array:
            cond, x, sigma = self._split((cond, x, sigma))
            backbone = self.objective.backbone(frozen, student, cond)
            return self.objective.preview_denoiser(backbone, x.shape[1])(x, sigma)

        return self._program(denoised)

    @functools.cached_property
    def _teacher(self) -> Callable:
        def denoised(frozen: Params, cond: Any, x: Array, sigma: Array) -> Array:
            cond, x, sigma = self._split((cond, x, sigma))
            backbone = self.objective.backbone(frozen, None, cond)
            return self.objective.teacher_denoiser(backbone, x.shape[1])(x, sigma)

        return self._program(denoised)

    @functools.cached_property
    def _decode(self) -> Callable:
        codec = self.objective.networks.codec
        return self._program(lambda vae, latents: codec.decode_video(vae, self._split(latents)))

    @functools.cached_property
    def _decode_fast(self) -> Callable:
        codec = self.objective.networks.codec

        def decode(tiny: Params, latents: Array, memory: Memory) -> tuple[Array, Memory]:
            return codec.decode_fast(tiny, *self._split((latents, memory)))

        return self._program(decode)
