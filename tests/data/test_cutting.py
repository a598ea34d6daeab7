"""Clips come out the same in one pass and by seeking, in the order of the videos, and no video stops the others."""

import os
import zipfile

import numpy as np
import pytest
import synthetic_video

from osv_jax.data import cutting, video
from osv_jax.data.cutting import Cutting, Location, Task
from osv_jax.preparation.decoding import Decoder

SIZE = {"height": 24, "width": 32}


@pytest.mark.parametrize(
    ("name", "codec", "offsets"),
    [
        ("a.mp4", "libx264", [0.0, 0.4, 0.8, 2.0]),
        ("a.mkv", "libx264", [0.0, 0.1, 0.2, 0.3]),  # overlapping
        ("a.webm", "libvpx", [1.1, 3.3, 3.6, 9.0]),
    ],
)
def test_one_pass_gives_the_clips_that_seeking_gives(tmp_path, name, codec, offsets):
    path = synthetic_video.write_constant(tmp_path / name, 40, 10, codec=codec)
    info, clips = video.probe_and_read(path, offsets, 4, 5.0, **SIZE)
    assert info == video.probe(path)
    fitting = [offset for offset in offsets if offset + 3 / 5 < info.end]
    assert len(clips) == len(fitting) >= 2
    for offset, clip in zip(fitting, clips, strict=True):
        np.testing.assert_array_equal(clip, video.read_clip(path, info.start + offset, 4, 5.0, **SIZE))


def test_one_pass_refuses_what_probing_refuses(tmp_path):
    synthetic_video.write_damaged(tmp_path / "damaged.mp4")
    synthetic_video.write_sound(tmp_path / "sound.mp4")
    for name, reason in (("damaged", "cannot be decoded"), ("sound", "has no video stream")):
        with pytest.raises(video.VideoError, match=reason):
            video.probe_and_read(tmp_path / f"{name}.mp4", [0.0], 2, 5.0, **SIZE)


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_lists_that_name_other_files_are_not_followed(tmp_path, kind):
    """A file that is given as a video must not make ffmpeg open what it names."""
    synthetic_video.write_constant(tmp_path / "secret.ts", 10, 10)
    listing = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\n{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n"
    for name, text in (("a.mp4", listing), ("b.mp4", "ffconcat version 1.0\nfile secret.ts\n")):
        (tmp_path / name).write_text(text)
        file = video.NamedBytes(text.encode(), name) if kind == "bytes" else tmp_path / name
        with pytest.raises(video.VideoError, match=f"{name} cannot be decoded"):
            video.probe(file)


def task(path, key=0, skip=0, **changes):
    cut = Cutting(num_frames=2, fps=10.0, **SIZE, stride=0.2, **changes)
    return Task((0, key), str(path), Location((str(path),)), cut, skip)


def clips_of(results):
    return [(t.key[1], c.number, synthetic_video.numbers(c.frames)) for t, r in results for c in r.clips]


def test_videos_with_many_clips_keep_the_order(tmp_path):
    long = synthetic_video.write_constant(tmp_path / "long.mp4", 21, 10)
    short = synthetic_video.write_constant(tmp_path / "short.mp4", 4, 10)
    with Decoder(2) as decoder:
        results = list(decoder.cuts([task(long, 0), task(short, 1), task(long, 2, max_clips=5)]))
        expected = [(0, i, [2 * i, 2 * i + 1]) for i in range(10)]
        expected += [(1, i, [2 * i, 2 * i + 1]) for i in range(2)]
        expected += [(2, i, [2 * i, 2 * i + 1]) for i in range(5)]
        assert clips_of(results) == expected
        # Stretches that are not needed are not decoded; the first clips come along with the check of the whole.
        skipped = clips_of(decoder.cuts([task(long, 0, skip=9)]))
        assert [number for _, number, _ in skipped] == [0, 1, 2, 3, 8, 9]


def test_static_clips_are_named(tmp_path):
    path = synthetic_video.write(tmp_path / "a.mp4", [i / 10 for i in range(8)])
    moving = cutting.cut(task(path, min_motion=2.0))
    assert [clip.reason for clip in moving.clips] == [None] * 4
    assert moving.clips[0].motion == pytest.approx(5, abs=1)
    still = cutting.cut(task(path, min_motion=8.0))
    assert still.clips[1].frames is None
    assert still.clips[1].reason.startswith("does not move from 0.20 s on (motion ")


def test_an_archive_that_changes_later_is_told(tmp_path):
    """It was listed with two members, and has one when a worker opens it."""
    data = synthetic_video.write_constant(tmp_path / "a.mp4", 4, 10).read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.mp4", data)
    size = Cutting(num_frames=2, fps=10.0, **SIZE, stride=0.2)
    reasons = [
        cutting.cut(Task((0, 0), "a.zip/b.mp4", Location((str(tmp_path / name),), member), size)).reason
        for name, member in (("a.zip", 0), ("a.zip", 1), ("gone.zip", 0), ("a.mp4", 0))
    ]
    assert [reason and reason[: len("cannot be unpacked (IndexError")] for reason in reasons] == [
        None,
        "cannot be unpacked (IndexError",
        "cannot be unpacked (FileNotFou",
        "cannot be unpacked (BadZipFile",
    ]


def cut_or_die(t):
    """For workers: a video named `crash` ends its process, as a fault in a decoder would."""
    if "crash" in t.name:
        os._exit(139)
    return cutting.cut(t)


def test_a_video_that_kills_its_worker_is_skipped_alone(tmp_path):
    good = synthetic_video.write_constant(tmp_path / "good.mp4", 4, 10)
    with Decoder(1, cut_or_die) as decoder:
        results = [r for _, r in decoder.cuts([task(good, 0), task(tmp_path / "crash.mp4", 1), task(good, 2)])]
    assert [r.reason for r in results] == [None, "crashes the decoder", None]
    assert [r.num_clips for r in results] == [2, 0, 2]
