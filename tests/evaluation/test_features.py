"""From folders of videos to features, and the files that keep them; the network is a fake."""

import dataclasses
import os

import numpy as np
import pytest
import synthetic_video

from osv_jax.data.folder import list_videos
from osv_jax.errors import UserError
from osv_jax.evaluation import features
from osv_jax.evaluation.features import Features, cached_features, load_features, save_features
from osv_jax.evaluation.fvd import fvd
from osv_jax.evaluation.networks import FeatureNetwork
from osv_jax.evaluation.protocols import PROTOCOLS

NUM_FRAMES = 10
PROTOCOL = PROTOCOLS["stylegan-v"]


class BrightnessNetwork(FeatureNetwork):
    """Features: the mean of the first and of the last frame."""

    name, fingerprint, num_frames, side, batch_size = "i3d", "0123", NUM_FRAMES, 8, 2

    def __init__(self):
        self.batches = []

    def __call__(self, clips):
        self.batches.append(len(clips))
        return clips[:, [0, -1]].mean((2, 3, 4)).astype(np.float32)


def make(folder, network=None, protocol=PROTOCOL, **options):
    return features.make_features(*list_videos(folder), protocol, network or BrightnessNetwork(), 2, **options)


def write(folder, names, **options):
    """Videos of `NUM_FRAMES` frames, the i-th beginning with frame number i."""
    for first, name in enumerate(names):
        times = [i / 10 for i in range(NUM_FRAMES)]
        synthetic_video.write(folder / name, times, first=first, codec="mpeg4", **options)


def test_one_vector_of_each_video_in_their_order(tmp_path):
    write(tmp_path, [f"{i}.mp4" for i in range(5)])
    network, seen = BrightnessNetwork(), []
    made = make(tmp_path, network, on_video=lambda: seen.append(1))
    assert network.batches == [2, 2, 1] and len(seen) == 5
    assert made.sizes == {(24, 32): 5} and made.skipped == []
    np.testing.assert_allclose(made.vectors[:, 0], 20 + 5 * np.arange(5), atol=3)
    np.testing.assert_allclose(made.vectors[:, 1] - made.vectors[:, 0], 5 * (NUM_FRAMES - 1), atol=3)
    assert len(make(tmp_path, wanted=3).vectors) == 3
    assert made.describe() == "5 videos of 24 x 32"


def test_what_cannot_be_used_is_skipped_with_its_reason(tmp_path):
    write(tmp_path, ["a.mp4", "z.mp4"])
    synthetic_video.write_constant(tmp_path / "short.mp4", 9, 10)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "empty.mp4").touch()
    made = make(tmp_path)
    reasons = dict(made.skipped)
    assert len(made.vectors) == 2 and reasons.keys() == {"short.mp4", "broken.mp4", "empty.mp4"}
    assert reasons["short.mp4"] == "has 9 frames, and 10 are wanted" and reasons["empty.mp4"] == "is empty"
    assert made.describe() == "2 videos of 24 x 32, 3 skipped"


def test_where_nothing_is_left_the_first_reason_is_told(tmp_path):
    synthetic_video.write_constant(tmp_path / "short.mp4", 9, 10)
    with pytest.raises(
        UserError, match=r"None of the 1 videos can be used: the first, short.mp4, has 9 frames, and 10"
    ):
        make(tmp_path)


def test_sizes_may_differ_where_the_protocol_allows_it(tmp_path):
    write(tmp_path, ["a.mp4"])
    write(tmp_path, ["b.mp4"], width=48)
    with pytest.raises(
        UserError, match=r"b.mp4 is 24 x 48, and others are 24 x 32, but stylegan-v compares videos of one"
    ):
        make(tmp_path)
    assert make(tmp_path, protocol=PROTOCOLS["cd-fvd"]).describe() == "2 videos of 2 different sizes"


def some_features(**changes):
    made = Features(
        np.arange(6, dtype=np.float32).reshape(3, 2), {(24, 32): 3}, [("a", "is empty")], {"protocol": "osv"}
    )
    return dataclasses.replace(made, **changes)


def test_features_are_kept_and_damaged_ones_are_made_again(tmp_path):
    made = some_features()
    calls = []

    def compute():
        calls.append(1)
        return made

    _, file = cached_features(tmp_path, "key", compute)
    for _ in range(2):
        kept, _ = cached_features(tmp_path, "key", compute)
        np.testing.assert_array_equal(kept.vectors, made.vectors)
        assert dataclasses.replace(kept, vectors=made.vectors) == made
    assert len(calls) == 1
    whole = file.read_bytes()
    middle = len(whole) // 2
    damaged = (b"", whole[:middle], whole[:90] + bytes(20) + whole[110:], b"x" * 100)
    for number, data in enumerate(damaged, 2):
        file.write_bytes(data)
        cached_features(tmp_path, "key", compute)
        assert len(calls) == number and load_features(file)
    save_features(file, some_features(vectors=np.full((3, 2), np.nan, np.float32)))
    cached_features(tmp_path, "key", compute)
    assert len(calls) == 2 + len(damaged)
    assert cached_features(None, "key", compute) == (made, None)


def test_features_that_are_given_must_be_whole(tmp_path):
    file = tmp_path / "a.npz"
    with pytest.raises(UserError, match="does not exist; give a folder"):
        load_features(file)
    np.savez(file, other=np.ones(3))
    with pytest.raises(UserError, match="holds no features of videos, or is damaged"):
        load_features(file)
    save_features(file, some_features(vectors=np.full((3, 2), np.inf, np.float32)))
    with pytest.raises(UserError, match="NaN or infinite"):
        load_features(file)


def test_the_fingerprint_is_of_everything(tmp_path):
    write(tmp_path, ["a.mp4", "b.mp4"])
    settings = features.settings(PROTOCOL, BrightnessNetwork())
    prints = [features.fingerprint(*list_videos(tmp_path), settings)]
    assert features.fingerprint(*list_videos(tmp_path), settings) == prints[0]
    other = BrightnessNetwork()
    other.fingerprint = "4567"
    for changed in (features.settings(PROTOCOLS["osv"], BrightnessNetwork()), features.settings(PROTOCOL, other)):
        prints.append(features.fingerprint(*list_videos(tmp_path), changed))
    os.utime(tmp_path / "a.mp4", (1, 1))
    prints.append(features.fingerprint(*list_videos(tmp_path), settings))
    (tmp_path / "a.mp4").rename(tmp_path / "c.mp4")
    prints.append(features.fingerprint(*list_videos(tmp_path), settings))
    assert len(set(prints)) == 5


def test_features_of_another_protocol_are_not_compared():
    with pytest.raises(UserError, match=r"generated videos: made with protocol cd-fvd, and cannot be compared .* osv"):
        fvd(some_features(), some_features(made_with={"protocol": "cd-fvd"}), PROTOCOLS["osv"])


def test_repetition_counts_in_the_distance():
    """Two generated videos, 2,047 times the first: the mean is where the first is."""
    real = some_features(vectors=np.zeros((3, 2), np.float32))
    fake = some_features(vectors=np.array([[3, 4], [3, 4], [9, 9]], np.float32))
    far = fvd(real, fake, PROTOCOLS["cd-fvd"]).value
    repeated = np.resize(fake.vectors, (2048, 2)).astype(np.float64)
    expected = (repeated.mean(0) ** 2).sum() + repeated.var(0).sum()
    assert far == pytest.approx(expected, rel=1e-9)
