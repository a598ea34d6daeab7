"""The program that prepares datasets: killed and resumed, in shards, with damaged input, and what it says."""

import json
import os
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import synthetic_video
import tiny_openvid
from fake_encoder import FakeEncoder, grey_of
from PIL import Image

from osv_jax import prepare
from osv_jax.convert import weights
from osv_jax.data import latents, world
from osv_jax.errors import UserError
from osv_jax.models.svd_unet import UNetConfig
from osv_jax.preparation import pipeline, shards, stored

TESTS = pathlib.Path(__file__).parent
# As kill_harness.py has them; eight clips a batch, for the eight devices of the tests.
ARGUMENTS = ["--num_frames=4", "--fps=10", "--height=24", "--width=32", "--num_augmented=2", "--workers=2"]
ARGUMENTS += ["--videos_per_file=3", "--test_videos=2", "--min_motion=0", "--config=fake"]


@pytest.fixture(scope="module", autouse=True)
def fake_networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_read_config", lambda name: None)
        patch.setattr(pipeline, "_networks", lambda *_: ("", {}))
        patch.setattr(pipeline, "_fingerprint", lambda *_: "fake")
        patch.setattr(pipeline, "_encoder", lambda *_: FakeEncoder())
        yield


@pytest.fixture(scope="module")
def openvid(tmp_path_factory):
    """Nine videos of three clips each."""
    folder = tmp_path_factory.mktemp("openvid")
    tiny_openvid.write_openvid(folder, num_videos=9)
    return folder


def run(source, output, *arguments) -> pathlib.Path:
    prepare.main([f"--source={source}", f"--output={output}", *ARGUMENTS, *arguments])
    return output


@pytest.fixture(scope="module")
def whole(openvid, tmp_path_factory):
    """A dataset that nothing interrupted."""
    return run(f"openvid:{openvid}", tmp_path_factory.mktemp("whole") / "dataset")


def records_of(folder: pathlib.Path) -> dict[str, list[bytes]]:
    """The stored bytes of every record by file, which must all be there."""
    latents.open_dataset(folder)
    return {file.name: stored.read_records(file) for file in sorted(folder.glob("*.array_record-*"))}


def read_all(folder: pathlib.Path, split: str = "train") -> list[dict]:
    """All records in the order of the files."""
    dataset = latents.open_dataset(folder, split)
    return [dataset.read(index) for index in range(len(dataset))]


def test_openvid_becomes_a_dataset(whole):
    train, test = latents.open_dataset(whole), latents.open_dataset(whole, "test")
    assert (len(train), len(test)) == (7 * 3, 2 * 3)
    sources = [{record["source"] for record in read_all(whole, split)} for split in ("train", "test")]
    assert not sources[0] & sources[1] and len(sources[0] | sources[1]) == 9
    for record in [*read_all(whole), *read_all(whole, "test")]:
        first = round(record["clip_start"] * 10)
        assert grey_of(record) == list(range(first, first + 4))
        assert record["caption"].startswith('Line "') and record["fps"] == 10
    assert not (whole / shards.UNFINISHED).exists()
    skipped = (whole / "skipped.txt").read_text().splitlines()
    assert skipped == [
        "OpenVid_part2.zip/videos/norow.mp4 has no row in the CSV",
        "novideo.mp4 is in the CSV, but in no archive",
    ]
    with Image.open(whole / "contact_sheet.png") as sheet:
        assert sheet.size[1] > 8 * 24


def test_the_world_becomes_a_dataset(tmp_path, capsys):
    """Drawn clips with their captions, in two splits that share none; as many as asked for."""
    made = run("world", tmp_path / "world", "--max_videos=5", "--test_videos=3", "--seed=4")
    for split, count in (("train", 5), ("test", 3)):
        addresses = [world.Address(4, split, number) for number in range(count)]
        records = {record["source"]: record for record in read_all(made, split)}
        assert sorted(records) == [address.name for address in addresses]
        for address in addresses:
            scene, record = world.scene(address), records[address.name]
            assert record["caption"] == scene.caption and record["clip_start"] == 0
            means = world.draw(scene, 4, 10.0, 24, 32).mean(axis=(1, 2, 3)) / 255
            np.testing.assert_allclose(record["latents"].astype(np.float32).mean(axis=(1, 2, 3)), means, rtol=1e-2)
    assert "8 were opened" in capsys.readouterr().out
    only = pipeline.read_source(prepare._parser().parse_args(["--source=world", "--test_videos=0", "--max_videos=2"]))
    assert {split: len(videos) for split, videos in only.splits.items()} == {"train": 2}


def test_noise_is_a_function_of_the_clip(whole):
    records = read_all(whole)
    assert len({record["image_latents"].tobytes() for record in records}) == len(records)


def test_inspect_reports(whole, capsys):
    prepare.main([f"--inspect={whole}"])
    report = capsys.readouterr().out
    for words in ("train   21 clips in 3 files", "test    6 clips in 1 files", "9 were opened", "skipped 2 videos"):
        assert words in report
    assert "like: novideo.mp4 is in the CSV, but in no archive" in report
    (row,) = [line.split() for line in report.splitlines() if line.split()[:3] == ["4", "to", "8"]]
    assert row[3:] == ["27", 40 * "#"]


def test_a_finished_dataset_is_left_alone(whole, openvid, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in whole.glob("*.array_record-*")}
    run(f"openvid:{openvid}", whole)
    assert f"{whole} is complete." in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in whole.glob("*.array_record-*")} == before
    with pytest.raises(UserError, match="started with other videos or settings: max_clips \\(was None, is 1\\)"):
        run(f"openvid:{openvid}", whole, "--max_clips=1")


def test_what_was_begun_with_an_encoder_in_half_precision_is_not_continued_in_float32(whole, openvid, tmp_path):
    plan = json.loads((whole / "plan.json").read_text())
    assert plan.pop("vae_dtype") == "float32"
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r"vae_dtype \(was None, is 'float32'\)"):
        run(f"openvid:{openvid}", tmp_path / "begun")


def test_shards_merge_to_the_same_dataset(whole, openvid, tmp_path, capsys):
    parts = [run(f"openvid:{openvid}", tmp_path / f"part{i}", f"--shard={i}/2") for i in range(2)]
    sources = [{r["source"] for r in read_all(part)} for part in parts]
    assert not sources[0] & sources[1]
    names = [str(part) for part in parts]
    for wrong, words in (
        (names[:1], "The part of --shard=1/2 is missing"),
        ([*names, names[0]], "The part of --shard=0/2 is given twice"),
    ):
        with pytest.raises(UserError, match=words):
            prepare.main(["--merge", *wrong, f"--output={tmp_path / 'wrong'}"])
    with pytest.raises(UserError, match="part0 is its source"):
        prepare.main(["--merge", *names, f"--output={names[0]}"])
    # The order in which parts are named does not matter.
    capsys.readouterr()
    prepare.main(["--merge", *reversed(names), f"--output={tmp_path / 'merged'}"])
    assert records_of(tmp_path / "merged") == records_of(whole)
    merged, expected = (latents.read_metadata(folder) for folder in (tmp_path / "merged", whole))
    assert merged == expected
    assert "train   21 clips" in capsys.readouterr().out


@pytest.mark.integration
@pytest.mark.timeout(200)
def test_killed_ten_times_the_dataset_is_the_same(whole, openvid, tmp_path):
    """kill -9 at random moments: identical, record for record, and nothing that was committed is encoded again."""
    paths = [str(TESTS), str(TESTS / "data"), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    harness = [sys.executable, str(TESTS / "data" / "kill_harness.py"), f"openvid:{openvid}"]
    killed = tmp_path / "killed"
    result = subprocess.run(
        [*harness, str(killed), "10", "3"], env=environment, capture_output=True, text=True, timeout=190
    )
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout.splitlines()[-1])
    assert len(told["at_kill"]) == 10 and told["redone"] == 0
    moments = set(zip(told["at_kill"], told["encoded"], strict=True))
    assert len(moments) > 3, f"the kills did not fall on different moments: {told}"
    # In batches of two, where the other was made in batches of eight.
    assert records_of(killed) == records_of(whole)
    for name in ("features.json", "dataset_info.json", "skipped.txt"):
        assert (killed / name).read_text() == (whole / name).read_text()


def write_damaged_inputs(folder: pathlib.Path) -> dict[str, int | str]:
    """Fifty files; for each its number of clips, or words of the reason why it has none."""
    folder.mkdir()
    expected: dict[str, int | str] = {}

    def add(name: str, result: int | str) -> pathlib.Path:
        expected[name] = result
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        return folder / name

    whole = synthetic_video.write_constant(folder / "whole.mp4", 12, 10)
    expected["whole.mp4"] = 3
    data = whole.read_bytes()
    for percent in (1, 10, 50, 90):
        add(f"truncated {percent}.mp4", "cannot be decoded").write_bytes(data[: len(data) * percent // 100])
    add("zero.mp4", "is empty").touch()
    for size in (1, 7, 4096):
        add(f"zeros {size}.mp4", "cannot be decoded").write_bytes(b"\0" * size)
        add(f"noise {size}.mp4", "cannot be decoded").write_bytes(np.random.default_rng(size).bytes(size))
    synthetic_video.write_sound(add("sound.mp4", "has no video stream"))
    synthetic_video.write_sound(add("sound.mkv", "has no video stream"))
    synthetic_video.write_constant(add("one frame.mp4", "is 0.10 s long"), 1, 10)
    synthetic_video.write_constant(add("too short.mp4", "is 0.30 s long"), 3, 10)
    synthetic_video.write_constant(add("just long enough.mp4", 1), 4, 10)
    synthetic_video.write_constant(add("too slow.mp4", "has 2.00 frames a second"), 8, 2)
    synthetic_video.write(add("variable.mp4", 2), [0, 0.05, 0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6, 0.62, 0.7, 0.75])
    for angle in (90, -90, 180):
        synthetic_video.write_constant(add(f"rotated {angle}.mp4", 3), 12, 10, rotation=angle)
    for pix_fmt in ("yuv420p10le", "yuv422p10le", "yuv444p", "gray"):
        synthetic_video.write_constant(add(f"{pix_fmt}.mp4", 3), 12, 10, pix_fmt=pix_fmt)
    for width, height in ((33, 23), (16, 200), (301, 16)):
        path = add(f"{width}x{height}.mp4", 3)
        synthetic_video.write_constant(path, 12, 10, width=width, height=height, pix_fmt="yuv444p")
    for name in ("wrong.avi", "wrong.webm", "WRONG.MOV"):
        add(name, 3).write_bytes(data)
    add("really text.mp4", "cannot be decoded").write_text("These are words. " * 50)
    add("archive.mp4", "cannot be decoded").write_bytes(b"PK\3\4" + bytes(200))
    add("playlist.mp4", "cannot be decoded").write_text(f"#EXTM3U\n#EXTINF:1,\n{whole}\n#EXT-X-ENDLIST\n")
    Image.new("RGB", (32, 24)).save(add("picture.mp4", "cannot be decoded"), format="PNG")
    add("video.dat", "does not end in the extension").write_bytes(data)
    add("no extension", "does not end in the extension").write_bytes(data)
    add("notes.txt", "does not end in the extension").write_text("notes")
    for name in ("été à l'eau.mp4", "日本 🎬.mp4", " leading and trailing .mp4", "%d #1 [a].mp4", "-dash.mp4"):
        add(name, 3).write_bytes(data)
    add("a folder.mp4/inside.mp4", 3).write_bytes(data)
    add("link.mp4", 3).symlink_to(whole)
    add("dangling.mp4", "is a link to nowhere").symlink_to(folder / "nowhere.mp4")
    add("loop.mp4", "is a link to nowhere").symlink_to(folder / "loop.mp4")
    (folder / "up").symlink_to(folder, target_is_directory=True)  # not followed
    synthetic_video.write_damaged(add("overwritten.mp4", "cannot be decoded"))
    synthetic_video.write_unknown(add("unknown.mp4", "is encoded in a way that ffmpeg does not know"))
    still = add("still.mp4", "does not move")
    synthetic_video.write(still, [0.0, 0.4], rate=10)
    expected["still.mp4"] = "frames a second"
    return expected


def test_fifty_damaged_inputs(tmp_path):
    expected = write_damaged_inputs(tmp_path / "in")
    assert len(expected) >= 50
    before = {path for path in tmp_path.rglob("*") if tmp_path / "in" in path.parents}
    output = run(tmp_path / "in", tmp_path / "out", "--test_videos=0", "--videos_per_file=100")
    counts: dict[str, int] = {}
    for record in read_all(output):
        counts[record["source"]] = counts.get(record["source"], 0) + 1
        first = round(record["clip_start"] * 10)
        if record["source"] not in ("variable.mp4", "gray.mp4"):  # (which is darker: of full range)
            assert grey_of(record) == list(range(first, first + 4)), record["source"]
    listed = (output / "skipped.txt").read_text().splitlines()
    for name, result in expected.items():
        reasons = [line for line in listed if line.startswith(f"{' '.join(name.split())} ")]
        if isinstance(result, int):
            assert (counts.pop(name, 0), reasons) == (result, []), name
        else:
            assert name not in counts and len(reasons) == 1 and result in reasons[0], (name, result, reasons)
    assert not counts
    # Nothing but the dataset has come to be.
    outside = {p for p in tmp_path.rglob("*") if output not in p.parents and p not in (output, tmp_path / "in")}
    assert outside == before


def test_damaged_archives(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    data = synthetic_video.write_constant(tmp_path / "a.mp4", 12, 10).read_bytes()
    names = ["good.mp4", "../outside.mp4", "/absolute.mp4", "..\\windows.mp4", "bad crc.mp4", "locked.mp4", "text.mp4"]
    with zipfile.ZipFile(folder / "OpenVid_part0.zip", "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), b"words" if name == "text.mp4" else data)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("good.mp4", data)
        archive.writestr("readme.txt", "words")
        archive.mkdir("a folder.mp4")
    raw = bytearray((folder / "OpenVid_part0.zip").read_bytes())
    with zipfile.ZipFile(folder / "OpenVid_part0.zip") as archive:
        broken = archive.getinfo("bad crc.mp4").header_offset + 30 + len("bad crc.mp4") + len(data) // 2
    raw[broken : broken + 4] = b"\xff\0\xff\0"
    # The bit that says a member is encrypted, here and in the directory.
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        name = raw.index(b"locked.mp4") if flags == 6 else raw.rindex(b"locked.mp4")
        raw[raw.rindex(signature, 0, name) + flags] |= 1
    (folder / "OpenVid_part0.zip").write_bytes(raw)
    (folder / "OpenVid_part1.zip").write_bytes(bytes(raw[: len(raw) // 2]))
    (folder / "OpenVid_part2_partaa").write_bytes(bytes(raw[: len(raw) // 3]))
    with zipfile.ZipFile(folder / "OpenVid_part3.zip", "w") as archive:
        archive.writestr("good.mp4", data)
    rows = [tiny_openvid.row(name) for name in (*names, "outside.mp4", "absolute.mp4", "windows.mp4")]
    tiny_openvid.write_csv(folder / "OpenVid-1M.csv", [*rows, tiny_openvid.row("good.mp4", "twice")])

    output = run(f"openvid:{folder}", tmp_path / "out", "--test_videos=0")
    assert {record["source"] for record in read_all(output)} == {"OpenVid_part0.zip/good.mp4"}
    listed = (output / "skipped.txt").read_text()
    for line in (
        "OpenVid_part0.zip/../outside.mp4 has a name that leads out of the archive",
        "OpenVid_part0.zip//absolute.mp4 has a name that leads out of the archive",
        "OpenVid_part0.zip/locked.mp4 is encrypted",
        "OpenVid_part0.zip/text.mp4 cannot be decoded",
        "OpenVid_part0.zip/bad crc.mp4 cannot be unpacked",
        "OpenVid_part0.zip/good.mp4 is there twice; OpenVid_part0.zip/good.mp4 was used",
        "OpenVid_part0.zip/readme.txt does not end in the extension",
        "OpenVid_part1.zip cannot be opened as a zip archive",
        "OpenVid_part2.zip cannot be opened as a zip archive",
        "OpenVid_part3.zip/good.mp4 is there twice",
        "good.mp4 has two rows in the CSV; the first was used",
    ):
        assert line in listed, listed
    assert "windows.mp4 has a name that leads out" in listed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "in", "out"]


def refused(*arguments) -> str:
    with pytest.raises(UserError) as error:
        prepare.main(list(arguments))
    return str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--height=20"], "20 x 32 is not divisible by 8"),
        (["--fps=0"], "--fps: 0 must be a number from 0.1 to 240"),
        (["--fps=inf"], "--fps: inf"),
        (["--stride=0"], "--stride: 0 must be a finite number of at least 0.001"),
        (["--stride=1e-300"], "--stride: 1e-300"),
        (["--num_frames=0"], "--num_frames: 0 must be a whole number from 1 to 1000"),
        (["--workers=0"], "--workers: 0 must be a whole number of at least 1"),
        (["--min_motion=nan"], "--min_motion: nan must be a finite number of at least 0"),
        (["--min_motion_score=inf"], "--min_motion_score: inf must be a finite number"),
        (["--test_videos=-1"], "--test_videos: -1"),
        (["--seed=4294967296"], "--seed: 4294967296 must be a whole number from 0 to 4294967295"),
        (["--batch_size=3"], "--batch_size=3 does not split over the 8 devices"),
        (["--shard=2/2"], "--shard=2/2: shards of 2 count from 0 to 1"),
        (["--shard=1"], "must look like 0/4"),
        (["--shard=7/8"], "has nothing to do"),
        (["--min_motion_score=3"], "Bounds on scores need --source=openvid"),
        (["--test_videos=1"], "would leave none of the 1 videos"),
        (["--inspect=x"], "Give one of --source"),
        (["--no_such_flag"], "no_such_flag"),
    ],
)
def test_values_are_checked_before_anything_is_written(arguments, words, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"x")
    base = [f"--source={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", *ARGUMENTS, "--test_videos=0"]
    assert words in refused(*base, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arguments", "expected"), [([], 25), (["--num_frames=7"], 7)])
def test_clips_have_as_many_frames_as_the_unet_s_unless_it_is_said(arguments, expected, monkeypatch):
    monkeypatch.setattr(weights, "load_config", lambda folder, name: UNetConfig(num_frames=25))
    given = ["--source=videos", "--output=latents", "--weights=miniature", *arguments]
    assert pipeline._settings(prepare._parser().parse_args(given), None, {})["num_frames"] == expected


def test_places_are_checked(tmp_path, openvid):
    assert "does not exist" in refused(f"--source={tmp_path / 'x'}", f"--output={tmp_path / 'out'}", *ARGUMENTS)
    assert "needs --output" in refused(f"--source={tmp_path}", *ARGUMENTS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    base = [f"--source=openvid:{openvid}", *ARGUMENTS]
    assert "holds other files" in refused(*base, f"--output={tmp_path / 'full'}")
    assert "cannot be written to" in refused(*base, f"--output={tmp_path / 'full' / 'file'}")
    assert "cannot be written to" in refused(*base, "--output=/proc/x")
    assert f"lies in {openvid}" in refused(*base, f"--output={openvid / 'latents'}")
    assert f"holds {openvid}" in refused(*base, f"--output={openvid.parent}")
    with shards.locked(tmp_path / "busy"):
        assert "Another process is writing" in refused(*base, f"--output={tmp_path / 'busy'}")
    assert "is not a dataset" in refused(f"--inspect={tmp_path}")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_text("words")
    nothing = [f"--source={tmp_path / 'in'}", f"--output={tmp_path / 'none'}", *ARGUMENTS, "--test_videos=0"]
    assert "Not one clip could be made" in refused(*nothing)


def test_the_program_ends_with_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare"])
    with pytest.raises(SystemExit) as end:
        prepare.run()
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: Give one of --source")
