"""How fast a prepared dataset is read: clips a second, in the order that training takes them.

    python benchmarks/dataset_reading.py                       # 14 x 40 x 72 latents, batch 8, threads
    python benchmarks/dataset_reading.py --num_workers=1       # a reading process instead

Records are random latents, which compress no better than real ones. The files are fresh in the page cache.
What is wanted: ten times the 32 clips a second that a step of 0.25 s with 8 clips a host takes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import pathlib
import tempfile
import time

import numpy as np

from osv_jax.data import latents
from osv_jax.data.cutting import Location
from osv_jax.data.schemas import Schema
from osv_jax.preparation import shards
from osv_jax.preparation.sources import SourceVideo
from osv_jax.runtime.ranges import COUNT, WHOLE

WANTED = 10 * 8 / 0.25


def write_dataset(folder: pathlib.Path, schema: Schema, num_records: int, files: int) -> latents.LatentDataset:
    """A dataset of random records."""
    features, rng = schema.features(), np.random.default_rng(0)
    size = (schema.latent_height, schema.latent_width, schema.latent_channels)
    video = SourceVideo("random", Location(("random",)), 1)
    shards.check_plan(folder, {"shard": "0/1"})
    for index in range(files):
        records = []
        for _ in range(num_records // files):
            record = {
                "latents": rng.standard_normal((schema.num_frames, *size), np.float32),
                "image_embedding": rng.standard_normal(schema.embedding_size, np.float32),
                "image_latents": rng.standard_normal((schema.num_augmented, *size), np.float32),
                "noise_aug_strength": rng.random(schema.num_augmented, np.float32),
                "caption": "A caption.",
                "source": "random",
                "fps": 7.0,
                "clip_start": 0.0,
                "motion": 1.0,
            }
            records.append(latents.serialize(features, record))
        progress = shards.Progress(1, 1, 0, complete=True)
        shards.commit_batch(folder, shards.Chunk(index, "train", (video,)), progress, records, [], [])
    shards.publish(folder, range(files), schema, {})
    return latents.open_dataset(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=COUNT, default=40, help="of latents")
    parser.add_argument("--width", type=COUNT, default=72, help="of latents")
    parser.add_argument("--num_records", type=COUNT, default=1024)
    parser.add_argument("--batch_size", type=COUNT, default=8)
    parser.add_argument("--num_workers", type=WHOLE, default=0)
    parser.add_argument("--num_steps", type=COUNT, default=256)
    parser.add_argument("--repeats", type=COUNT, default=3)
    arguments = parser.parse_args()

    schema = Schema(14, arguments.height, arguments.width, 4, 1024, 4)
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(pathlib.Path(folder), schema, arguments.num_records, files=4)
        size = sum(os.path.getsize(file) for file, _ in dataset.files)
        print(f"{len(dataset)} records of {schema}, {size / len(dataset) / 1e3:.0f} kB each on disk")
        for repeat in range(arguments.repeats):
            batches = latents.latent_batches(
                dataset, arguments.batch_size, seed=repeat, num_workers=arguments.num_workers
            )
            with contextlib.closing(iter(batches)) as iterator:
                # Without the start of threads or processes.
                next(iterator)
                start = time.perf_counter()
                count = sum(len(batch["fps"]) for batch in itertools.islice(iterator, arguments.num_steps))
                rate = count / (time.perf_counter() - start)
            load = os.getloadavg()[0]
            print(f"{rate:.0f} clips/s, {rate / WANTED:.1f} times what is wanted ({WANTED:.0f}); load {load:.1f}")


if __name__ == "__main__":
    main()
