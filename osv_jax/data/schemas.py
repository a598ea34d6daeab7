"""What a record of a prepared dataset holds: of clips for videos from images, and of clips for videos from text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

# Arrays that are stored as bfloat16, of either schema.
BFLOAT16 = frozenset(("latents", "image_latents", "text_embeddings"))
EMPTY_TEXT = "empty_text_embeddings"


@dataclasses.dataclass(frozen=True)
class Schema:
    """The sizes of a record's arrays.

    Attributes:
        num_frames, latent_height, latent_width, latent_channels: `latents`, scaled (`f h w c`, bfloat16).
        embedding_size: `image_embedding`, CLIP's of the clean first frame (float32).
        num_augmented: K of `image_latents` (`k h w c`, bfloat16), the unscaled latents of the first frame with noise of
            the strengths `noise_aug_strength` (`k`, float32).
    """

    num_frames: int
    latent_height: int
    latent_width: int
    latent_channels: int
    embedding_size: int
    num_augmented: int

    # What training reads.
    for_training: ClassVar[tuple[str, ...]] = (
        *("latents", "image_latents", "image_embedding", "noise_aug_strength", "fps"),
    )

    def features(self) -> Any:
        """`tfds.features.FeaturesDict`. Tensors are stored as bytes: as numbers they take longer and more space."""
        size = (self.latent_height, self.latent_width, self.latent_channels)
        return _features_dict(
            {
                "latents": (np.uint16, self.num_frames, *size),
                "image_embedding": (np.float32, self.embedding_size),
                "image_latents": (np.uint16, self.num_augmented, *size),
                "noise_aug_strength": (np.float32, self.num_augmented),
            }
        )


@dataclasses.dataclass(frozen=True)
class TextSchema:
    """The sizes of a record's arrays in a dataset for videos from text.

    The text encoder's states of the empty prompt are in the dataset once; see `LatentDataset.empty_text`.

    Attributes:
        num_frames, latent_height, latent_width, latent_channels: `latents`, scaled, of the image VAE (`f h w c`,
            bfloat16).
        num_tokens, text_size: `text_embeddings`, the text encoder's states of the caption (`t d`, bfloat16).
    """

    num_frames: int
    latent_height: int
    latent_width: int
    latent_channels: int
    num_tokens: int
    text_size: int

    for_training: ClassVar[tuple[str, ...]] = ("latents", "text_embeddings", "fps")

    def features(self) -> Any:
        """As `Schema.features`."""
        size = (self.latent_height, self.latent_width, self.latent_channels)
        return _features_dict(
            {
                "latents": (np.uint16, self.num_frames, *size),
                "text_embeddings": (np.uint16, self.num_tokens, self.text_size),
            }
        )


def schema_of(fields: Mapping[str, int]) -> Schema | TextSchema:
    """The schema with these sizes, as metadata.json has them.

    Raises:
        KeyError: other names than those of either schema.
    """
    kinds = {frozenset(field.name for field in dataclasses.fields(kind)): kind for kind in (Schema, TextSchema)}
    return kinds[frozenset(fields)](**fields)


def _features_dict(tensors: Mapping[str, tuple[Any, ...]]) -> Any:
    """Tensors, each of a dtype and a shape, and what every record has."""
    # A second to import, which training from videos need not wait for; so everywhere in this module.
    import tensorflow_datasets as tfds

    made = {
        name: tfds.features.Tensor(shape=tuple(shape), dtype=dtype, encoding=tfds.features.Encoding.BYTES)
        for name, (dtype, *shape) in tensors.items()
    }
    texts = {name: tfds.features.Text() for name in ("caption", "source")}
    numbers = {name: tfds.features.Scalar(np.float32) for name in ("fps", "clip_start", "motion")}
    return tfds.features.FeaturesDict({**made, **texts, **numbers})
