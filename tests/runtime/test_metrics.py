"""What a run writes: complete after a kill, without duplicates after a resume, readable by other tools."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from osv_jax.errors import UserError
from osv_jax.runtime import metrics


def written_steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_on_disk_at_once(tmp_path):
    writer = metrics.MetricsWriter(tmp_path / "new" / "run")
    writer.write(1, {"loss": np.float32(0.5), "d_loss": 2})
    writer.write(2, {"loss": math.nan, "d_loss": math.inf})
    # Read before close: this is what a kill leaves.
    lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
    writer.close()
    assert lines.splitlines() == [
        '{"step": 1, "loss": 0.5, "d_loss": 2.0}',
        '{"step": 2, "loss": null, "d_loss": null}',
    ]


def test_resume_drops_what_will_be_repeated(tmp_path):
    for resumed_at, steps in ((0, range(1, 8)), (5, range(6, 10))):
        writer = metrics.MetricsWriter(tmp_path, step=resumed_at)
        for step in steps:
            writer.write(step, {"loss": float(step + 100 * resumed_at)})
        writer.close()
    rows = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["loss"] for row in rows[4:6]] == [5.0, 506.0]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    writer = metrics.MetricsWriter(tmp_path, step=2)
    writer.write(3, {"loss": 3.0})
    writer.close()
    assert written_steps(tmp_path) == [1, 3]
    path.write_text('{"step": 1\n{"step": 2, "loss": 2.0}\n')
    with pytest.raises(UserError, match="Line 1 of"):
        metrics.read_metrics(path)


def test_tensorboard_holds_scalars_and_pictures(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    image = np.full((8, 9, 3), 77, np.uint8)
    writer.write(4, {"loss": 1.5})
    writer.write_picture("samples", 4, image)
    writer.close()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "pictures" / "samples_0000004.png")), image)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
    assert b"samples" in events.read_bytes()
    assert b"PNG" in events.read_bytes()


def test_other_processes_write_nothing(tmp_path):
    writer = metrics.MetricsWriter(tmp_path / "run", process_index=1)
    writer.write(1, {"loss": 1.0})
    writer.write_picture("samples", 1, np.zeros((4, 4, 3), np.uint8))
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_loss_curves(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    for step in range(1, 60):
        row = {"loss": 1 / step, "d_loss": math.nan if step == 9 else 2.0}
        writer.write(step, row | ({"teacher": 0.1} if step % 10 == 0 else {}))
    writer.close()
    sizes = {}
    for names in (["loss"], ["loss", "d_loss", "teacher"]):
        metrics.loss_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", names)
        with Image.open(tmp_path / "curves.png") as picture:
            sizes[len(names)] = picture.size
            # matplotlib's first colour: the line was drawn.
            assert (np.abs(np.asarray(picture)[..., :3].astype(int) - (31, 119, 180)).max(-1) < 20).sum() > 100
    assert sizes[3][1] == pytest.approx(3 * sizes[1][1], abs=3)
    with pytest.raises(UserError, match="no metric 'fvd'; choose among d_loss, loss, teacher"):
        metrics.loss_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", ["fvd"])
    with pytest.raises(UserError, match="does not exist"):
        metrics.loss_curves(tmp_path / "nothing.jsonl", tmp_path / "curves.png", ["loss"])


@pytest.mark.parametrize(
    ("step", "seconds", "eta"),
    [(0, 0.5, "16m40s"), (1988, 0.5, "6s"), (12, 1.871, "1h02m"), (0, 60.0, "1d09h"), (2000, 1.0, "0s")],
)
def test_progress_line(step, seconds, eta):
    line = metrics.progress_line(step, 2000, seconds, 4, {"loss": np.float32(0.12345), "lr": 5e-6})
    assert line == f"step {step}/2000  loss 0.123  lr 5e-06  {4 / seconds:.3g} clips/s  ETA {eta}"
