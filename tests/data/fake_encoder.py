"""In place of the VAE and CLIP: means of pixels and noise from the keys, a function of each clip alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from osv_jax.data.schemas import Schema
from osv_jax.preparation.encoder import Encoder

SCHEMA = Schema(4, 3, 4, 4, 8, 2)


class FakeEncoder(Encoder):
    def __init__(
        self,
        schema: Schema = SCHEMA,
        seconds: float = 0.0,
        on_call: Callable[[np.ndarray], None] = lambda keys: None,
    ):
        self.schema, self._seconds, self._on_call = schema, seconds, on_call

    def __call__(self, video: np.ndarray, keys: np.ndarray) -> dict[str, np.ndarray]:
        self._on_call(keys)
        time.sleep(self._seconds)
        s, n = self.schema, len(video)
        mean = video.astype(np.float32).mean((2, 3, 4)) / 255
        size = (s.latent_height, s.latent_width, s.latent_channels)
        noise = np.stack(
            [np.random.default_rng(key).standard_normal((s.num_augmented, *size), np.float32) for key in keys]
        )
        strength = np.abs(noise[:, :, 0, 0, 0])
        return {
            "latents": mean[:, :, None, None, None] + np.zeros((n, s.num_frames, *size), np.float32),
            "image_embedding": np.broadcast_to(mean[:, :1], (n, s.embedding_size)).astype(np.float32),
            "image_latents": noise,
            "noise_aug_strength": strength,
        }

    def decode(self, latents: np.ndarray) -> np.ndarray:
        grey = (255 * latents.mean((1, 2, 3))).clip(0, 255).astype(np.uint8)
        return np.broadcast_to(grey[:, None, None, None], (len(latents), 24, 32, 3))


def grey_of(record: dict) -> list[int]:
    """The frame numbers of a `synthetic_video` that a record of this encoder was made of."""
    grey = record["latents"].astype(np.float32).mean((1, 2, 3)) * 255
    return np.round((grey - 20) / 5).astype(int).tolist()
