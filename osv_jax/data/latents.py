"""Prepared datasets: clips as latents and conditions, in TFDS's layout with ArrayRecord files; no TensorFlow needed.

    for batch in latent_batches(open_dataset("latents"), batch_size=8, seed=0): ...
    tfds.builder_from_directory("latents").as_data_source("train")[0]  # the same records, as TFDS shows them

TFDS has no bfloat16 without TensorFlow: such arrays are stored as uint16, bit for bit.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import grain
import ml_dtypes
import numpy as np
from absl import flags
from jaxtyping import Float

from osv_jax.convert.json_files import read_json
from osv_jax.data import order
from osv_jax.data.schemas import BFLOAT16, EMPTY_TEXT, Schema, TextSchema, schema_of
from osv_jax.errors import UserError
from osv_jax.runtime import paths
from osv_jax.runtime.paths import Path, as_path
from osv_jax.runtime.ranges import COUNT, FPS

NAME = "osv_latents"
FORMAT = 1
# What ArrayRecord is told: one record a group, for random access; weak compression takes a fifth off latents.
WRITER_OPTIONS = "group_size:1,zstd:1"


def serialize(features: Any, record: Mapping[str, Any]) -> bytes:
    """A record as its bytes in a file. What is stored as bfloat16 may be of any float type."""
    from tensorflow_datasets.core import example_serializer

    stored = {
        name: np.asarray(record[name]).astype(ml_dtypes.bfloat16).view(np.uint16) for name in record if name in BFLOAT16
    }
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    return serializer.get_tf_example(features.encode_example({**record, **stored})).SerializeToString(
        deterministic=True
    )


def write_info(
    folder: Path,
    schema: Schema | TextSchema,
    shard_lengths: Mapping[str, list[int]],
    num_bytes: Mapping[str, int],
    metadata: Mapping[str, Any],
) -> None:
    """Writes what makes a folder of record files a dataset; `dataset_info.json`, which readers ask for, comes last.

    Args:
        folder: holds the files named by `shard_name`.
        shard_lengths, num_bytes: records of each file, and bytes of all, by split.
        metadata: goes to `metadata.json`.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info, file_adapters, naming

    identity = dataset_info.DatasetIdentity(NAME, tfds.core.Version("1.0.0"), str(folder), "osv_jax.data.latents")
    info = tfds.core.DatasetInfo(
        builder=identity,
        description="Clips for osv_jax: latents of Stable Video Diffusion, or Stable Diffusion, and conditions.",
        features=schema.features(),
        metadata=tfds.core.MetadataDict(metadata),
    )
    info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
    template = naming.ShardedFileTemplate(data_dir=folder, dataset_name=NAME, filetype_suffix="array_record")
    splits = [
        tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=num_bytes[split], filename_template=template)
        for split, lengths in shard_lengths.items()
    ]
    info.set_splits(tfds.core.SplitDict(splits))
    with tempfile.TemporaryDirectory() as made:
        info.write_to_directory(made)
        for file in sorted(pathlib.Path(made).iterdir(), key=lambda file: file.name == "dataset_info.json"):
            paths.write_text(folder / file.name, file.read_text())


def shard_name(split: str, index: int, count: int) -> str:
    """TFDS's name of a record file."""
    return f"{NAME}-{split}.array_record-{index:05d}-of-{count:05d}"


@dataclasses.dataclass(frozen=True)
class LatentDataset:
    """The records of one split; see `open_dataset`.

    Attributes:
        folder: of the dataset.
        schema: sizes of the arrays.
        metadata: of `metadata.json`: `num_frames`, `fps`, `height` and `width` of the clips, how they were made.
        files: paths and numbers of records.
    """

    folder: Path
    schema: Schema | TextSchema
    metadata: Mapping[str, Any]
    files: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return sum(count for _, count in self.files)

    @property
    def content_hash(self) -> str:
        """Of what decides which record a position means."""
        return self.metadata["content_hash"]

    @property
    def training_names(self) -> tuple[str, ...]:
        """What of a record training reads."""
        return (*self.schema.for_training, *[EMPTY_TEXT] * isinstance(self.schema, TextSchema))

    @functools.cached_property
    def empty_text(self) -> np.ndarray | None:
        """The text encoder's states of the empty prompt [t d], bfloat16; None in a dataset without texts."""
        if not isinstance(self.schema, TextSchema):
            return None
        content = base64.b64decode(self.metadata[EMPTY_TEXT])
        return np.frombuffer(content, ml_dtypes.bfloat16).reshape(self.schema.num_tokens, self.schema.text_size)

    def stored(self, *indices: int) -> list[dict[str, Any]]:
        """Records as they are stored.

        Raises:
            UserError: if one cannot be read.
        """
        try:
            source, features = _source(self.files), _features(self.schema)
            # One after the other: handing them to threads of their own takes longer than reading.
            return [features.deserialize_example_np(source[index]) for index in indices]
        except Exception as error:  # ArrayRecord, protobuf and TFDS meet damage with exceptions of all kinds.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{self.folder} is damaged: a record cannot be read, one of the numbers {', '.join(map(str, indices))}"
                f" ({reason[:200]}); copy the dataset again."
            ) from error

    def read(self, index: int) -> dict[str, Any]:
        """One record, its texts as strings and bfloat16 arrays as such.

        Raises:
            UserError: if it cannot be read.
        """
        (record,) = self.stored(index)
        record |= {name: record[name].view(ml_dtypes.bfloat16) for name in BFLOAT16 & record.keys()}
        if self.empty_text is not None:
            record[EMPTY_TEXT] = self.empty_text
        return record | {name: record[name].decode() for name in ("caption", "source")}


def open_dataset(folder: str | os.PathLike, split: str = "train") -> LatentDataset:
    """Opens what `osv_jax.prepare` wrote.

    Raises:
        UserError: if the folder is something else or unfinished, a file is missing or cut short, or there is no such
            split.
    """
    folder = as_path(folder)
    metadata = read_metadata(folder)
    check_files(folder, metadata)
    import tensorflow_datasets as tfds

    schema = schema_of(metadata["schema"])
    try:
        info = tfds.builder_from_directory(folder).info
        files = {name: [(str(i.filename), i.take) for i in x.file_instructions] for name, x in info.splits.items()}
        shapes = info.features.shape
    except Exception as error:  # TFDS meets damage with exceptions of all kinds.
        raise UserError(f"{folder} is damaged: TFDS cannot read its dataset_info.json; copy it again.") from error
    if split not in files:
        raise UserError(f"{folder} has no split {split!r}, only {', '.join(files)}.")
    known = {str(folder / name) for name in metadata["files"]}
    if not files[split] or not all(file in known and count in COUNT for file, count in files[split]):
        raise UserError(f"{folder} is damaged: its dataset_info.json is of other files; copy it again.")
    if shapes != schema.features().shape:
        raise UserError(f"{folder} is damaged: metadata.json and features.json are of other records; copy it again.")
    return LatentDataset(folder, schema, metadata, tuple(files[split]))


def check_files(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Raises UserError unless all files of records are there, as long as `metadata.json` says."""
    for name, size in metadata["files"].items():
        file = folder / name
        if not file.is_file() or paths.size_of(file) != size:
            raise UserError(f"{folder} is incomplete: {name} is missing or cut short; copy it again.")


def read_metadata(folder: Path) -> dict[str, Any]:
    """The `metadata.json` of a finished dataset.

    Raises:
        UserError: see `open_dataset`.
    """
    if not (folder / "dataset_info.json").is_file():
        if (folder / "plan.json").is_file():
            raise UserError(f"{folder} is not finished; run the same `python -m osv_jax.prepare` command again.")
        raise UserError(f"{folder} is not a dataset; make one with `python -m osv_jax.prepare`, see docs/data.md.")
    try:
        metadata = read_json(folder / "metadata.json")
        version = metadata["format"]
    except (UserError, KeyError) as error:
        raise _not_ours(folder) from error
    if version != FORMAT:
        raise UserError(f"{folder} was made by another version of osv_jax (format {version!r}); prepare it again.")
    schema, files = metadata.get("schema"), metadata.get("files")
    sizes = [metadata.get(name) for name in ("num_frames", "height", "width")]
    is_whole = (
        isinstance(schema, dict)
        and any(schema.keys() == {x.name for x in dataclasses.fields(kind)} for kind in (Schema, TextSchema))
        and all(size in COUNT for size in (*schema.values(), *sizes))
        and _has_empty_text(metadata, schema)
        and metadata.get("fps") in FPS
        and isinstance(metadata.get("content_hash"), str)
        and isinstance(files, dict)
        and all(is_plain(name) and size in COUNT for name, size in files.items())
    )
    if not is_whole:
        raise _not_ours(folder)
    return metadata


def encode_empty_text(states: Float[np.ndarray, "t d"]) -> dict[str, str]:
    """The part of `metadata.json` that `LatentDataset.empty_text` reads."""
    return {EMPTY_TEXT: base64.b64encode(states.astype(ml_dtypes.bfloat16).tobytes()).decode()}


def _has_empty_text(metadata: Mapping[str, Any], schema: Mapping[str, int]) -> bool:
    """Whether the states of the empty prompt are there, where there are texts."""
    if "num_tokens" not in schema:
        return True
    try:
        content = base64.b64decode(metadata[EMPTY_TEXT], validate=True)
    except (KeyError, TypeError, ValueError):
        return False
    return len(content) == 2 * schema["num_tokens"] * schema["text_size"]


def is_plain(name: Any) -> bool:
    """Whether something is the name of a file, which does not lead out of its folder."""
    return isinstance(name, str) and name.isprintable() and pathlib.PurePath(name).name == name


def _not_ours(folder: Path) -> UserError:
    return UserError(f"{folder} was not made by osv_jax.prepare, or is damaged: its metadata.json cannot be read.")


# Opened once in every process that reads: neither readers nor features travel to worker processes.
@functools.lru_cache(maxsize=4)
def _source(files: tuple[tuple[str, int], ...]) -> Any:
    return grain.sources.ArrayRecordDataSource([f"{path}[0:{count}]" for path, count in files])


@functools.lru_cache(maxsize=4)
def _features(schema: Schema | TextSchema) -> Any:
    return schema.features()


def latent_batches(
    dataset: LatentDataset,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    num_threads: int = 4,
) -> grain.IterDataset:
    """This process's part of the batches from `start_step` on; see `order.Order`.

    Args:
        dataset: the records.
        start_step: the first step to read.
        batch_size, seed, process_index, process_count: see `order.Order`.
        num_workers: processes that read; 0 for threads of this one. It does not change the order.
        num_threads: batches that each process reads at the same time.

    Returns:
        An iterable of {`latents`: bfloat16 [b f h w c], `fps`: float32 [b], `clip_id`: int32 [b]} and of
        {`image_embedding`: float32 [b e], `image_latents`: bfloat16 [b k h w c], `noise_aug_strength`: float32 [b k]},
        or, from a dataset with texts, {`text_embeddings`, `empty_text_embeddings`: bfloat16 [b t d]}, of which the
        latter are the same for every clip.

    Raises:
        UserError: if the batch does not split over the processes.
    """
    records = order.Order(len(dataset), batch_size, seed, process_index, process_count)
    read_step = _ReadStep(dataset, records)
    # A whole step is one element, so that worker processes, which take elements in turn, keep the order.
    prefetch = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    steps = grain.MapDataset.range(start_step, records.num_steps).map(read_step).to_iter_dataset(prefetch)
    if num_workers:
        # Grain asks absl's flags, and programs without such never parse them.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        steps = steps.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2))
    else:
        read_step.open()
    return steps.map(_as_bfloat16)


@dataclasses.dataclass(frozen=True)
class _ReadStep:
    """A step's number -> its batch; travels to worker processes."""

    dataset: LatentDataset
    order: order.Order

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.open()  # In the worker process, before its threads start.

    def open(self) -> None:
        """Reads one record in the calling thread.

        TFDS imports its parts when they are first used, under locks of its own: two threads that both read their first
        record can wait for each other for ever.
        """
        self.dataset.stored(0)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        part = self.order.part
        ids = [self.order.record(step * part + offset) for offset in range(part)]
        parsed = self.dataset.stored(*ids)
        batch = {name: np.stack([record[name] for record in parsed]) for name in self.dataset.schema.for_training}
        if self.dataset.empty_text is not None:
            batch[EMPTY_TEXT] = np.repeat(self.dataset.empty_text[None], part, axis=0)
        return batch | {"fps": batch["fps"].astype(np.float32), "clip_id": np.array(ids, np.int32)}


def _as_bfloat16(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return batch | {name: batch[name].view(ml_dtypes.bfloat16) for name in BFLOAT16 & batch.keys()}
