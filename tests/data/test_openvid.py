"""OpenVid-1M is read as it is published, straight from the archives, and split at random but reproducibly."""

import pytest
import synthetic_video
import tiny_openvid

from osv_jax.data import cutting
from osv_jax.data.cutting import Cutting, Task
from osv_jax.errors import UserError
from osv_jax.preparation import openvid, sources

CUTTING = Cutting(num_frames=4, fps=10.0, height=24, width=32, stride=0.4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openvid")
    tiny_openvid.write_openvid(folder)
    return folder


def cut(video):
    return cutting.cut(Task((0, 0), video.name, video.location, CUTTING))


def test_every_video_with_a_row_is_found_and_cut(folder):
    videos, skipped = openvid.read_openvid(folder, {}, {})
    names = [f"video {i:02d}_é.mp4" for i in range(6)]
    # The archives in the order of their numbers.
    assert [video.name for video in videos] == [
        *(f"OpenVid_part0.zip/{names[0]}", f"OpenVid_part0.zip/videos/{names[1]}"),
        *(f"OpenVid_part2.zip/{names[4]}", f"OpenVid_part2.zip/videos/{names[5]}"),
        *(f"OpenVid_part10.zip/{names[2]}", f"OpenVid_part10.zip/videos/{names[3]}"),
    ]
    assert videos[1].caption == 'Line "1",\nand another.'
    assert skipped == [
        ("OpenVid_part2.zip/norow.mp4", "has no row in the CSV"),
        ("novideo.mp4", "is in the CSV, but in no archive"),
    ]
    for video in videos:  # from stored and compressed members, of whole and split archives
        result = cut(video)
        assert result.reason is None and result.num_clips == 3
        numbers = [synthetic_video.numbers(clip.frames) for clip in result.clips]
        assert numbers == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def sources_in(folder):
    """The videos that are found in a folder, all of which can be cut, and what was left out of it but rows."""
    videos, skipped = openvid.read_openvid(folder, {}, {})
    assert all(cut(video).num_clips == 3 for video in videos)
    return [video.name for video in videos], [entry for entry in skipped if "in no archive" not in entry[1]]


def write_parts(folder, names="OpenVid_part10_part{}"):
    tiny_openvid.write_openvid(folder)
    for path in sorted(folder.glob("OpenVid_part10_part*")):
        path.rename(folder / names.format(path.name[-2:]))
    for name in ("OpenVid_part0.zip", "OpenVid_part2.zip"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("names", "archive"),
    [
        ("OpenVid_part10_part{}", "OpenVid_part10.zip"),
        ("OpenVidHD_part_15_part_{}", "OpenVidHD_part_15.zip"),
        ("OpenVidHD/OpenVidHD_part_15_part_{}", "OpenVidHD/OpenVidHD_part_15.zip"),
    ],
)
def test_parts_are_joined_by_either_name(tmp_path, names, archive):
    (tmp_path / "OpenVidHD").mkdir()
    write_parts(tmp_path, names)
    found, skipped = sources_in(tmp_path)
    assert found == [f"{archive}/video 02_é.mp4", f"{archive}/videos/video 03_é.mp4"]
    assert skipped == []


@pytest.mark.parametrize("whole", [b"", b"PK\3\4 and nothing more", b"<html>Service unavailable</html>"])
def test_a_failed_download_does_not_hide_the_parts_beside_it(tmp_path, whole):
    write_parts(tmp_path)
    name = "OpenVid_part10.zip"
    (tmp_path / name).write_bytes(whole)
    found, skipped = sources_in(tmp_path)
    assert found == [f"{name}/video 02_é.mp4", f"{name}/videos/video 03_é.mp4"]
    reason = "cannot be opened as a zip archive (File is not a zip file); OpenVid_part10_partaa beside it serves"
    assert skipped == [(name, reason)]
    # Where both are good, the parts are not asked for.
    parts = sorted(tmp_path.glob("OpenVid_part10_part*"))
    (tmp_path / name).write_bytes(b"".join(part.read_bytes() for part in parts))
    assert sources_in(tmp_path) == (found, [])
    parts[0].unlink()
    assert sources_in(tmp_path) == (found, [])


@pytest.mark.parametrize(
    ("lost", "reason"), [("aa", "_partaa is missing"), ("ab", "_partab is missing"), ("ac", "zip")]
)
def test_a_part_that_is_missing_is_named(tmp_path, lost, reason):
    write_parts(tmp_path)
    (tmp_path / f"OpenVid_part10_part{lost}").unlink()
    with pytest.raises(UserError, match=f"OpenVid_part10.zip cannot be (opened|joined) .*{reason}"):
        openvid.read_openvid(tmp_path, {}, {})


def test_scores_filter(folder):
    videos, skipped = openvid.read_openvid(folder, {"aesthetic score": 5}, {"aesthetic score": 7})
    assert sorted(video.name[-8:-6] for video in videos) == ["01", "02", "03"]
    reasons = {name[-8:-6]: reason for name, reason in skipped}
    assert reasons["00"] == "has aesthetic score 4, below 5" and reasons["05"] == "has aesthetic score 9, above 7"
    with pytest.raises(UserError, match="loosen the bounds"):
        openvid.read_openvid(folder, {"motion score": 100}, {})


def test_the_split_is_random_disjoint_and_a_function_of_the_seed(folder):
    videos, _ = openvid.read_openvid(folder, {}, {})
    splits = sources.split_videos(videos, 2, None, seed=0)
    assert sources.split_videos(videos, 2, None, seed=0) == splits
    assert [len(splits[name]) for name in ("train", "test")] == [4, 2]
    assert not {video.name for video in splits["train"]} & {video.name for video in splits["test"]}
    # The order of the archives is kept.
    assert [video for video in videos if video in splits["train"]] == splits["train"]
    chosen = {tuple(v.name for v in sources.split_videos(videos, 2, None, seed)["test"]) for seed in range(10)}
    assert len(chosen) > 3
    # A limit takes some of the same videos, and leaves the test split alone.
    limited = sources.split_videos(videos, 2, 3, seed=0)
    assert limited["test"] == splits["test"] and len(limited["train"]) == 3
    assert set(limited["train"]) < set(splits["train"])
    with pytest.raises(UserError, match="--test_videos=6 would leave none of the 6 videos"):
        sources.split_videos(videos, 6, None, seed=0)


def test_the_fingerprint_tells_other_videos_apart(folder):
    videos, skipped = openvid.read_openvid(folder, {}, {})
    source = sources.Source(sources.split_videos(videos, 2, None, 0), skipped)
    same = sources.Source(sources.split_videos(videos, 2, None, 0), [])
    other = sources.Source(sources.split_videos(videos, 2, None, 1), skipped)
    assert source.fingerprint() == same.fingerprint() != other.fingerprint()


def test_odd_rows_are_used_or_listed(tmp_path):
    file = tmp_path / "OpenVid-1M.csv"
    rows = [tiny_openvid.row("a.mp4"), tiny_openvid.row("a.mp4", "again"), tiny_openvid.row("b.mp4", aesthetic="")]
    tiny_openvid.write_csv(file, rows)
    with file.open("a") as opened:
        opened.write("c.mp4\n\n")
        opened.write('"d.mp4","a ""quoted"" word\r\nand a line",1,2,3,static,1,1,1\n')
    read, skipped = openvid.read_rows(file)
    assert {name: row.caption for name, row in read.items()} == {
        "a.mp4": "A caption.",
        "d.mp4": 'a "quoted" word\r\nand a line',
    }
    assert skipped == [
        ("a.mp4", "has two rows in the CSV; the first was used"),
        ("b.mp4", "has a row without its scores"),
        ("c.mp4", "has a row without its scores"),
    ]


def test_folders_that_are_not_openvid(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        openvid.read_openvid(tmp_path / "nowhere", {}, {})
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "binary.csv").write_bytes(b'"' + bytes(range(256)) * 1000)
    with pytest.raises(UserError, match="no CSV with the columns video, caption"):
        openvid.read_openvid(tmp_path, {}, {})
    tiny_openvid.write_csv(tmp_path / "good.csv", [tiny_openvid.row("a.mp4")])
    with pytest.raises(UserError, match="no archive of OpenVid-1M"):
        openvid.read_openvid(tmp_path, {}, {})
