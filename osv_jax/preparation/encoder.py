"""From clips to what a dataset holds: scaled latents, CLIP embedding, noise-augmented latents of the first frame."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8, UInt32

from osv_jax.codec import Codec
from osv_jax.data.latents import Schema
from osv_jax.diffusion.conditioning import random_noise_aug_strength
from osv_jax.errors import UserError
from osv_jax.runtime.finite import NotFinite, blame_weights, first_not_finite
from osv_jax.runtime.media import to_float, to_uint8
from osv_jax.runtime.precision import matmul_precision

Encoded = dict[str, np.ndarray]


class Encoder:
    """The VAE's encoder and CLIP, compiled once for one size of clips and batches, on all devices of this machine.

    Args:
        codec: the VAE and CLIP, as modules.
        params: their parameters, under `vae` and `image_encoder`.
        schema: what is stored of a clip.
        height, width: of a frame [px].
        batch_size: clips in a batch; fewer are padded, so that a clip's values do not depend on how many there are.
        devices: by default those of this process.

    Raises:
        UserError: when the batch does not split over the devices.
    """

    def __init__(
        self,
        codec: Codec,
        params: Mapping[str, Any],
        schema: Schema,
        height: int,
        width: int,
        batch_size: int,
        devices: Sequence[jax.Device] | None = None,
    ):
        devices = jax.local_devices() if devices is None else devices
        if batch_size % len(devices):
            raise UserError(
                f"--batch_size={batch_size} does not split over {len(devices)} devices; use a multiple of that."
            )
        self.codec, self.schema, self.batch_size = codec, schema, batch_size
        mesh = Mesh(np.array(devices), ("data",))
        self._split = NamedSharding(mesh, PartitionSpec("data"))
        whole = NamedSharding(mesh, PartitionSpec())
        self.params = jax.device_put({name: params[name] for name in ("vae", "image_encoder")}, whole)
        self._decode_program = jax.jit(codec.decode_video)
        video = jax.ShapeDtypeStruct((batch_size, schema.num_frames, height, width, 3), jnp.uint8, sharding=self._split)
        keys = jax.ShapeDtypeStruct((batch_size, 2), jnp.uint32, sharding=self._split)
        with matmul_precision(codec.image_encoder.dtype):
            self._program = jax.jit(self._encode, out_shardings=self._split).lower(self.params, video, keys).compile()

    def __call__(self, video: UInt8[np.ndarray, "n f h w 3"], keys: UInt32[np.ndarray, "n 2"]) -> Encoded:
        """Encodes up to `batch_size` clips and waits for the result.

        Args:
            video: the clips.
            keys: what the noise of each depends on; see `noise_key`.

        Returns:
            `latents`, `image_embedding`, `image_latents` and `noise_aug_strength` of `data.latents.Schema`, float32.

        Raises:
            UserError: values that are not finite.
        """
        missing = self.batch_size - len(video)
        padded = [np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), mode="edge") for x in (video, keys)]
        encoded = self._program(self.params, *(jax.device_put(x, self._split) for x in padded))
        encoded = {name: np.asarray(value)[: len(video)] for name, value in encoded.items()}
        with blame_weights(self.params):
            if name := first_not_finite(encoded):
                raise NotFinite(f"{name} of a clip has values that are NaN or infinite: use --dtype=float32.")
        return encoded

    def _encode(
        self, params: Mapping[str, Any], video: UInt8[Array, "b f h w 3"], keys: UInt32[Array, "b 2"]
    ) -> dict[str, Array]:
        first = to_float(video[:, 0])
        count = self.schema.num_augmented
        strength, noise_keys = jax.vmap(lambda key: augmentation(key, count))(keys)

        def encode_augmented(k: Array) -> Array:
            noise = jax.vmap(lambda keys: jax.random.normal(keys[k], first.shape[1:]))(noise_keys)
            return self.codec.encode_mode(params["vae"], first + strength[:, k, None, None, None] * noise)

        return {
            "latents": self.codec.encode_video(params["vae"], video),
            "image_embedding": self.codec.embed_image(params["image_encoder"], first),
            "image_latents": jax.lax.map(encode_augmented, jnp.arange(count)).swapaxes(0, 1),
            "noise_aug_strength": strength,
        }

    def decode(self, latents: Float[np.ndarray, "f h w c"]) -> UInt8[np.ndarray, "f height width 3"]:
        """Frames of scaled latents, two at a time."""
        params = self.params["vae"]
        with matmul_precision(self.codec.vae.dtype):
            parts = [self._decode_program(params, latents[None, i : i + 2]) for i in range(0, len(latents), 2)]
        frames = np.concatenate([np.asarray(part[0], np.float32) for part in parts])
        with blame_weights(self.params):
            return to_uint8(frames)


def augmentation(key: UInt32[Array, "2"], count: int) -> tuple[Float[Array, " k"], Array]:
    """The strengths of `count` augmentations of a clip's first frame, and the keys of their noise."""
    strength_key, noise_key = jax.random.split(jax.random.wrap_key_data(key, impl="threefry2x32"))
    return random_noise_aug_strength(strength_key, (count,)), jax.random.split(noise_key, count)


def noise_key(seed: int, source: str, number: int) -> UInt32[np.ndarray, "2"]:
    """What a clip's noise depends on: the seed, the name of its video and its number there, and nothing else."""
    digest = hashlib.sha256(f"{seed} {number} {source}".encode()).digest()
    return np.frombuffer(digest[:8], "<u4")
