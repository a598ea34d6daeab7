"""Names of files and folders, here and in buckets."""

import importlib
import pathlib
import sys

import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from osv_jax.errors import UserError
from osv_jax.runtime.paths import as_path, in_bucket, new_file


@pytest.fixture
def driver(monkeypatch):
    """Something that reads and writes `gs://`."""
    monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, "gs", MemoryFileSystem)


def test_local_names_are_pathlibs_and_the_tilde_is_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("~/runs") == tmp_path / "runs"
    assert as_path(pathlib.Path("~")) == tmp_path
    assert as_path("runs/~") == pathlib.Path("runs/~")
    assert type(as_path("runs")) is type(pathlib.Path())
    assert not in_bucket(as_path("runs"))


def test_names_in_buckets_stay_what_they_are(driver):
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
    ],
)
def test_other_names_are_refused_in_a_sentence(name, message, driver):
    with pytest.raises(UserError, match=message):
        as_path(name)


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://bucket/x is in a bucket, for which gcsfs is missing; run `pip"):
        as_path("gs://bucket/x")


def test_a_new_file_is_there_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.txt"
    with new_file(file) as temporary:
        temporary.write_text("first")
        assert not file.exists()
    with pytest.raises(KeyboardInterrupt), new_file(file) as temporary:
        temporary.write_text("sec")
        raise KeyboardInterrupt
    assert file.read_text() == "first"
    assert list(tmp_path.iterdir()) == [file]


def test_a_local_path_of_epath_becomes_pathlibs():
    assert type(as_path(epath.Path("runs"))) is type(pathlib.Path())
