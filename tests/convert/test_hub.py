"""An export in the layout of a hub: PyTorch's programs load it by its name, without network."""

import pathlib

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from huggingface_hub import constants, snapshot_download
from tiny_pipeline import UNET
from tool import convert
from torch_reference import torch_unet

from osv_jax.convert import hub
from osv_jax.errors import UserError


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A UNet for diffusers, with a card."""
    folder = tmp_path_factory.mktemp("exported") / "student"
    torch_unet(UNET).save_pretrained(folder / "unet")
    (folder / "README.md").write_text("first")
    return folder


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # in diffusers
def test_a_network_is_loaded_by_its_name(exported, tmp_path, capsys):
    assert convert(["push", str(exported), "me/student.1", f"--hub={tmp_path}"]) == 0
    assert "is the newest of me/student.1" in capsys.readouterr().out
    options = {"subfolder": "unet", "cache_dir": tmp_path, "local_files_only": True}
    loaded = UNetSpatioTemporalConditionModel.from_pretrained("me/student.1", **options)
    for name, tensor in torch_unet(UNET).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_newest_counts_and_the_one_before_stays(exported, tmp_path):
    find = {"cache_dir": tmp_path, "local_files_only": True}
    first = hub.push(exported, "me/student", tmp_path)
    assert hub.push(exported, "me/student", tmp_path) == first
    assert pathlib.Path(snapshot_download("me/student", **find)).samefile(first)
    (exported / "README.md").write_text("second")
    second = hub.push(exported, "me/student", tmp_path)
    assert pathlib.Path(snapshot_download("me/student", **find)).samefile(second) and second != first
    assert pathlib.Path(snapshot_download("me/student", revision=first.name, **find)).samefile(first)
    assert (first / "README.md").read_text() == "first" and (second / "README.md").read_text() == "second"
    assert {path.name for path in first.parent.iterdir()} == {first.name, second.name}


def test_the_folder_is_huggingface_hubs_own(monkeypatch):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    home = pathlib.Path(constants.default_home).expanduser()
    assert pathlib.Path(hub.default_hub()).expanduser() == home / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", "/a")
    assert hub.default_hub() == "/a/hub"
    monkeypatch.setenv("HF_HUB_CACHE", "/b")
    assert hub.default_hub() == "/b"


@pytest.mark.parametrize("name", ["student", "a/b/c", "../b", "a/..", "a--b/c", "a/b.git", "/b", "a/", "a b/c", "ä/b"])
def test_names_that_no_hub_has_are_refused(exported, tmp_path, name):
    with pytest.raises(UserError, match="is no name of a model on a hub: give OWNER/NAME"):
        hub.push(exported, name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_export_or_cannot_be_written_is_refused(exported, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"has no README\.md: give a folder that export-lora has written"):
        hub.push(tmp_path, "me/student", tmp_path / "hub")
    with pytest.raises(UserError, match="--hub"):
        hub.push(exported, "me/student", tmp_path / "file")
