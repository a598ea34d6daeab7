"""What is written is what TFDS and the reader give back; the order of records; no TensorFlow."""

import contextlib
import dataclasses
import itertools
import json
import pickle
import shutil
import subprocess
import sys
import threading
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds

from osv_jax.data import latents, order
from osv_jax.data.cutting import Location
from osv_jax.data.latents import latent_batches
from osv_jax.data.schemas import Schema
from osv_jax.errors import UserError
from osv_jax.preparation import shards
from osv_jax.preparation.sources import SourceVideo

SCHEMA = Schema(3, 2, 5, 4, 8, 2)
NUM_RECORDS, FILES = 13, (6, 7)


def record(number: int) -> dict:
    rng = np.random.default_rng(number)
    return {
        "latents": rng.standard_normal((3, 2, 5, 4), np.float32),
        "image_embedding": rng.standard_normal(8, np.float32),
        "image_latents": rng.standard_normal((2, 2, 5, 4), np.float32),
        "noise_aug_strength": rng.random(2, np.float32),
        "caption": f'a "caption"\n{number} é',
        "source": f"{number}.mp4",
        "fps": 7.0,
        "clip_start": 0.5 * number,
        "motion": 1.25,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files of records, made as preparing makes them."""
    folder = tmp_path_factory.mktemp("dataset")
    features = SCHEMA.features()
    video = SourceVideo("0.mp4", Location(("0.mp4",)), 1)
    ids = iter(range(NUM_RECORDS))
    shards.check_plan(folder, {"shard": "0/1"})
    for index, count in enumerate(FILES):
        records = [latents.serialize(features, record(i)) for i in itertools.islice(ids, count)]
        progress = shards.Progress(1, 1, 0, complete=True)
        shards.commit_batch(folder, shards.Chunk(index, "train", (video,)), progress, records, [1.0] * count, [])
    metadata = {"num_frames": 3, "fps": 7.0, "height": 16, "width": 40}
    shards.publish(folder, range(len(FILES)), SCHEMA, metadata)
    return folder


@pytest.fixture(scope="module")
def dataset(folder):
    return latents.open_dataset(folder)


def test_records_come_back(dataset):
    assert len(dataset) == NUM_RECORDS and dataset.metadata["fps"] == 7.0
    for number in (0, 5, 6, 12):
        expected, actual = record(number), dataset.read(number)
        assert actual.keys() == expected.keys()
        for name in ("latents", "image_latents"):
            assert actual[name].dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(actual[name], expected[name].astype(ml_dtypes.bfloat16))
        for name in ("image_embedding", "noise_aug_strength"):
            np.testing.assert_array_equal(actual[name], expected[name])
        assert [actual[name] for name in ("caption", "source", "clip_start")] == [
            expected[name] for name in ("caption", "source", "clip_start")
        ]


def test_tfds_opens_it(folder):
    builder = tfds.builder_from_directory(folder)
    assert builder.info.splits["train"].shard_lengths == list(FILES)
    assert builder.info.metadata["height"] == 16
    source = builder.as_data_source("train")
    assert len(source) == NUM_RECORDS
    stored = source[7]["latents"]
    assert stored.dtype == np.uint16
    np.testing.assert_array_equal(stored.view(ml_dtypes.bfloat16), record(7)["latents"].astype(ml_dtypes.bfloat16))
    assert source[12]["caption"].decode() == record(12)["caption"]


def test_no_tensorflow_and_a_quick_start(folder):
    """Neither reading nor writing imports it, and training from videos does not even import TFDS."""
    program = (
        "import sys, osv_jax.train\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "from osv_jax.data import latents\n"
        f"dataset = latents.open_dataset({str(folder)!r})\n"
        "latents.serialize(dataset.schema.features(), dataset.read(0))\n"
        "next(iter(latents.latent_batches(dataset, 2, seed=0)))\n"
        "assert 'tensorflow_datasets' in sys.modules\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


def ids(dataset, steps=None, **options):
    with contextlib.closing(iter(latent_batches(dataset, **options))) as batches:
        return [batch["clip_id"].tolist() for batch in itertools.islice(batches, steps)]


def test_batches_hold_what_they_say(dataset):
    batch = next(iter(latent_batches(dataset, 4, seed=1)))
    shapes = {name: (value.shape, value.dtype.name) for name, value in batch.items()}
    assert shapes == {
        "latents": ((4, 3, 2, 5, 4), "bfloat16"),
        "image_embedding": ((4, 8), "float32"),
        "image_latents": ((4, 2, 2, 5, 4), "bfloat16"),
        "noise_aug_strength": ((4, 2), "float32"),
        "fps": ((4,), "float32"),
        "clip_id": ((4,), "int32"),
    }
    for row, number in enumerate(batch["clip_id"].tolist()):
        for name in ("latents", "image_embedding", "image_latents", "noise_aug_strength"):
            np.testing.assert_array_equal(batch[name][row], dataset.read(number)[name])


def test_every_epoch_is_a_new_permutation_over_all_files(dataset):
    epochs = np.concatenate(ids(dataset, 3 * NUM_RECORDS // 13, batch_size=13, seed=3)).reshape(3, NUM_RECORDS).tolist()
    assert [sorted(epoch) for epoch in epochs] == [list(range(NUM_RECORDS))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # Global: the first records of an epoch come from both files.
    assert len({number < FILES[0] for number in epochs[0][:6]}) == 2


def test_two_processes_read_what_one_reads(dataset):
    options = {"steps": 2 * NUM_RECORDS // 4, "batch_size": 4, "seed": 7}
    whole = ids(dataset, **options)
    parts = [ids(dataset, **options, process_index=p, process_count=2) for p in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole
    assert ids(dataset, **options | {"seed": 8}) != whole


@pytest.mark.integration
@pytest.mark.timeout(120)
def test_resuming_in_an_epoch_with_other_workers_gives_exactly_the_rest(dataset):
    options = {"batch_size": 2, "seed": 5}

    def read(steps, **more):
        with contextlib.closing(iter(latent_batches(dataset, **options, **more))) as batches:
            return [{name: value.copy() for name, value in b.items()} for b in itertools.islice(batches, steps)]

    whole, stop = read(NUM_RECORDS), 9  # of two epochs, in the second
    state = json.loads(json.dumps(order.save_position(dataset.content_hash, 2, 5, stop)))
    step = order.restore_step(state, dataset.content_hash, "The records", 2, 5)
    joined = read(stop, num_workers=1) + read(NUM_RECORDS - stop, start_step=step, num_workers=2)
    assert len(joined) == len(whole) == NUM_RECORDS
    for own, other in zip(joined, whole, strict=True):
        assert own.keys() == other.keys()
        for name in own:
            assert own[name].dtype == other[name].dtype
            np.testing.assert_array_equal(own[name], other[name])
    # On another number of processes too.
    split = [{"start_step": step, "process_index": p, "process_count": 2} for p in range(2)]
    rest = [ids(dataset, NUM_RECORDS - stop, **options, **part) for part in split]
    assert [a + b for a, b in zip(*rest, strict=True)] == [batch["clip_id"].tolist() for batch in whole[step:]]
    with pytest.raises(UserError, match="The records are not those that the checkpoint was trained on"):
        order.restore_step(state, "other", "The records", 2, 5)


class WatchedSchema(Schema):
    """Equal to no Schema, so that what threads of earlier tests still read ahead is not in its cache."""

    opened_by: ClassVar[list[threading.Thread]] = []

    def features(self):
        self.opened_by.append(threading.current_thread())
        return super().features()


def test_the_first_record_is_read_before_any_thread_starts(dataset):
    """TFDS's imports can lock each other when two threads begin at once."""
    dataset = dataclasses.replace(dataset, schema=WatchedSchema(**vars(dataset.schema)))
    opened_by = WatchedSchema.opened_by
    # What travels to a worker process reads there as it arrives.
    latents._features.cache_clear()
    pickle.loads(pickle.dumps(latents._ReadStep(dataset, order.Order(NUM_RECORDS, 2, 5))))
    assert opened_by == [threading.main_thread()]
    latents._features.cache_clear()
    ids(dataset, NUM_RECORDS // 2, batch_size=2, seed=5)
    assert opened_by == 2 * [threading.main_thread()]


def test_what_is_not_whole_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"is not a dataset; make one with `python -m osv_jax.prepare`"):
        latents.open_dataset(tmp_path)
    with pytest.raises(UserError, match="has no split 'test', only train"):
        latents.open_dataset(folder, "test")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = next(copy.glob("*00001-of-00002"))
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"is incomplete: .*00001-of-00002 is missing or cut short"):
        latents.open_dataset(copy)
    file.write_bytes(data)
    assert len(latents.open_dataset(copy)) == NUM_RECORDS
    (copy / "dataset_info.json").unlink()
    with pytest.raises(UserError, match="is not finished; run the same"):
        latents.open_dataset(copy)
    (copy / "dataset_info.json").write_text("{}")
    (copy / "metadata.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="made by another version"):
        latents.open_dataset(copy)
    (copy / "metadata.json").write_text("{")
    with pytest.raises(UserError, match=r"its metadata\.json cannot be read"):
        latents.open_dataset(copy)
