"""The clips of a training run: pixels of a folder of videos, or latents of prepared datasets."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from osv_jax.data import demo, latents, order, pixels
from osv_jax.data.schemas import Schema, TextSchema
from osv_jax.errors import UserError
from osv_jax.models.clip_text import CLIPTextConfig
from osv_jax.models.text_unet import TextUNetConfig
from osv_jax.objectives.text_networks import AnyNetworks
from osv_jax.runtime.paths import Path
from osv_jax.training.config import Phase, phases_of


@dataclasses.dataclass(frozen=True)
class PixelClips:
    """Clips of `config.data.videos`, decoded when they are needed and encoded inside the step."""

    config: ConfigDict
    index: pixels.ClipIndex

    def count(self, phase: Phase) -> int:
        """Clips in an epoch."""
        return len(self.index.clips)

    def batches(self, phase: Phase, start_step: int) -> grain.IterDataset:
        """This process's part of the batches, from a step on."""
        return pixels.pixel_dataset(
            self._sized(phase), self.config.batch_size, self.config.seed, start_step, **_this_process()
        )

    def save_position(self, phase: Phase, step: int) -> dict[str, int | str]:
        """What a checkpoint keeps."""
        return pixels.save_position(self.index, self.config.batch_size, self.config.seed, step)

    def check_position(self, phase: Phase, position: Mapping[str, Any]) -> None:
        """Raises UserError if a checkpoint was trained on other clips."""
        pixels.restore_step(dict(position), self.index, self.config.batch_size, self.config.seed)

    def example(self, phase: Phase) -> dict[str, np.ndarray]:
        """A batch of one clip, always the same."""
        return {name: np.asarray(value)[None] for name, value in self._sized(phase).read(0).items()}

    def _sized(self, phase: Phase) -> pixels.ClipIndex:
        return dataclasses.replace(self.index, height=phase.height, width=phase.width)


@dataclasses.dataclass(frozen=True)
class LatentClips:
    """Clips of `config.data.dataset`, one dataset for each size that the run has."""

    config: ConfigDict
    datasets: Mapping[tuple[int, int], latents.LatentDataset]

    def count(self, phase: Phase) -> int:
        """Clips in an epoch."""
        return len(self._of(phase))

    def batches(self, phase: Phase, start_step: int) -> grain.IterDataset:
        """This process's part of the batches, from a step on."""
        config = self.config
        return latents.latent_batches(
            self._of(phase),
            config.batch_size,
            config.seed,
            start_step,
            num_workers=config.data.num_workers,
            **_this_process(),
        )

    def save_position(self, phase: Phase, step: int) -> dict[str, int | str]:
        """What a checkpoint keeps."""
        return order.save_position(self._of(phase).content_hash, self.config.batch_size, self.config.seed, step)

    def check_position(self, phase: Phase, position: Mapping[str, Any]) -> None:
        """Raises UserError if a checkpoint was trained on other clips."""
        dataset = self._of(phase)
        name = f"The records of {dataset.folder}"
        order.restore_step(dict(position), dataset.content_hash, name, self.config.batch_size, self.config.seed)

    def example(self, phase: Phase) -> dict[str, np.ndarray]:
        """A batch of one clip, always the same."""
        return next(iter(latents.latent_batches(self._of(phase), 1, seed=0, num_threads=1)))

    def _of(self, phase: Phase) -> latents.LatentDataset:
        return self.datasets[phase.height, phase.width]


def open_clips(config: ConfigDict, networks: AnyNetworks, workdir: Path) -> PixelClips | LatentClips:
    """The clips that a configuration names.

    Raises:
        UserError: if they cannot be read, or do not fit the configuration.
    """
    if not config.data.dataset:
        return PixelClips(config, index_videos(config, workdir))
    return LatentClips(config, {(p.height, p.width): _open_dataset(config, networks, p) for p in phases_of(config)})


@dataclasses.dataclass(frozen=True)
class HeldOutClips:
    """Clips on which a run is measured, in batches as `objective.batch` takes them.

    Attributes:
        source: of clips by their numbers.
        chosen: numbers.
    """

    source: pixels.ClipIndex | latents.LatentDataset
    chosen: tuple[int, ...]

    def batch(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """Some of the clips, of which numbers count from 0."""
        clips = [self.source.read(self.chosen[number]) for number in numbers]
        source = self.source
        names = source.training_names if isinstance(source, latents.LatentDataset) else ("video", "fps")
        return {name: np.stack([clip[name] for clip in clips]) for name in names}


def held_out_clips(config: ConfigDict, networks: AnyNetworks, workdir: Path, phase: Phase) -> HeldOutClips:
    """The clips for `config.eval_every`: the split `test` of the run's dataset, or those of `config.evaluation.videos`.

    Raises:
        UserError: there are none, or they do not fit the configuration.
    """
    options = config.evaluation
    if config.data.dataset:
        dataset = _open_dataset(config, networks, phase, "test")
        return HeldOutClips(dataset, tuple(pixels.spread(len(dataset), options.clips)))
    if not options.videos:
        raise UserError("config.eval_every needs config.evaluation.videos, a folder of videos to measure with.")
    index = index_folder(options.videos, config.data, phase.height, phase.width, workdir / "test_clips.json")
    return HeldOutClips(index, tuple(pixels.spread(len(index.clips), options.clips)))


def index_videos(config: ConfigDict, workdir: Path) -> pixels.ClipIndex:
    """The clips of `config.data.videos`, at the first resolution; see `index_folder`."""
    first = phases_of(config)[0]
    return index_folder(config.data.videos, config.data, first.height, first.width, workdir / "clips.json")


def index_folder(name: str, data: ConfigDict, height: int, width: int, cache_file: Path) -> pixels.ClipIndex:
    """The clips of a folder, or of `demo`, with a line about each file that was left out.

    Args:
        data: has `num_frames` and `fps` of a clip.
        height, width, cache_file: see `pixels.index_clips`.
    """
    index = pixels.index_clips(demo.video_folder(name), data.num_frames, data.fps, height, width, cache_file)
    if index.skipped:
        print(f"{len(index.skipped)} videos were left out:", file=sys.stderr)
        for path, reason in index.skipped[:10]:
            print(f"  {path} {reason}", file=sys.stderr)
    return index


def _open_dataset(
    config: ConfigDict, networks: AnyNetworks, phase: Phase, split: str = "train"
) -> latents.LatentDataset:
    size = {"height": phase.height, "width": phase.width}
    folder = config.data.dataset.replace("{height}", str(phase.height)).replace("{width}", str(phase.width))
    dataset = latents.open_dataset(folder, split)
    wanted = size | {"num_frames": config.data.num_frames, "fps": config.data.fps}
    wrong = {name: value for name, value in wanted.items() if dataset.metadata.get(name) != value}
    if wrong:
        holds = ", ".join(f"{name} {dataset.metadata.get(name, 'missing')}" for name in wrong)
        needs = ", ".join(f"{name} {value}" for name, value in wrong.items())
        raise UserError(
            f"The dataset {folder} has {holds}, but the configuration needs {needs}; change config.data, or prepare"
            " another dataset."
        )
    unet, vae = networks.unet.config, networks.vae.config
    shape = (dataset.schema.num_frames, phase.height // vae.downscale, phase.width // vae.downscale, unet.out_channels)
    fitting: Schema | TextSchema
    if isinstance(unet, TextUNetConfig):
        tokens = CLIPTextConfig.max_position_embeddings
        fitting = TextSchema(*shape, num_tokens=tokens, text_size=unet.cross_attention_dim)
    else:
        augmented = getattr(dataset.schema, "num_augmented", 1)
        fitting = Schema(*shape, embedding_size=unet.cross_attention_dim, num_augmented=augmented)
    if dataset.schema != fitting:
        raise UserError(
            f"The dataset {folder} was made with other networks: it holds {dataset.schema}, and this UNet and VAE need"
            f" {fitting}; prepare it again with these weights."
        )
    return dataset


def _this_process() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}
