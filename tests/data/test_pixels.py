"""Which clips a folder yields, and that their order depends on the seed and the position only."""

import itertools
import json
import os

import numpy as np
import pytest
import synthetic_video

from osv_jax.data import pixels, video
from osv_jax.errors import UserError

CLIPS = {"num_frames": 4, "fps": 5.0, "height": 24, "width": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four seconds and 2.5 seconds of video: 5 + 3 clips of 0.8 s, the last of which ends with the video."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "deep er").mkdir()
    synthetic_video.write_constant(folder / "b.mp4", 40, 10)
    synthetic_video.write_constant(folder / "deep er" / "ä.MKV", 25, 10)
    return folder


@pytest.fixture(scope="module")
def index(folder):
    return pixels.index_clips(folder, **CLIPS)


def clip_ids(dataset, steps=None):
    return [batch["clip_id"].tolist() for batch in itertools.islice(dataset, steps)]


def test_index_cuts_consecutive_clips(index):
    found = [(clip.path, round(clip.start_seconds, 3)) for clip in index.clips]
    starts = [0.0, 0.8, 1.6, 2.4, 3.2]
    assert found == [("b.mp4", s) for s in starts] + [("deep er/ä.MKV", s) for s in starts[:3]]
    assert synthetic_video.numbers(index.read(4)["video"]) == [32, 34, 36, 38]
    assert synthetic_video.numbers(index.read(7)["video"]) == [16, 18, 20, 22]


def test_clips_are_spread_over_the_videos_and_may_overlap(folder, tmp_path):
    """Two frames of a clip are four of the videos': 9 clips in 40 frames and 5 in 25."""
    every = pixels.spread_clips(folder, 100, **CLIPS, shift=2)
    starts = [synthetic_video.numbers(clip)[0] for clip in every]
    assert starts == [*range(0, 33, 4), *range(0, 17, 4)]
    assert synthetic_video.numbers(every[1]) == [4, 6, 8, 10]
    few = pixels.spread_clips(folder, 3, **CLIPS, shift=2)
    np.testing.assert_array_equal(few, every[[0, 6, 13]])
    # Each frame is brighter than the one before by 10, everywhere.
    assert len(pixels.spread_clips(folder, 3, **CLIPS, shift=2, min_motion=8.0)) == 3
    with pytest.raises(UserError, match="Nothing moves in the 14 clips"):
        pixels.spread_clips(folder, 3, **CLIPS, shift=2, min_motion=12.0)


def test_bad_files_are_skipped_with_the_reason(tmp_path):
    synthetic_video.write_constant(tmp_path / "good.mp4", 12, 10)
    synthetic_video.write_constant(tmp_path / "short.mp4", 6, 10)
    synthetic_video.write_constant(tmp_path / "slow.mp4", 8, 2)
    synthetic_video.write_sound(tmp_path / "sound.mp4")
    synthetic_video.write_damaged(tmp_path / "broken.mp4")
    synthetic_video.write_unknown(tmp_path / "unknown.mp4")
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "linked.mov").symlink_to(tmp_path / "good.mp4")
    (tmp_path / "notes.txt").write_text("not a video")
    index = pixels.index_clips(tmp_path, **CLIPS)
    assert [clip.path for clip in index.clips] == ["good.mp4", "linked.mov"]
    reasons = dict(index.skipped)
    assert list(reasons) == ["broken.mp4", "dangling.mp4", "short.mp4", "slow.mp4", "sound.mp4", "unknown.mp4"]
    assert reasons["sound.mp4"] == "has no video stream"
    assert reasons["short.mp4"] == "is 0.60 s long, and a clip takes 0.80 s"
    assert reasons["slow.mp4"] == "has 2.00 frames a second, and clips have 5"
    assert "No such file" in reasons["dangling.mp4"]
    assert reasons["unknown.mp4"] == "is encoded in a way that ffmpeg does not know"
    assert len(pixels.spread_clips(tmp_path, 10, **CLIPS, shift=2)) == 2 * 2


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        pixels.index_clips(tmp_path / "nowhere", **CLIPS)
    with pytest.raises(UserError, match="holds no videos"):
        pixels.index_clips(tmp_path, **CLIPS)
    for number in range(12):
        (tmp_path / f"{number:02d}.mp4").touch()
    with pytest.raises(UserError, match="is a file"):
        pixels.index_clips(tmp_path / "00.mp4", **CLIPS)
    with pytest.raises(UserError, match="None of the 12 videos") as caught:
        pixels.index_clips(tmp_path, **CLIPS)
    assert str(caught.value).count("cannot be decoded") == 10
    assert "and 2 more" in str(caught.value)


def test_a_second_run_decodes_only_what_changed(tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache" / "videos.json"
    paths = [synthetic_video.write_constant(tmp_path / f"{name}.mp4", 10, 10) for name in "ab"]
    (tmp_path / "bad.mp4").touch()
    first = pixels.index_clips(tmp_path, **CLIPS, cache_file=cache)
    assert "3/3" in capsys.readouterr().err
    probed = []
    real_probe = video.probe
    monkeypatch.setattr(video, "probe", lambda path: probed.append(path.name) or real_probe(path))
    assert pixels.index_clips(tmp_path, **CLIPS, cache_file=cache) == first
    # The cache holds what decoding told, whatever clips are cut from it.
    longer = pixels.index_clips(tmp_path, 5, 5.0, 24, 32, cache_file=cache)
    assert longer.content_hash != first.content_hash
    assert probed == []
    os.utime(paths[1], (1, 1))
    assert pixels.index_clips(tmp_path, **CLIPS, cache_file=cache) == first
    assert probed == ["b.mp4"]
    # A cache cut short by a full disk, or of another kind, is only a cache.
    whole = json.loads(cache.read_text())
    path = next(iter(whole))
    for damaged in (cache.read_text()[:50], "[]", "{}", json.dumps({path: 1}), json.dumps({path: {"stat": [1, 1]}})):
        cache.write_text(damaged)
        assert pixels.index_clips(tmp_path, **CLIPS, cache_file=cache) == first
        assert json.loads(cache.read_text()) == whole


def test_an_interrupted_check_keeps_what_it_has_decoded(tmp_path, monkeypatch):
    for name in "ab":
        synthetic_video.write_constant(tmp_path / f"{name}.mp4", 10, 10)
    real_probe = video.probe

    def interrupted(path):
        if path.name == "b.mp4":
            raise KeyboardInterrupt
        return real_probe(path)

    monkeypatch.setattr(video, "probe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pixels.index_clips(tmp_path, **CLIPS, cache_file=tmp_path / "cache.json")
    assert [os.path.basename(path) for path in json.loads((tmp_path / "cache.json").read_text())] == ["a.mp4"]


def test_batches_hold_what_they_say(index):
    (batch,) = itertools.islice(pixels.pixel_dataset(index, 3, seed=0), 1)
    assert batch["video"].shape == (3, 4, 24, 32, 3)
    assert batch["video"].dtype == np.uint8
    assert batch["fps"].dtype == np.float32
    assert batch["fps"].tolist() == [5.0] * 3
    assert batch["clip_id"].dtype == np.int32
    for row, clip_id in enumerate(batch["clip_id"]):
        np.testing.assert_array_equal(batch["video"][row], index.read(int(clip_id))["video"])


def test_every_epoch_is_a_new_permutation(index):
    ids = np.concatenate(clip_ids(pixels.pixel_dataset(index, 3, seed=5), 8))
    epochs = ids.reshape(3, 8).tolist()
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(8))


def test_order_depends_on_the_seed_and_not_on_threads(index):
    expected = clip_ids(pixels.pixel_dataset(index, 3, seed=1, num_threads=1), 6)
    assert clip_ids(pixels.pixel_dataset(index, 3, seed=1, num_threads=5), 6) == expected
    assert clip_ids(pixels.pixel_dataset(index, 3, seed=2), 6) != expected


def test_a_batch_larger_than_the_folder_crosses_epochs(index):
    small = clip_ids(pixels.pixel_dataset(index, 2, seed=4), 12)
    large = clip_ids(pixels.pixel_dataset(index, 12, seed=4), 2)
    np.testing.assert_array_equal(np.concatenate(large), np.concatenate(small))


def test_processes_share_each_step(index):
    whole = clip_ids(pixels.pixel_dataset(index, 4, seed=3, start_step=1), 5)
    parts = [
        clip_ids(pixels.pixel_dataset(index, 4, seed=3, start_step=1, process_index=p, process_count=2), 5)
        for p in range(2)
    ]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole


def test_resuming_gives_the_remaining_records(index):
    whole = clip_ids(pixels.pixel_dataset(index, 3, seed=7), 5)
    state = json.loads(json.dumps(pixels.save_position(index, 3, seed=7, step=2)))
    step = pixels.restore_step(state, index, 3, seed=7)
    assert clip_ids(pixels.pixel_dataset(index, 3, seed=7, start_step=step), 3) == whole[2:]


def test_resuming_refuses_what_would_give_other_records(index, folder, tmp_path):
    state = pixels.save_position(index, 3, seed=7, step=2)
    with pytest.raises(UserError, match="data seed 7, not 8"):
        pixels.restore_step(state, index, 3, seed=8)
    with pytest.raises(UserError, match="record 6, which is not a whole number of batches of 4"):
        pixels.restore_step(state, index, 4, seed=7)
    # The same videos elsewhere are the same; with one more file they are not.
    (tmp_path / "deep er").mkdir()
    for path in ("b.mp4", "deep er/ä.MKV"):
        (tmp_path / path).write_bytes((folder / path).read_bytes())
    assert pixels.restore_step(state, pixels.index_clips(tmp_path, **CLIPS), 3, seed=7) == 2
    (tmp_path / "c.mp4").write_bytes((folder / "b.mp4").read_bytes())
    with pytest.raises(UserError, match="restore them, or start a new run"):
        pixels.restore_step(state, pixels.index_clips(tmp_path, **CLIPS), 3, seed=7)


def test_impossible_batches(index):
    with pytest.raises(UserError, match="5 clips does not split over 2"):
        pixels.pixel_dataset(index, 5, seed=0, process_count=2)


def test_a_file_that_breaks_later_is_named(tmp_path):
    path = synthetic_video.write_constant(tmp_path / "later.mp4", 40, 10)
    index = pixels.index_clips(tmp_path, **CLIPS)
    path.write_bytes(b"")
    with pytest.raises(video.VideoError, match=r"later\.mp4"):
        next(iter(pixels.pixel_dataset(index, 2, seed=0)))
