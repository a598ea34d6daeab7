"""Frames are chosen by time, in every container, and shown upright, uncropped where possible, and unstretched."""

import contextlib
import itertools
from unittest import mock

import av
import numpy as np
import pytest
import synthetic_video

from osv_jax.data import video
from osv_jax.data.image import read_image

SIZE = {"height": 24, "width": 32}


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.avi", "mjpeg"), ("a.webm", "libvpx")],
)
def test_frames_are_chosen_by_time_in_every_container(tmp_path, name, codec):
    options = {"pix_fmt": "yuvj420p"} if codec == "mjpeg" else {}
    path = synthetic_video.write_constant(tmp_path / name, 45, 30, codec=codec, **options)
    for start in (0, 7 / 30, 0.5, 0.7):
        clip = video.read_clip(path, start, 5, 7.0, **SIZE)
        assert clip.shape == (5, 24, 32, 3)
        assert clip.dtype == np.uint8
        assert synthetic_video.numbers(clip) == [int((start + i / 7) * 30 + 1e-3) for i in range(5)]
    # At the video's own rate every frame comes once, however the container rounds its timestamps.
    assert synthetic_video.numbers(video.read_clip(path, 0.0, 45, 30.0, **SIZE)) == list(range(45))


def test_variable_frame_rate(tmp_path):
    times = [0.0, 0.1, 0.15, 0.5, 0.52, 1.0, 1.01, 1.9]
    path = synthetic_video.write(tmp_path / "variable.mp4", times)
    clip = video.read_clip(path, 0.0, 10, 5.0, **SIZE)
    assert synthetic_video.numbers(clip) == [0, 2, 2, 4, 4, 5, 6, 6, 6, 6]
    assert synthetic_video.numbers(video.read_clip(path, 0.3, 3, 5.0, **SIZE)) == [2, 3, 4]
    info = video.probe(path)
    assert (info.start, info.num_frames) == (0.0, 8)
    assert info.end > 1.9


def test_seconds_count_from_the_first_timestamp(tmp_path):
    path = synthetic_video.write(tmp_path / "late.mkv", [5 + i / 10 for i in range(20)])
    info = video.probe(path)
    assert (info.start, info.end) == pytest.approx((0.0, 2.0), abs=0.11)
    assert synthetic_video.numbers(video.read_clip(path, 0.0, 4, 5.0, **SIZE)) == [0, 2, 4, 6]
    assert synthetic_video.numbers(video.read_clip(path, 1.0, 4, 5.0, **SIZE)) == [10, 12, 14, 16]


@pytest.mark.parametrize(("rotation", "corner"), [(-90, (0, 1)), (90, (1, 0)), (180, (1, 1))])
def test_rotation_metadata_is_honoured(tmp_path, rotation, corner):
    path = synthetic_video.write_constant(tmp_path / "phone.mp4", 3, 10, rotation=rotation, red_corner=True)
    info = video.probe(path)
    upright = (24, 32) if rotation == 180 else (32, 24)
    assert (info.height, info.width) == upright
    (picture,) = video.read_clip(path, 0.0, 1, 10.0, *upright)
    quarters = picture.reshape(2, upright[0] // 2, 2, upright[1] // 2, 3).mean((1, 3))
    redness = quarters[..., 0] - quarters[..., 1]
    assert np.unravel_index(redness.argmax(), (2, 2)) == corner
    assert redness.max() > 200


@pytest.mark.parametrize(
    ("pix_fmt", "width", "height"), [("yuv420p10le", 32, 24), ("yuv444p", 33, 23), ("yuv422p10le", 34, 22)]
)
def test_ten_bits_and_odd_sizes(tmp_path, pix_fmt, width, height):
    path = synthetic_video.write_constant(tmp_path / "a.mkv", 12, 10, pix_fmt=pix_fmt, width=width, height=height)
    info = video.probe(path)
    assert (info.height, info.width, info.num_frames) == (height, width, 12)
    assert synthetic_video.numbers(video.read_clip(path, 0.2, 3, 5.0, height=23, width=31)) == [2, 4, 6]


def test_cover_scales_then_crops_at_the_centre():
    columns = np.tile(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (60, 1, 3))
    # Half size, then 15 of the 60 columns left over at each side.
    crop = video.cover(columns, 30, 30)
    np.testing.assert_allclose(crop[3, 2:-2, 0], columns[0, 30:90:2, 0][2:-2] + 1, atol=1)
    # Pixels twice as wide as high: the same array shows a picture of 240 x 60.
    wide = video.cover(columns, 30, 120, pixel_aspect=2.0)
    np.testing.assert_allclose(wide[3, 2:-2, 0], columns[0, 2:-2, 0], atol=1)


def test_cover_is_antialiased(rng):
    noise = rng.integers(0, 256, (160, 160, 3)).astype(np.uint8)
    # Averaging 64 pixels leaves about 1/8 of their spread; picking one would leave all of it.
    assert video.cover(noise, 20, 20).std() < 0.25 * noise.std()


@pytest.mark.parametrize("rotation", [None, -90])
def test_pixel_aspect_ratio_of_the_file(tmp_path, rotation):
    path = tmp_path / "anamorphic.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        stream.codec_context.sample_aspect_ratio = 2
        if rotation:
            stream.set_display_rotation(rotation)
        picture = np.zeros((24, 32, 3), np.uint8)
        picture[4:-4, 2:16] = 240
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    height, width = (64, 24) if rotation else (24, 64)
    info = video.probe(path)
    assert (info.height, info.width) == (height, width)
    (shown,) = video.read_clip(path, 0.0, 1, 10.0, height, width)
    # Twice as long as stored, and nothing cropped: a frame of black around the white half.
    expected = np.zeros((24, 64), np.uint8)
    expected[4:-4, 4:32] = 240
    expected = np.rot90(expected, -1) if rotation else expected
    assert np.abs(shown.mean(-1) - expected).mean() < 10


def test_a_clip_beyond_the_end_is_refused(tmp_path):
    path = synthetic_video.write_constant(tmp_path / "a.mp4", 20, 10)
    assert synthetic_video.numbers(video.read_clip(path, 1.5, 5, 10.0, **SIZE)) == [15, 16, 17, 18, 19]
    with pytest.raises(video.VideoError, match=r"a\.mp4 ends before the 0\.60 s from 1\.50 s"):
        video.read_clip(path, 1.5, 6, 10.0, **SIZE)


def test_unreadable_files_say_why(tmp_path):
    whole = synthetic_video.write_constant(tmp_path / "whole.mp4", 20, 10).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("These are words. " * 50)
    synthetic_video.write_sound(tmp_path / "sound.mp4")
    synthetic_video.write_damaged(tmp_path / "damaged.mp4")
    reasons = {
        "half": "cannot be decoded",
        "empty": "cannot be decoded",
        "text": "cannot be decoded",
        "missing": "cannot be decoded .No such file",
        "sound": "has no video stream",
        "damaged": "cannot be decoded",
    }
    for name, reason in reasons.items():
        with pytest.raises(video.VideoError, match=rf"{name}\.mp4 ({reason}).*; replace it"):
            video.probe(tmp_path / f"{name}.mp4")


def test_pictures_that_ffmpeg_patches_up_are_refused(tmp_path):
    path = tmp_path / "smeared.mp4"
    reasons = ""
    for where in np.linspace(0.2, 0.8, 12):
        synthetic_video.write_damaged(path, where, num_bytes=8, codec="mpeg4")
        try:
            video.probe(path)
        except video.VideoError as error:
            reasons += error.reason + "\n"
    # Damage either breaks the file or is concealed, and then the frame is only marked.
    assert "has a damaged frame at" in reasons


def test_a_truncated_stream_ends_where_its_data_end(tmp_path):
    whole = synthetic_video.write_constant(tmp_path / "whole.mkv", 40, 10).read_bytes()
    (tmp_path / "part.mkv").write_bytes(whole[: len(whole) * 3 // 4])
    info = video.probe(tmp_path / "part.mkv")
    assert 5 < info.num_frames < 35
    assert info.end == pytest.approx(info.num_frames / 10, abs=0.11)


def test_names_with_spaces_and_other_scripts(tmp_path):
    path = synthetic_video.write_constant(tmp_path / "été à l'eau 日本 %d #1.mp4", 10, 10)
    assert video.probe(path).num_frames == 10


def test_a_codec_that_ffmpeg_does_not_know(tmp_path):
    path = synthetic_video.write_unknown(tmp_path / "unknown.mp4")
    with pytest.raises(video.VideoError, match="is encoded in a way that ffmpeg does not know; replace it"):
        video.probe(path)


def read_all_ways(path):
    """What each way to read a video makes of it, by name."""
    ways = {
        "probe": lambda: video.probe(path),
        "probe_and_read": lambda: video.probe_and_read(path, [0.0, 0.4], 4, 10.0, **SIZE),
        "read_clip": lambda: video.read_clip(path, 0.4, 4, 10.0, **SIZE),
    }
    results = {}
    for name, read in ways.items():
        try:
            results[name] = read()
        except video.VideoError as error:
            results[name] = error.reason
    return results


def reasons_of(path):
    """Why a video cannot be read, in whatever way."""
    results = read_all_ways(path).values()
    assert all(isinstance(result, str) for result in results), results
    return set(results)


def fail(*_, **__):
    raise IndexError("of a damaged table")


def failing_container(container, where):
    """An open file of which `streams.best`, or `decode` after five frames, fails as PyAV does on some damage."""

    def decode(stream):
        yield from itertools.islice(container.decode(stream), 5)
        fail()

    double = mock.MagicMock(spec=container, seek=container.seek)
    double.__enter__.return_value = double
    double.__exit__.side_effect = lambda *_: container.close()
    double.decode = decode if where == "decode" else container.decode
    double.streams = mock.Mock(best=fail) if where == "best" else container.streams
    return double


@pytest.mark.parametrize("where", ["open", "best", "decode", "reformat"])
def test_whatever_pyav_raises_is_one_sentence(tmp_path, monkeypatch, where):
    path = synthetic_video.write_constant(tmp_path / "a.mp4", 12, 10)
    real_open = av.open
    if where == "reformat":
        monkeypatch.setattr(video, "VideoReformatter", lambda: mock.Mock(reformat=fail))
    elif where == "open":
        monkeypatch.setattr(av, "open", fail)
    else:
        monkeypatch.setattr(av, "open", lambda *args, **options: failing_container(real_open(*args, **options), where))
    results = read_all_ways(path)
    if where == "reformat":  # which checking a video does without
        assert results.pop("probe").num_frames == 12
    assert set(results.values()) == {"cannot be decoded (IndexError: of a damaged table)"}


def test_our_own_mistakes_are_not_taken_for_damage(tmp_path, monkeypatch):
    path = synthetic_video.write_constant(tmp_path / "a.mp4", 12, 10)
    monkeypatch.setattr(video, "cover", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        video.read_clip(path, 0.4, 4, 10.0, **SIZE)


def test_damage_to_the_last_frame_is_found(tmp_path):
    """As in reading, so in checking: or else a run would end at a clip that its index calls good."""
    path = synthetic_video.write_constant(tmp_path / "a.avi", 12, 10, codec="mpeg4")
    with av.open(str(path)) as container:
        last = [packet for packet in container.demux(video=0) if packet.size][-1]
        begin, size = last.pos + 8, last.size
    data = bytearray(path.read_bytes())
    data[begin : begin + size] = b"\xff" * size
    path.write_bytes(data)
    results = read_all_ways(path)
    assert results["probe"] == results["probe_and_read"]
    assert results["probe"].startswith("cannot be decoded")


def test_frames_may_change_their_size(tmp_path):
    path = synthetic_video.write_growing(tmp_path / "a.ts")
    results = read_all_ways(path)
    info, clips = results["probe_and_read"]
    assert info == results["probe"] and (info.num_frames, info.width, info.height) == (12, 512, 384)
    np.testing.assert_array_equal(clips[1], results["read_clip"])
    # Each frame is brighter than the one before by 5; this codec is not exact.
    np.testing.assert_allclose(results["read_clip"].mean((1, 2, 3)), [40, 45, 50, 55], atol=4)


def test_frames_of_too_many_pixels_are_not_decoded(tmp_path, monkeypatch):
    paths = [synthetic_video.write_constant(tmp_path / f"a.{end}", 12, 10, codec="mpeg4") for end in ("mp4", "avi")]
    grows = synthetic_video.write_growing(tmp_path / "grows.ts")
    monkeypatch.setattr(video, "_MAX_PIXELS", 512 * 384 - 1)
    for path in paths:
        assert video.probe(path).num_frames == 12
    # Some of its frames fit; ffmpeg finds words of its own for the others, and does not begin with them.
    (reason,) = reasons_of(grows)
    assert reason.startswith("cannot be decoded (")
    monkeypatch.setattr(video, "_MAX_PIXELS", 32 * 24 - 1)
    for path in paths:
        assert reasons_of(path) == {"has frames of unknown size, or of more than 767 pixels"}


def test_pixels_of_an_impossible_shape(tmp_path):
    path = synthetic_video.write_constant(tmp_path / "a.mkv", 12, 10, pixel_aspect=20)
    assert reasons_of(path) == {"has pixels that are 20 times as wide as high"}


@pytest.mark.parametrize(("limit", "value"), [("_MAX_SIDE", 127), ("_MAX_PIXELS", 128 * 24 - 1)])
def test_frames_that_are_shown_too_large(tmp_path, monkeypatch, limit, value):
    path = synthetic_video.write_constant(tmp_path / "a.mkv", 12, 10, pixel_aspect=4)
    assert video.probe(path).width == 128
    monkeypatch.setattr(video, limit, value)
    (reason,) = reasons_of(path)
    assert reason.startswith("has frames that are shown as 24 x 128, and at most ")


def test_absurd_times_are_told_or_refused(tmp_path):
    """Sixty thousand years between two frames: more seconds than clips could be cut from, and no number overflows."""
    whole = synthetic_video.write_constant(tmp_path / "a.mkv", 12, 10, codec="mpeg4")
    with av.open(str(whole)) as source, av.open(str(tmp_path / "late.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.dts is not None:
                shift = 0 if number < 6 else 2**50
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                target.mux(packet)
    info = video.probe(tmp_path / "late.mkv")
    assert info.num_frames == 12 and info.end > 1e12
    for start in (0.4, 1e13, 1e300):
        with contextlib.suppress(video.VideoError):
            assert video.read_clip(tmp_path / "late.mkv", start, 4, 10.0, **SIZE).shape == (4, 24, 32, 3)


def test_the_first_frames_at_the_size_in_which_they_are_shown(tmp_path):
    file = synthetic_video.write_constant(tmp_path / "a.mp4", 20, 10, rotation=90, pixel_aspect=2)
    frames = video.read_frames(file, 12)
    assert frames.shape == (12, 64, 24, 3)
    assert synthetic_video.numbers(frames) == list(range(12))
    assert synthetic_video.numbers(video.read_frames(file, 4, fps=5)) == [0, 2, 4, 6]
    with pytest.raises(video.VideoError, match="has 20 frames, and 21 are wanted"):
        video.read_frames(file, 21)
    with pytest.raises(video.VideoError, match="has 10 frames at 5 fps, and 11 are wanted"):
        video.read_frames(file, 11, fps=5)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 70_001)])
def test_extreme_shapes_cover_a_video(size):
    image = read_image(np.full((*size, 3), 77, np.uint8))
    np.testing.assert_array_equal(video.cover(image, 64, 96), np.full((64, 96, 3), 77))
