"""Evaluating and comparing with weights, videos and outputs in a bucket: the same as on this machine."""

import json
import runpy

import av
import pytest
import synthetic_video
import tiny_student
from bucket import stand_in
from tiny_networks import NUM_FRAMES, save

from osv_jax import compare, evaluate
from osv_jax.evaluation import showing
from osv_jax.runtime import arguments, paths

FPS = 8.0


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """`weights` of a teacher, the `lora` of a student, `eval` weights of VideoMAE, and videos."""
    folder = tmp_path_factory.mktemp("sources")
    tiny_student.save(folder, {"height": 16, "width": 24, "num_frames": NUM_FRAMES, "fps": FPS}, ("lora",))
    save(folder / "eval", "videomae")
    for kind, first in (("real", 0), ("fake", 7)):
        (folder / kind).mkdir()
        for i in range(3):
            synthetic_video.write_constant(folder / kind / f"{i}.mp4", 12, int(FPS), first=first + 3 * i)
    return folder


@pytest.fixture(scope="module", autouse=True)
def bucket(sources, tmp_path_factory):
    """With the sources in it; and no local folder called `gs:` afterwards."""
    here = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        stand_in(patch)
        made = paths.as_path("gs://bucket")
        paths.copy_folder(sources, made)
        yield made
    assert not list(here.iterdir())


def test_fvd_of_videos_in_a_bucket_with_its_features_kept_there(sources, bucket, tmp_path, capsys):
    def printed(folder, cache):
        given = [f"--{name}={folder / name}" for name in ("real", "fake")]
        given += [f"--weights={folder / 'eval'}", "--network=videomae", f"--frames={NUM_FRAMES}", "--bootstrap=3"]
        evaluate.main(["fvd", *given, "--protocol=osv", f"--cache={cache}"])
        return capsys.readouterr().out

    first, local = printed(bucket, bucket / "cache"), printed(sources, tmp_path)
    assert first.split("FVD by osv: ")[1] == local.split("FVD by osv: ")[1]
    (file,) = (bucket / "cache").glob("*.npz")
    assert f"features of real videos: {file}\n" in first
    assert printed(bucket, bucket / "cache") == first


@pytest.mark.integration
def test_a_student_is_compared_in_a_bucket_as_it_is_here(sources, bucket, tmp_path):
    def compared(folder, output):
        given = [f"--weights={folder / 'weights'}", f"--lora={folder / 'lora'}", f"--videos={folder / 'real'}"]
        compare.main([*given, "--clips=2", "--steps=2", f"--output={output}"])
        return json.loads((output / "measured.json").read_text())["samples"]

    here, there = compared(sources, tmp_path), compared(bucket, bucket / "compared")
    assert list(there.values()) == list(here.values())
    assert {"comparison.mp4", "comparison.png", "measured.json"} <= paths.files_below(bucket / "compared").keys()
    # Nothing is made again.
    before = paths.files_below(bucket / "compared")
    assert compared(bucket, bucket / "compared") == there and paths.files_below(bucket / "compared") == before


def table_of(folder, output, **changes):
    config = runpy.run_path(str(arguments.config_file("eval")))["get_config"]()
    config.update(weights=str(folder / "weights"), students=(), videos=str(folder / "real"), output=str(output))
    config.update(protocol="cd-fvd", fvd_weights=str(folder / "eval"), bootstrap=3, films=2)
    config.update(decode_chunk_size=NUM_FRAMES, **changes)
    teacher, student = {"name": "teacher", "sampler": "euler", "steps": 2}, {"name": "student", "steps": 1}
    config.methods = (teacher, student | {"lora": str(folder / "lora")})
    evaluate._table(config)
    rows = json.loads((output / "table.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.integration
def test_a_table_is_made_in_a_bucket_as_it_is_here(sources, bucket, tmp_path):
    here, there = table_of(sources, tmp_path), table_of(bucket, bucket / "table")
    assert there == here
    written = paths.files_below(bucket / "table")
    # Parts are called after what they are made of, and where that lies.
    shown = [{name for name in found if "parts/" not in name} for found in (written, paths.files_below(tmp_path))]
    assert shown[0] == shown[1]
    films = sorted((bucket / "table" / "films").glob("*.mp4"))
    assert len(films) == 3 * 2
    with films[0].open("rb") as file, av.open(file) as film:
        assert len(list(film.decode(video=0))) == NUM_FRAMES
    # Finished, it is not made again; with other films only they are.
    assert table_of(bucket, bucket / "table") == there and paths.files_below(bucket / "table") == written
    table_of(bucket, bucket / "table", films=1)
    assert len(list((bucket / "table" / "films").glob("*.mp4"))) == 3


def test_only_films_are_removed_of_a_folder_that_need_not_be_there(bucket):
    showing.remove_films(bucket / "nowhere")
    for name in ("00_00.mp4", "my_cat.mp4"):
        paths.write_text(bucket / "films" / name, "film")
    showing.remove_films(bucket / "films")
    assert list(paths.files_below(bucket / "films")) == ["my_cat.mp4"]
