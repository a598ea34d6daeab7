"""From clips to what a dataset holds: scaled latents, and conditions made of their first frames or captions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped, UInt8, UInt32

from osv_jax.codec import TextCodec
from osv_jax.convert.tokenizer import Tokenizer
from osv_jax.data.latents import encode_empty_text
from osv_jax.diffusion.conditioning import random_noise_aug_strength
from osv_jax.errors import UserError
from osv_jax.runtime.compiler import compiler_options
from osv_jax.runtime.finite import NotFinite, blame_weights, first_not_finite
from osv_jax.runtime.media import to_float, to_uint8
from osv_jax.runtime.precision import matmul_precision

Encoded = dict[str, np.ndarray]


# The name of a clip's video, its number there, and the video's caption.
ClipName = tuple[str, int, str]


class Encoder:
    """The VAE's encoder and CLIP's, compiled once for one size of clips and batches, on all devices of this machine.

    Args:
        codec: the VAE and CLIP, as modules.
        params: their parameters, by `networks`.
        schema: what is stored of a clip.
        height, width: of a frame [px].
        batch_size: clips in a batch; fewer are padded, so that a clip's values do not depend on how many there are.
        devices: by default those of this process.

    Raises:
        UserError: when the batch does not split over the devices.
    """

    # The VAE, and what makes conditions.
    networks: ClassVar[tuple[str, str]] = ("vae", "image_encoder")

    def __init__(
        self,
        codec: Any,
        params: Mapping[str, Any],
        schema: Any,
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
        self.params = jax.device_put({name: params[name] for name in self.networks}, whole)
        options = compiler_options()
        self._decode_program = jax.jit(codec.decode_video, compiler_options=options)
        video = jax.ShapeDtypeStruct((batch_size, schema.num_frames, height, width, 3), jnp.uint8, sharding=self._split)
        given = self.inputs([("", 0, "")] * batch_size, 0)
        inputs = jax.ShapeDtypeStruct(given.shape, given.dtype, sharding=self._split)
        with matmul_precision(self.dtype):
            program = jax.jit(self._encode, out_shardings=self._split, compiler_options=options)
            self._program = program.lower(self.params, video, inputs).compile()

    @property
    def dtype(self) -> Any:
        """What conditions are computed in."""
        return self.codec.image_encoder.dtype

    @property
    def metadata(self) -> dict[str, str]:
        """What is stored of a dataset once."""
        return {}

    def inputs(self, clips: Sequence[ClipName], seed: int) -> Shaped[np.ndarray, "n _"]:
        """What a clip's values depend on besides its pixels: the key of its noise."""
        return np.stack([noise_key(seed, source, number) for source, number, _ in clips])

    def __call__(self, video: UInt8[np.ndarray, "n f h w 3"], keys: Shaped[np.ndarray, "n _"]) -> Encoded:
        """Encodes up to `batch_size` clips and waits for the result.

        Args:
            video: the clips.
            keys: see `inputs`.

        Returns:
            `latents`, `image_embedding`, `image_latents` and `noise_aug_strength` of `data.schemas.Schema`, float32.

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
        params = self.params[self.networks[0]]
        with matmul_precision(self.codec.vae.dtype):
            parts = [self._decode_program(params, latents[None, i : i + 2]) for i in range(0, len(latents), 2)]
        frames = np.concatenate([np.asarray(part[0], np.float32) for part in parts])
        with blame_weights(self.params):
            return to_uint8(frames)


class TextEncoder(Encoder):
    """The image VAE's encoder and CLIP's text tower, for videos from text; see `Encoder`.

    Args:
        tokenizer: of the text tower.
    """

    networks: ClassVar[tuple[str, str]] = ("image_vae", "text_encoder")

    def __init__(self, tokenizer: Tokenizer, codec: TextCodec, *args: Any, **options: Any):
        self._tokenizer = tokenizer
        super().__init__(codec, *args, **options)
        with matmul_precision(self.dtype):
            embed = jax.jit(codec.embed_text)
            tokens = self._tokenizer([""], codec.text_encoder.config.max_position_embeddings).ids
            states = np.asarray(embed(self.params["text_encoder"], tokens))[0]
        with blame_weights(self.params):
            if first_not_finite(states) is not None:
                raise NotFinite("The text encoder's states are NaN or infinite: use --dtype=float32.")
        self._empty = states

    @property
    def dtype(self) -> Any:
        return self.codec.text_encoder.dtype

    @property
    def metadata(self) -> dict[str, str]:
        return encode_empty_text(self._empty)

    def inputs(self, clips: Sequence[ClipName], seed: int) -> Shaped[np.ndarray, "n _"]:
        """The tokens of its caption; what is too long is cut, as in sampling."""
        captions = [caption for *_, caption in clips]
        return self._tokenizer(captions, self.codec.text_encoder.config.max_position_embeddings).ids

    def _encode(self, params: Mapping[str, Any], video: UInt8[Array, "b f h w 3"], tokens: Array) -> dict[str, Array]:
        return {
            "latents": self.codec.encode_video(params["image_vae"], video),
            "text_embeddings": self.codec.embed_text(params["text_encoder"], tokens),
        }


def augmentation(key: UInt32[Array, "2"], count: int) -> tuple[Float[Array, " k"], Array]:
    """The strengths of `count` augmentations of a clip's first frame, and the keys of their noise."""
    strength_key, noise_key = jax.random.split(jax.random.wrap_key_data(key, impl="threefry2x32"))
    return random_noise_aug_strength(strength_key, (count,)), jax.random.split(noise_key, count)


def noise_key(seed: int, source: str, number: int) -> UInt32[np.ndarray, "2"]:
    """What a clip's noise depends on: the seed, the name of its video and its number there, and nothing else."""
    digest = hashlib.sha256(f"{seed} {number} {source}".encode()).digest()
    return np.frombuffer(digest[:8], "<u4")
