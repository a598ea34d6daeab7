"""What the fuzz test reads of what programs of ours wrote: datasets, features of videos, workdirs; see `fuzz.py`."""

import functools
import json
import pathlib
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from osv_jax.data import latents
from osv_jax.data.cutting import Location
from osv_jax.data.schemas import Schema
from osv_jax.evaluation.features import Features, check_made_with, load_features, save_features
from osv_jax.evaluation.fvd import fvd
from osv_jax.evaluation.protocols import PROTOCOLS
from osv_jax.inference.trained import load_trained
from osv_jax.preparation import report, shards
from osv_jax.preparation.sources import SourceVideo
from osv_jax.runtime import checkpoint
from osv_jax.runtime.finite import is_finite
from osv_jax.runtime.metrics import MetricsWriter, read_metrics
from osv_jax.runtime.ranges import PIXELS
from osv_jax.training import origins
from osv_jax.training.config import default_config

SCHEMA = Schema(3, 2, 5, 4, 8, 2)
PLAN = {"shard": "0/1", "videos": {"train": 2}, "videos_hash": "abc", "num_frames": 3, "fps": 7.0}
_VIDEO = SourceVideo("0.mp4", Location(("0.mp4",)), 1)
CHUNKS = [shards.Chunk(index, "train", (_VIDEO,)) for index in range(2)]


def _records(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    features = SCHEMA.features()
    return [
        latents.serialize(
            features,
            {
                "latents": rng.standard_normal((3, 2, 5, 4), np.float32),
                "image_embedding": rng.standard_normal(8, np.float32),
                "image_latents": rng.standard_normal((2, 2, 5, 4), np.float32),
                "noise_aug_strength": rng.random(2, np.float32),
                "caption": "a caption",
                "source": "0.mp4",
                "fps": 7.0,
                "clip_start": 0.5 * number,
                "motion": 1.25,
            },
        )
        for number in range(count)
    ]


def _start(folder: pathlib.Path) -> None:
    """Two chunks, the second of two batches, and what was left out."""
    shards.check_plan(folder, PLAN)
    shards.write_source_chunk(folder, [("x.txt", "is no video")])
    records = _records(4)
    for chunk in CHUNKS:
        done = shards.Progress(1, 1, 0)
        shards.commit_batch(folder, chunk, done, records[:2], [1.0, 2.0], [("0.mp4", "ends")])


def _finish(folder: pathlib.Path) -> None:
    for chunk in CHUNKS:
        shards.commit_batch(folder, chunk, shards.Progress(2, 1, 0, complete=True), _records(1), [3.0], [])
    metadata = {"num_frames": 3, "fps": 7.0, "height": 16, "width": 40, "settings": {"networks": "abc"}}
    shards.publish(folder, (shards.SOURCE_CHUNK, 0, 1), SCHEMA, metadata)


def make_datasets(target: pathlib.Path) -> None:
    """One that is finished, and one that was stopped."""
    for name in ("finished", "started"):
        (target / name).mkdir()
        _start(target / name)
    _finish(target / "finished")
    shards.finish_chunk(target / "started", CHUNKS[0])


def use_dataset(source: pathlib.Path, damaged: str) -> Iterator[str]:
    if damaged.startswith("started"):
        folder = source / "started"
        shards.check_plan(folder, PLAN)
        progress = shards.resume(folder, CHUNKS)
        assert set(progress) == {0, 1} and progress[0].complete
        _check_progress(progress[1])
        shards.finish_chunk(folder, CHUNKS[1])
        shards.publish(folder, (shards.SOURCE_CHUNK, 0, 1), SCHEMA, {"num_frames": 3, "fps": 7.0})
        return iter(())
    folder = source / "finished"
    told = report.describe(folder)
    assert told.isprintable() or all(line.isprintable() for line in told.splitlines())
    dataset = latents.open_dataset(folder)
    assert isinstance(dataset.content_hash, str) and dataset.schema == SCHEMA and len(dataset) > 0
    for number in range(len(dataset)):
        record = dataset.read(number)
        assert record["latents"].shape == (3, 2, 5, 4)
        assert all(is_finite(value.astype(np.float32)) for value in record.values() if isinstance(value, np.ndarray))
    shards.merge([folder], source / "merged")
    assert len(latents.open_dataset(source / "merged")) == len(dataset)
    return iter(())


def _check_progress(progress: shards.Progress) -> None:
    numbers = (progress.batches, progress.video, progress.clip)
    assert all(type(number) is int and 0 <= number < 10**6 for number in numbers) and type(progress.complete) is bool


def make_features(target: pathlib.Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((6, 5), np.float32)
    made_with = {"format": 1, "protocol": "stylegan-v", "network": "i3d", "fps": None}
    for name in ("a.npz", "b.npz"):
        save_features(target / name, Features(vectors, {(24, 32): 6}, [("x.mp4", "is empty")], made_with))


def use_features(source: pathlib.Path, damaged: str) -> Iterator[str]:
    features, other = (
        load_features(source / damaged),
        load_features(source / ("b.npz" if damaged == "a.npz" else "a.npz")),
    )
    assert features.vectors.dtype == np.float32 and is_finite(features.vectors)
    assert features.describe().isprintable()
    for name, reason in features.skipped:
        assert isinstance(name, str) and isinstance(reason, str)
    check_made_with(str(source / damaged), features, other.made_with)
    assert np.isfinite(fvd(features, other, PROTOCOLS["stylegan-v"]).value)
    return iter(())


@functools.cache
def _config() -> ConfigDict:
    return default_config("stage1")


def make_workdirs(target: pathlib.Path) -> None:
    """A run with a checkpoint of a student alone."""
    import tensorboardX  # noqa: F401  (takes seconds, which no case is to be blamed for)

    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    params = {"lora": {"x": {"a": draw(4, 2), "b": draw(2, 4)}}, "tuned": {"y": {"kernel": draw(3, 3)}}}
    state = {"step": np.int32(3), "players": {"student": {"params": params, "ema": params}}}
    checkpoint.write_config(target, _config().to_dict())
    with checkpoint.open_checkpoints(target, 2) as checkpoints:
        checkpoint.save(checkpoints, 3, state, {"position": 3, "seed": 0, "index_hash": "abc"})
    rows = [{"step": step, "loss": 1 / step, "seconds_per_step": 0.5} for step in range(1, 6)]
    (target / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def use_workdir(source: pathlib.Path, damaged: str) -> Iterator[str]:
    checkpoint.check_workdir(source, _config().to_dict())
    if damaged == "metrics.jsonl":
        for row in read_metrics(source / damaged):
            assert type(row["step"]) is int
            assert all(value is None or type(value) in (int, float) for value in row.values())
        MetricsWriter(source, 3).close()
        return iter(())
    origins.check_origin(source, _config())
    trained = load_trained(source)
    assert trained.step == 3
    assert all(trained.video[name] in PIXELS for name in ("height", "width"))
    shapes = [leaf.shape for tree in (trained.student.lora, trained.student.tuned) for leaf in _leaves(tree)]
    assert sorted(shapes) == [(2, 4), (3, 3), (4, 2)]
    with checkpoint.open_checkpoints(source, 2) as checkpoints:
        position = checkpoint.restore_data(checkpoints, 3)
    assert isinstance(position, dict)
    return iter(())


def _leaves(tree: object) -> Iterator[np.ndarray]:
    for value in tree.values() if isinstance(tree, dict) else ():
        yield from _leaves(value) if isinstance(value, dict) else [value]
