"""Grids show the exact pixels with their labels; videos survive the round trip through a file."""

import errno
import pathlib

import av
import numpy as np
import pytest
from PIL import Image

from osv_jax.data import video
from osv_jax.errors import UserError
from osv_jax.runtime import media


@pytest.fixture(scope="module")
def clip():
    """14 smooth moving frames of an odd size."""
    rows, columns = np.mgrid[:25, :33] / 33
    waves = [
        np.stack([np.sin(6 * columns + i / 3), np.cos(5 * rows), np.sin(4 * rows + columns)], -1) for i in range(14)
    ]
    return (127 + 100 * np.stack(waves)).astype(np.uint8)


def test_grid_holds_the_chosen_frames_enlarged(clip):
    grid = media.sample_grid({"student": clip})
    height, width = 25 * 3, 33 * 3
    assert grid.shape == (2 * 18 + height + 4, 7 * (width + 4) + 4, 3)
    for column, number in enumerate((0, 2, 4, 6, 9, 11, 13)):
        left = 4 + column * (width + 4)
        np.testing.assert_array_equal(grid[36 : 36 + height : 3, left : left + width : 3], clip[number])
        np.testing.assert_array_equal(grid[36 + 2 : 36 + height : 3, left + 2 : left + width : 3], clip[number])
        # The frame's number is written above it.
        assert (grid[18:36, left : left + 20] < 200).any()


def test_grid_labels_every_row(clip):
    grid = media.sample_grid({"input": clip[0], "teacher, 25 steps": clip[:3], "student, 1 step": clip[3:6]})
    image_row, video_row = 18 + 75 + 4, 36 + 75 + 4
    assert grid.shape == (image_row + 2 * video_row, 3 * 103 + 4, 3)
    tops = [0, image_row, image_row + video_row]
    inked = [(grid[top : top + 18] < 128).any((0, 2)).sum() for top in tops]
    assert inked[1] > inked[0] > 10
    np.testing.assert_array_equal(grid[18 : 18 + 75 : 3, 4 : 4 + 99 : 3], clip[0])


def test_grid_of_large_frames_and_long_labels():
    frames = np.zeros((2, 10, 100, 3), np.uint8)
    grid = media.sample_grid({"x" * 100: frames, "": frames}, max_frames=1)
    assert grid.shape[0] == 2 * (36 + 10 + 4)
    # The label is not cut off: white margin after its last letter.
    assert grid.shape[1] > 500
    assert (grid[:18, -4:] == 255).all()


def test_clips_beside_each_other_keep_their_pixels(clip):
    """Two clips in two columns, enlarged five times; the second column's are darker."""
    film = media.beside_each_other({"one": np.stack([clip, clip]), "a label of two lines": np.stack([clip // 2] * 2)})
    assert film.shape[0] == 14
    height, width, top = 5 * 25 + 4, 5 * 33 + 4, 18 + 4
    assert film.shape[1:] == (top + 2 * height, 2 * width + 4, 3)
    for column, expected in enumerate((clip, clip // 2)):
        for row in range(2):
            left, upper = 4 + column * width, top + row * height
            shown = film[:, upper : upper + 125 : 5, left : left + 165 : 5]
            np.testing.assert_array_equal(shown, expected)
    assert (film[0, :top, :width] < 128).any()  # letters


def test_mp4_round_trip(tmp_path, clip):
    media.write_video(tmp_path / "clip.mp4", clip, 7)
    info = video.probe(tmp_path / "clip.mp4")
    assert (info.num_frames, info.height, info.width) == (14, 26, 34)
    assert info.end == pytest.approx(2.0)
    read = video.read_clip(tmp_path / "clip.mp4", 0.0, 14, 7.0, 26, 34)[:, :25, :33]
    # Lossy, but no frame is another, and colours are those that were written.
    error = np.abs(read[:, None].astype(float) - clip[None]).mean((2, 3, 4))
    assert error.argmin(1).tolist() == list(range(14))
    assert error.diagonal().max() < 5  # a quarter of the colour samples, on tiny waves
    assert np.abs(read.mean((0, 1, 2)) - clip.mean((0, 1, 2))).max() < 1.5


def test_gif_round_trip(tmp_path, clip):
    media.write_video(tmp_path / "clip.GIF", clip, 7)
    milliseconds = 0
    with Image.open(tmp_path / "clip.GIF") as gif:
        assert gif.n_frames == 14
        assert gif.size == (33, 25)
        for number in range(14):
            gif.seek(number)
            milliseconds += gif.info["duration"]
            assert np.abs(np.asarray(gif.convert("RGB"), float) - clip[number]).mean() < 8
    assert milliseconds == 2000


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif"])
@pytest.mark.parametrize("fps", [0.1, 23.976, 50.0, 240.0])
def test_every_allowed_rate_can_be_written(tmp_path, clip, name, fps):
    if name == "clip.gif" and fps > 50:
        with pytest.raises(UserError, match=r"fps=240 is too fast for .*: a GIF has at most 50"):
            media.write_video(tmp_path / name, clip, fps)
        return
    media.write_video(tmp_path / name, clip[:3], fps)
    with av.open(str(tmp_path / name)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 3
        # A GIF's times are whole hundredths of a second.
        assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=0.001 if "mp4" in name else 0.1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_there_is_no_pixel_for_what_is_not_finite(value):
    frames = np.zeros((2, 4, 4, 3), np.float32)
    frames[1, 2, 3, 0] = value
    with pytest.raises(UserError, match="values that are NaN or infinite"):
        media.to_uint8(frames)
    frames[1, 2, 3, 0] = 3e38
    assert media.to_uint8(frames)[1, 2, 3, 0] == 255


@pytest.mark.parametrize("name", ["12:30.mp4", "pipe:1.mp4", "pipe:/a.mp4", "a%03d.mp4", "concat:a|b.gif"])
def test_names_are_files_whatever_ffmpeg_makes_of_them(name, tmp_path, clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    media.write_video(name, clip[:2], 7)
    assert [path.as_posix() for path in (tmp_path / name).parent.iterdir()] == [str(tmp_path / name)]
    with av.open(str(tmp_path / name)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 2


def test_a_shorter_clip_replaces_a_longer_one(tmp_path, clip):
    media.write_pictures(tmp_path, clip)
    (tmp_path / "cat.png").touch()
    (tmp_path / "020.png").touch()  # Not of the clip, as there is no 014.png.
    media.write_pictures(tmp_path, clip[:3] // 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000.png", "001.png", "002.png", "020.png", "cat.png"]
    with Image.open(tmp_path / "002.png") as picture:
        np.testing.assert_array_equal(picture, clip[2] // 2)


@pytest.mark.parametrize(
    "failing",
    [lambda folder, clip: media.write_pictures(folder, clip)]
    + [lambda folder, clip, name=name: media.write_video(folder / name, clip, 7) for name in ("a.mp4", "a.gif")],
)
def test_what_cannot_be_written_whole_leaves_what_was_there(failing, tmp_path, clip, monkeypatch):
    (tmp_path / "000.png").write_text("before")
    (tmp_path / "a.mp4").write_text("before")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        failing(tmp_path, clip[:2])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"000.png": "before", "a.mp4": "before"}


def test_other_endings_are_refused(tmp_path, clip):
    with pytest.raises(UserError, match=r"not as 'clip\.avi'"):
        media.write_video(tmp_path / "clip.avi", clip, 7)
