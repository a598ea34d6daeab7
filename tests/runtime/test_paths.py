"""Names of files and folders, here and in buckets."""

import errno
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest
from bucket import OBJECTS, BucketFileSystem, stand_in
from etils import epath

from osv_jax import sample
from osv_jax.convert import weights
from osv_jax.data import demo
from osv_jax.errors import UserError
from osv_jax.runtime import arguments, command_line
from osv_jax.runtime.paths import (
    as_path,
    check_apart,
    check_file,
    check_folder,
    copy_file,
    copy_folder,
    files_below,
    in_bucket,
    new_file,
    new_folder,
    remove_folder,
    size_of,
    user_cache,
)


@pytest.fixture
def bucket(monkeypatch):
    stand_in(monkeypatch)
    return as_path("gs://bucket")


def test_local_names_are_pathlibs_and_the_tilde_is_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("~/runs") == tmp_path / "runs"
    assert as_path(pathlib.Path("~")) == tmp_path
    assert as_path("runs/~") == pathlib.Path("runs/~")
    assert type(as_path("runs")) is type(pathlib.Path())
    assert not in_bucket(as_path("runs"))


def test_names_in_buckets_stay_what_they_are(bucket):
    path = as_path("gs://bucket/runs/a")
    assert str(path / "config.json") == "gs://bucket/runs/a/config.json"
    assert in_bucket(path)
    assert as_path(path) == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s3://bucket/x", "s3://bucket/x is neither a local path nor in a bucket of Google Cloud Storage"),
        ("https://example.com/x.mp4", "neither a local path nor"),
        ("gs://", "names no bucket"),
        ("gs:///x", "names no bucket"),
        (pathlib.Path("gs://bucket/x"), "has lost a slash"),
        ("~nobody-of-this-name/x", "home of a user who has none here"),
        ("x" * 300, "File name too long"),
        ("runs/\0", "embedded null"),
    ],
)
def test_other_names_are_refused_in_a_sentence(name, message, bucket):
    with pytest.raises(UserError, match=message):
        as_path(name)


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for scheme in ("gs", "gcs"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(UserError, match=r"gs://one is a bucket, for which gcsfs is missing; run `pip install osv_jax"):
        as_path("gs://one/x")


def test_a_bucket_that_cannot_be_reached_is_told_once_before_any_work(monkeypatch):
    class Refusing(BucketFileSystem):
        def info(self, path, **_):
            raise OSError("Forbidden: storage.googleapis.com\nAnonymous caller does not have access.")

    stand_in(monkeypatch, Refusing)
    with pytest.raises(UserError, match=r"gs://two cannot be reached \(Forbidden: [a-z.]+\); check the name"):
        as_path("gs://two/x")


@pytest.fixture(params=["here", "in a bucket"])
def folder(request, tmp_path, monkeypatch):
    """A place to write to, and no local folder called `gs:` afterwards."""
    monkeypatch.chdir(tmp_path)
    stand_in(monkeypatch)
    (tmp_path / "here").mkdir()
    yield tmp_path / "here" if request.param == "here" else as_path("gs://bucket/there")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_new_file_is_there_whole_or_not_at_all(folder):
    file = folder / "a.txt"
    with new_file(file) as temporary:
        temporary.write_text("first")
        assert not file.exists()
    with pytest.raises(KeyboardInterrupt), new_file(file) as temporary:
        temporary.write_text("sec")
        raise KeyboardInterrupt
    assert file.read_text() == "first" and size_of(file) == 5
    assert list(folder.iterdir()) == [file]


def test_a_new_folder_takes_the_place_of_the_old_one(folder):
    for names in (("config.json", "a/b"), ("c",)):
        with new_folder(folder / "made") as filled:
            for name in names:
                (filled / name).parent.mkdir(exist_ok=True)
                (filled / name).write_text(name)
            assert "c" not in files_below(folder / "made")
        assert files_below(folder / "made") == {name: len(name) for name in sorted(names)}
    with pytest.raises(KeyboardInterrupt), new_folder(folder / "made") as filled:
        (filled / "d").write_text("d")
        raise KeyboardInterrupt
    assert files_below(folder) == {"made/c": 1}
    remove_folder(folder / "made")
    remove_folder(folder / "made")
    assert not (folder / "made").exists()


def test_files_are_copied_to_and_from_buckets_and_what_readers_ask_for_comes_last(bucket, tmp_path):
    made = tmp_path / "made"
    (made / "params").mkdir(parents=True)
    for name in ("config.json", "params/a", "z"):
        (made / name).write_text(name)
    copy_folder(made, bucket / "one")
    assert list(OBJECTS) == ["bucket/one/params/a", "bucket/one/z", "bucket/one/config.json"]
    copy_folder(bucket / "one", tmp_path / "back")
    assert files_below(tmp_path / "back") == files_below(made) == files_below(bucket / "one")
    copy_file(bucket / "one" / "z", bucket / "two")
    assert (bucket / "two").read_text() == "z"


def test_an_output_is_apart_from_what_it_is_made_of(tmp_path):
    source, link = tmp_path / "run", tmp_path / "link"
    (source / "inside").mkdir(parents=True)
    link.symlink_to(source)
    for output, words in (
        (source, "is its source"),
        (tmp_path / "run" / ".." / "run", "is its source"),
        (link, "is its source"),
        (source / "inside", f"lies in {source}, its source"),
        (link / "inside" / "deeper", f"lies in {source}, its source"),
        (tmp_path, f"holds {source}, its source"),
    ):
        with pytest.raises(UserError, match=f"The output {re.escape(str(output))} {words}: choose another"):
            check_apart(output, pathlib.Path("elsewhere"), source)
    check_apart(tmp_path / "run2", source, tmp_path / "ru")
    check_apart(tmp_path / "run2", as_path("run2"))


def test_folders_are_tried_before_the_work(tmp_path):
    check_folder(tmp_path / "a" / "b", "--output")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    for folder, words in (
        ("file", "it is a file"),
        ("file/x", "Not a directory"),
        (300 * "x", "File name too long"),
        ("/proc/x", ""),
    ):
        with pytest.raises(UserError, match=rf"{folder} cannot be written to \(.*{words}\): choose another --output"):
            check_folder(tmp_path / folder, "--output")


def test_a_folder_that_takes_no_files_is_refused(tmp_path, monkeypatch):
    """As a read-only one is, in which root may write all the same."""

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "write_text", refuse)
    with pytest.raises(UserError, match=r"cannot be written to \(Permission denied\)"):
        check_folder(tmp_path, "--output")


def test_files_that_cannot_be_replaced_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "locked").touch(0o444)
    (tmp_path / "open").touch()
    for name, words in (("folder", "is a folder"), ("locked", "is read-only"), (300 * "x", "File name too long")):
        with pytest.raises(UserError, match=rf"{name} .*{words}.*choose another --output"):
            check_file(tmp_path / name, "--output")
    check_file(tmp_path / "open", "--output")
    check_file(tmp_path / "new", "--output")


def test_what_a_link_names_is_replaced(tmp_path):
    (tmp_path / "made" / "old").mkdir(parents=True)
    (tmp_path / "link").symlink_to("made")
    with new_folder(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "made"] and (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["new"]


@pytest.mark.parametrize("home", [None, "/proc/nowhere"])
def test_without_a_home_nothing_is_kept_for_the_user(home, tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if home:
        monkeypatch.setenv("HOME", home)
    else:
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # As for a user whom the machine does not know.
    assert user_cache("jax") is None and arguments.compilation_cache() is None
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert list(demo.demo_videos().iterdir()) and list(tmp_path.iterdir())


@pytest.mark.parametrize("home", [None, "/proc/nowhere"])
def test_programs_are_imported_without_a_home(home):
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    code = "import osv_jax.sample, osv_jax.train, osv_jax.prepare, osv_jax.convert_weights; print('imported')"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | ({"HOME": home} if home else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout == "imported\n" and "Traceback" not in finished.stderr, finished.stderr


def test_a_local_path_of_epath_becomes_pathlibs():
    assert type(as_path(epath.Path("runs"))) is type(pathlib.Path())


def test_the_tilde_in_what_programs_are_told(monkeypatch, tmp_path):
    """For what programs hand to `as_path` themselves; a configuration's file is opened by others."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.py").touch()
    assert command_line._locate_config("--config=~/a.py:tiny") == f"--config={tmp_path}/a.py:tiny"
    assert command_line._locate_config("--workdir=~/a.py") == "--workdir=~/a.py"
    assert weights.locate("~/weights") == tmp_path / "weights"
    assert sample.plan_outputs([tmp_path / "a.png"], "~/made/{name}.mp4") == [tmp_path / "made" / "a.mp4"]
