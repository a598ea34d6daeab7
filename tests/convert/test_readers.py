import errno
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

from osv_jax.convert.json_files import read_json
from osv_jax.convert.readers import open_weights, read_floats, safetensors_metadata
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
        assert reader.dtype(name) == array.dtype
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
            "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors",
        ),
        (  # diffusers 0.30
            "diffusion_pytorch_model.safetensors.fp16.index.json",
            "diffusion_pytorch_model-0000{}-of-00002.fp16.safetensors",
        ),
        ("model.fp16.safetensors.index.json", "model.fp16-0000{}-of-00002.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model-0000{}-of-00002.bin"),
        ("pytorch_model.bin.index.fp16.json", "pytorch_model.fp16-0000{}-of-00002.bin"),
        ("diffusion_pytorch_model.bin.fp16.index.json", "diffusion_pytorch_model-0000{}-of-00002.fp16.bin"),
    ],
)
def test_shards(tmp_path, index, shard):
    save = torch.save if shard.endswith(".bin") else save_file
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


def safetensors(header: str | bytes, data: bytes = bytes(16)) -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype="F32", shape="[4]", offsets="[0, 16]") -> str:
    return f'{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}'


def broken(kind: str) -> bytes:
    whole = f'{{"x": {entry()}}}'
    return {
        "empty": b"",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        "garbage": b"\xff" * 64,
        "short": b"\x01\x02",
        "no header": safetensors(""),
        "not json": safetensors("{]{]"),
        "not text": safetensors(b'{"\xff": 1}'),
        "deep": safetensors("[" * 100_000),
        "a list": safetensors("[]"),
        "a number": safetensors('{"x": 3}'),
        "a number of metadata": safetensors(f'{{"__metadata__": 3, "x": {entry()}}}'),
        "no dtype": safetensors('{"x": {"shape": [4], "data_offsets": [0, 16]}}'),
        "a list as dtype": safetensors(whole.replace('"F32"', "[]")),
        "a number as shape": safetensors(f'{{"x": {entry(shape="4")}}}'),
        "a fraction in the shape": safetensors(f'{{"x": {entry(shape="[4.5]")}}}'),
        "a string in the shape": safetensors(whole.replace("[4]", '["4"]')),
        "true in the shape": safetensors(f'{{"x": {entry(shape="[4, true]")}}}'),
        "a negative shape": safetensors(f'{{"x": {entry(shape="[-2, -2]")}}}'),
        "NaN in the shape": safetensors(f'{{"x": {entry(shape="[NaN]")}}}'),
        "another shape": safetensors(f'{{"x": {entry(shape="[5]")}}}'),
        "one offset": safetensors(f'{{"x": {entry(offsets="[16]")}}}'),
        "offsets before the data": safetensors(f'{{"x": {entry(offsets="[-16, 0]")}}}'),
        "offsets backwards": safetensors(f'{{"x": {entry("F8_E4M3", "[4]", "[16, 0]")}}}'),
        "a gap": safetensors(f'{{"x": {entry(offsets="[16, 32]")}}}', bytes(32)),
        "an overlap": safetensors(f'{{"x": {entry()}, "y": {entry(offsets="[8, 24]")}}}', bytes(24)),
        "a name twice": safetensors(f'{{"x": {entry()}, "x": {entry(offsets="[16, 32]")}}}', bytes(32)),
        "more data": safetensors(whole, bytes(17)),
        "no data": safetensors(whole, bytes(15)),
        "half a header": safetensors(whole)[:20],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "is empty"),
        ("pointer", "git-lfs pointer.*git lfs pull"),
        ("garbage", "damaged"),
        ("no data", r"truncated: it has \d+ bytes of \d+"),
        ("half a header", "truncated"),
        *(
            (kind, "damaged")
            for kind in (
                *("short", "no header", "not json", "not text", "deep", "a list", "a number", "a number of metadata"),
                *("no dtype", "a list as dtype", "a number as shape", "a fraction in the shape", "another shape"),
                *("a string in the shape", "true in the shape", "a negative shape", "NaN in the shape", "one offset"),
                *("offsets before the data", "offsets backwards", "a gap", "an overlap", "a name twice", "more data"),
            )
        ),
    ],
)
def test_broken_safetensors(tmp_path, kind, message):
    (tmp_path / "model.safetensors").write_bytes(broken(kind))
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path)
        safetensors_metadata(tmp_path / "model.safetensors")


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
    torch.save({"optimizer": {"x": torch.zeros(2)}}, tmp_path / "training.pth")
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
    (tmp_path / "model.gguf").write_bytes(b"x")
    with pytest.raises(UserError, match="is not a weights file"):
        open_weights(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "index.json is empty"),
        ("{", "is not readable JSON"),
        (b"\xff", "is not readable JSON"),
        ("[" * 100_000, "is not readable JSON"),
        ('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}', "'x' twice"),
        ('{"metadata": NaN, "weight_map": NaN}', "is not a readable index"),
        ("[]", "does not map names to values"),
        ("{}", "is not a readable index"),
        ('{"weight_map": {}}', "is not a readable index"),
        ('{"weight_map": ["a.safetensors"]}', "is not a readable index"),
        ('{"weight_map": {"x": 3}}', "is not a readable index"),
        ('{"weight_map": {"x": null}}', "is not a readable index"),
        ('{"weight_map": {"x": "../outside.safetensors"}}', "is not a readable index"),
        ('{"weight_map": {"x": "inside/../../outside.safetensors"}}', "is not a readable index"),
        ('{"weight_map": {"x": "%s/outside.safetensors"}}', "is not a readable index"),
        ('{"weight_map": {"x": ".."}}', "lacks 1 of the 1 weight shards"),
        ('{"weight_map": {"x": ""}}', "lacks 1 of the 1 weight shards"),
        ('{"weight_map": {"x": "%s"}}' % ("x" * 300), "File name too long"),
        ('{"weight_map": {"x": "model.safetensors.index.json"}}', "is not a weights file"),
    ],
)
def test_a_broken_index(tmp_path, content, message):
    folder = tmp_path / "inside"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "outside.safetensors")
    content = content if isinstance(content, bytes) else content.replace("%s", str(tmp_path)).encode()
    (folder / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_weights(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for ending, save in ((".safetensors", save_file), (".bin", torch.save)):
        shards = [f"model-{i}{ending}" for i in (1, 2)]
        write_shards(tmp_path, f"model{ending}.index.json", shards, save)
        save({"scalar": torch.ones(())}, tmp_path / shards[0])
        with pytest.raises(UserError, match=f"model-2{ending} holds scalar, which another shard holds too"):
            open_weights(tmp_path)
        (tmp_path / f"model{ending}.index.json").unlink()


def test_what_may_not_be_read_is_a_sentence(tmp_path, monkeypatch):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "x.json").write_text("{}")

    def forbid(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    for name, read in (("model.safetensors", open_weights), ("x.json", read_json)):
        with monkeypatch.context() as patched:
            patched.setattr(pathlib.Path, "open", forbid)
            patched.setattr(pathlib.Path, "read_bytes", forbid)
            with pytest.raises(UserError, match=rf"{name} cannot be read \(Permission denied\)"):
                read(tmp_path / name)


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_an_exotic_dtype_fails_only_when_read(tmp_path, save):
    file = tmp_path / f"model{'.safetensors' if save is save_file else '.bin'}"
    save({"x": torch.zeros(2, dtype=torch.float8_e4m3fn)}, file)
    reader = open_weights(file)
    assert reader.shape("x") == (2,)
    with pytest.raises(UserError, match=r"model\..*: tensor x is stored as .*(F8_E4M3|float8_e4m3fn)"):
        reader.read("x")


def test_a_tensor_of_more_elements_than_the_file_has_is_refused(tmp_path):
    torch.save({"x": torch.zeros(1).expand(2**40)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth has 4398046511104 bytes of 'x' in less than that: it is damaged"):
        open_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")], ids=["sparse", "meta"])
def test_tensors_that_are_no_arrays_fail_only_when_read(tmp_path, tensor):
    torch.save({"x": tensor}, tmp_path / "model.bin")
    with pytest.raises(UserError, match="tensor x is stored as"):
        open_weights(tmp_path / "model.bin").read("x")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_integers_are_no_weights(tmp_path, dtype):
    torch.save({"x": torch.ones(2, dtype=dtype), "y": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "model.bin")
    reader = open_weights(tmp_path / "model.bin")
    with pytest.raises(UserError, match=f"tensor x is stored as {str(dtype).removeprefix('torch.')}"):
        read_floats(reader, "x")
    assert read_floats(reader, "y").dtype == ml_dtypes.bfloat16


def test_names_that_are_no_strings_are_refused(tmp_path):
    torch.save({3: torch.zeros(2)}, tmp_path / "model.bin")
    with pytest.raises(UserError, match="does not map names to tensors"):
        open_weights(tmp_path / "model.bin")
