"""Results on disk: whole or not there, bounded, and nothing else is ever served."""

import pytest

from osv_jax.web import render
from osv_jax.web.results import Results

ABOUT = {"image": "<b>.png", "seed": 3, "fps": 7, "motion_bucket_id": 127, "height": 8, "width": 8}
VIDEO = {"name": "student", "sampler": "tts", "steps": 1, "evaluations": 2, "seconds": {"UNet": 1.0}}


def add(results, monkeypatch, second=0):
    monkeypatch.setattr("time.strftime", lambda *_: f"20260101-0000{second:02d}")

    def write(folder):
        for name in ("image.png", "student.mp4", "student.gif"):
            (folder / name).write_text(name)

    return results.add(ABOUT | {"videos": [VIDEO]}, write)


def test_results_survive_a_restart_and_the_newest_are_kept(tmp_path, monkeypatch):
    results = Results(tmp_path, keep=2)
    made = [add(results, monkeypatch, second) for second in range(3)]
    (tmp_path / "mine.txt").write_text("")
    (tmp_path / ".20260101-000000-00000000.partial").mkdir()
    again = Results(tmp_path, keep=2)
    assert [result.identifier for result in again.newest()] == [made[2].identifier, made[1].identifier]
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", made[1].identifier, made[2].identifier}
    assert again.get(made[2].identifier) == made[2] and again.get(made[0].identifier) is None


def test_what_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "image.png").write_text("")
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        Results(tmp_path, keep=2).add({}, fail)
    assert list(tmp_path.iterdir()) == []


def test_only_pictures_and_videos_of_results_are_served(tmp_path, monkeypatch):
    results = Results(tmp_path, keep=2)
    name = add(results, monkeypatch).identifier
    (tmp_path / "secret").write_text("")
    assert results.file(name, "student.mp4").read_text() == "student.mp4"
    (tmp_path / name / "teacher.mp4").symlink_to(tmp_path / "secret")
    for other in ("teacher.mp4", "teacher.gif", "result.json", "../secret", "", "..", "student.mp4\n"):
        assert results.file(name, other) is None
    assert results.file("..", "secret") is None and results.get("../" + name) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"videos": 3}'])
def test_damaged_results_are_left_out(damage, tmp_path, monkeypatch):
    results = Results(tmp_path, keep=2)
    (tmp_path / add(results, monkeypatch).identifier / "result.json").write_text(damage)
    assert results.newest() == []


def test_texts_of_others_are_escaped(tmp_path, monkeypatch):
    result = add(Results(tmp_path, keep=2), monkeypatch)
    shown = render.player(result)
    assert "&lt;b&gt;.png" in shown and "<b>.png" not in shown and "seed 3," in shown
    assert f"results/{result.identifier}/student.mp4" in shown
    assert result.identifier in render.gallery([result]) and render.gallery([]) == ""
    assert "&lt;i&gt;" in render.message("<i>") and "width:50%" in render.progress("UNet", 0.5)
