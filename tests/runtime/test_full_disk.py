"""A full disk, met by every library that writes: one line, and under no name a file that is not whole."""

import numpy as np
import pytest

from osv_jax.convert import exporters, weights
from osv_jax.models.svd_unet import UNetConfig
from osv_jax.models.svd_vae import VAEConfig
from osv_jax.preparation import shards
from osv_jax.runtime import ending, media, metrics, paths

NOISE = np.random.default_rng(0).integers(0, 256, (6, 150, 150, 3), np.uint8)
LARGE = {"x": {"kernel": np.random.default_rng(0).standard_normal((300, 300), np.float32)}}


def write_component(disk):
    with paths.new_folder(disk / "vae") as folder:
        weights.save_component(folder, "vae", VAEConfig(), LARGE, disk)


def write_metrics(disk):
    with paths.new_folder(disk / "run") as folder:
        writer = metrics.MetricsWriter(folder)
        try:
            for step in range(1000):
                writer.write(step, {f"loss/{i}": 1 / 3 for i in range(10)})
        finally:
            writer.close()


WRITERS = {
    "PyAV": lambda disk: media.write_video(disk / "a.mp4", NOISE, 7),
    "Pillow's GIF": lambda disk: media.write_video(disk / "a.gif", NOISE, 7),
    "Pillow's PNG": lambda disk: media.write_pictures(disk, NOISE),
    "ArrayRecord": lambda disk: shards._write_records(disk / "a", [clip.tobytes() for clip in NOISE]),
    "safetensors": lambda disk: exporters.export_unet(UNetConfig(), LARGE, disk / "unet"),
    "Orbax and TensorStore": write_component,
    "tensorboardX": write_metrics,
    "text": lambda disk: paths.write_text(disk / "a", "x" * 2**21),
}


@pytest.mark.parametrize("small_disk", ["100k"], indirect=True)
@pytest.mark.parametrize("library", WRITERS)
def test_one_line_and_nothing_that_is_not_whole(library, small_disk, capfd):
    for name in ("a", "a.mp4", "000.png"):
        (small_disk / name).write_text("before")
    assert ending.exit_status(lambda: WRITERS[library](small_disk)) == 2
    told = capfd.readouterr().err
    assert "no room left" in told or "No space left on device" in told
    assert told.startswith("error: ") and told.count("\n") == 1
    left = {path.name: path.read_text() for path in small_disk.iterdir()}
    assert left == dict.fromkeys(("a", "a.mp4", "000.png"), "before")
