import json
import pathlib
import pickle
import struct
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from osv_jax.convert.readers import open_weights
from osv_jax.errors import UserError

TENSORS = {
    "a.weight": torch.linspace(-1, 1, 12).reshape(3, 4),
    "a.bias": torch.linspace(0, 1, 3).to(torch.float16),
    "b.weight": torch.linspace(-3, 3, 8).to(torch.bfloat16).reshape(2, 2, 2),
    "scalar": torch.tensor(2.5),
    "position_ids": torch.arange(5),
}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.numpy()


def check(reader):
    assert reader.names() == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        array = reader.read(name)
        assert reader.shape(name) == array.shape == tuple(tensor.shape)
        assert array.dtype == as_numpy(tensor).dtype
        np.testing.assert_array_equal(array, as_numpy(tensor))


def write_shards(folder: pathlib.Path, index: str, shards: list[str], save) -> None:
    weight_map = {name: shards[i % len(shards)] for i, name in enumerate(TENSORS)}
    for shard in shards:
        save({name: tensor for name, tensor in TENSORS.items() if weight_map[name] == shard}, folder / shard)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
    ],
)
def test_single_safetensors(tmp_path, name):
    save_file(TENSORS, tmp_path / name)
    check(open_weights(tmp_path))
    check(open_weights(tmp_path / name))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.fp16.bin", "vits14.pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles(tmp_path, name, zipped):
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=zipped)
    check(open_weights(tmp_path / name))
    if name.endswith(".bin"):
        check(open_weights(tmp_path))


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        ("model.safetensors.index.json", "model-0000{}-of-00002.safetensors"),
        ("model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002.safetensors"),
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model-0000{}-of-00002.safetensors"),
        (
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "diffusion_pytorch_model-0000{}-of-00002.fp16.safetensors",
        ),
        ("pytorch_model.bin.index.json", "pytorch_model-0000{}-of-00002.bin"),
    ],
)
def test_shards(tmp_path, index, shard):
    save = torch.save if index.startswith("pytorch") else save_file
    shards = [shard.format(i) for i in (1, 2)]
    write_shards(tmp_path, index, shards, save)
    check(open_weights(tmp_path))
    (tmp_path / shards[1]).unlink()
    with pytest.raises(UserError, match=f"lacks 1 of the 2 weight shards.*{shards[1]}"):
        open_weights(tmp_path)


def test_full_precision_is_preferred_to_fp16_and_safetensors_to_pickles(tmp_path):
    save_file({"x": torch.tensor([1.0])}, tmp_path / "model.safetensors")
    save_file({"x": torch.tensor([2.0])}, tmp_path / "model.fp16.safetensors")
    torch.save({"x": torch.tensor([3.0])}, tmp_path / "pytorch_model.bin")
    assert open_weights(tmp_path).read("x") == 1
    (tmp_path / "model.safetensors").unlink()
    assert open_weights(tmp_path).read("x") == 2
    (tmp_path / "model.fp16.safetensors").unlink()
    assert open_weights(tmp_path).read("x") == 3


def broken(kind: str) -> bytes:
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    lying = json.dumps({"x": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}).encode()
    return {
        "empty": b"",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        "garbage": b"\xff" * 64,
        "short": b"\x01\x02",
        "not json": struct.pack("<Q", 4) + b"{]{]",
        "a list": struct.pack("<Q", 2) + b"[]",
        "lying": struct.pack("<Q", len(lying)) + lying + bytes(16),
        "no data": struct.pack("<Q", len(header)) + header + bytes(15),
        "half a header": struct.pack("<Q", len(header)) + header[:10],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "is empty"),
        ("pointer", "git-lfs pointer.*git lfs pull"),
        ("garbage", "damaged"),
        ("short", "damaged"),
        ("not json", "damaged"),
        ("a list", "damaged"),
        ("lying", "damaged"),
        ("no data", r"truncated: it has \d+ bytes of \d+"),
        ("half a header", "truncated"),
    ],
)
def test_broken_safetensors(tmp_path, kind, message):
    (tmp_path / "model.safetensors").write_bytes(broken(kind))
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("empty", "is empty"), ("pointer", "git-lfs"), ("garbage", "damaged"), ("truncated", "damaged")],
)
def test_broken_pickles(tmp_path, kind, message):
    file = tmp_path / "pytorch_model.bin"
    if kind == "truncated":
        torch.save(TENSORS, file)
        file.write_bytes(file.read_bytes()[:-200])
    else:
        file.write_bytes(broken(kind))
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path)


class _Malicious:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return open, (str(self.witness), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, zipped):
    witness, file = tmp_path / "witness", tmp_path / "pytorch_model.bin"
    content = {**TENSORS, "x": _Malicious(witness)}
    if zipped:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps({"x": _Malicious(witness)}, protocol=2))
    witness.unlink(missing_ok=True)
    with pytest.raises(UserError, match="refused"):
        open_weights(tmp_path)
    assert not witness.exists()


def test_a_pickle_of_something_else(tmp_path):
    torch.save({"model": {"x": torch.zeros(2)}}, tmp_path / "training.pth")
    with pytest.raises(UserError, match="does not map names to tensors"):
        open_weights(tmp_path / "training.pth")


def test_pickles_need_a_new_enough_torch(tmp_path, monkeypatch):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    with pytest.raises(UserError, match=r"install torch 2\.6"):
        open_weights(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install osv_jax\[convert\]"):
        open_weights(tmp_path)


def test_folders_without_weights(tmp_path):
    with pytest.raises(UserError, match="has no weights"):
        open_weights(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        open_weights(tmp_path / "nothing.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match="is not a weights file"):
        open_weights(tmp_path / "model.ckpt")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"x": "../model.safetensors"}}'])
def test_a_broken_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="index"):
        open_weights(tmp_path)


def test_an_exotic_dtype_fails_only_when_read(tmp_path):
    save_file({"x": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    reader = open_weights(tmp_path)
    assert reader.shape("x") == (2,)
    with pytest.raises(UserError, match="F8_E4M3"):
        reader.read("x")
