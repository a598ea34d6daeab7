"""LoRA made by PEFT and by other programs, read here."""

import json
import re

import jax
import numpy as np
import peft
import pytest
import torch
from conftest import quick_jit, relative_error
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from safetensors.torch import load_file, save_file
from tiny_pipeline import CONFIGS, UNET
from tool import convert
from torch_forward import run_flax, run_torch
from torch_reference import flax_params, torch_unet

from osv_jax.convert.architectures import expected_params
from osv_jax.convert.lora_files import check_lora, is_lora, ranks, read_lora, write_diffusers, write_peft
from osv_jax.convert.naming import torch_name
from osv_jax.errors import UserError
from osv_jax.models.lora import merge_lora
from osv_jax.models.svd_unet import UNetConfig
from osv_jax.objectives.networks import build_networks
from osv_jax.objectives.options import LoRAOptions
from osv_jax.objectives.osv import OSVOptions
from osv_jax.objectives.osv_stage1 import Stage1
from osv_jax.objectives.random_networks import random_params
from osv_jax.training import origins, setup

SHAPES = expected_params("unet", UNET)
BLOCK = "mid_block.attentions.0.transformer_blocks.0"


@pytest.fixture(scope="module")
def base():
    return flax_params(torch_unet(UNET), "unet", UNET)


def foreign(folder, **options):
    """A UNet with a random LoRA of PEFT's, saved by PEFT in `folder`."""
    unet = peft.get_peft_model(torch_unet(UNET), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    unet.save_pretrained(folder)
    return unet.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"]},
        {"r": 4, "lora_alpha": 4, "target_modules": ["conv1", "conv2", "time_emb_proj", "conv_shortcut"]},
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["to_v", "conv1", "proj_in"]},
        {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": ["conv_in", "conv_out", "linear_1", "conv"],
            "rank_pattern": {"conv_in": 2, "down_blocks.0.downsamplers.0.conv": 3},
            "alpha_pattern": {"conv_in": 5, "^time_embedding.linear_1": 9},
        },
    ],
    ids=["attention", "resnets", "rslora", "patterns"],
)
def test_an_adapter_of_peft_does_here_what_it_does_there(base, options, tmp_path):
    expected = run_torch(foreign(tmp_path, **options))
    read = read_lora(tmp_path, SHAPES)
    check_lora(read.lora, SHAPES, tmp_path)
    assert relative_error(run_flax({"params": merge_lora(base, read.lora)}), expected) <= 2e-4
    assert relative_error(run_flax({"params": base}), expected) > 1e-2


def test_cross_attention_q_and_k_are_left_out_with_a_notice(tmp_path, capsys):
    foreign(tmp_path / "theirs", r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"])
    read = read_lora(tmp_path / "theirs", SHAPES)
    # Each attention has a spatial and a temporal block with attn1 (q, k, v) and attn2 (of which v stays).
    attentions = sum(path[-2:] == ("proj_in", "kernel") for path in SHAPES)
    assert len(read.dropped) == 4 * attentions and len(ranks(read.lora)) == 8 * attentions
    assert all(re.search(r"attn2\.to_[qk]$", module) for module in read.dropped)
    arguments = ["import-lora", str(tmp_path / "theirs"), str(tmp_path / "ours")]
    tiny_weights(tmp_path / "weights")
    assert convert([*arguments, f"--weights={tmp_path / 'weights'}"]) == 0
    notice = capsys.readouterr().out
    assert f"{4 * attentions} cross-attention q and k projections were left out" in notice and "no effect" in notice
    again = read_lora(tmp_path / "ours", SHAPES)
    assert again.notice == "" and ranks(again.lora) == ranks(read.lora)


def tiny_weights(folder):
    from osv_jax.convert.weights import save_component

    params = random_params(unflatten_dict(expected_params("unet", UNET)), 0, np.float32)
    save_component(folder / "unet", "unet", UNET, params, folder)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A PEFT folder with alpha 6 and rank 4, its tensors under bare module names, and what is read from it."""
    folder = tmp_path_factory.mktemp("adapter")
    foreign(folder, r=4, lora_alpha=6, target_modules=["to_v", "conv1", "proj_in"])
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    return folder, tensors, read_lora(folder, SHAPES)


def with_alphas(tensors):
    modules = {name.rsplit(".lora_", 1)[0] for name in tensors}
    return tensors | {f"{module}.alpha": torch.tensor(6.0) for module in modules}


def down_and_up(tensors, separator):
    renamed = {}
    for name, tensor in tensors.items():
        renamed[name.replace("lora_A", f"lora{separator}down").replace("lora_B", f"lora{separator}up")] = tensor
    return renamed


def prefixed(tensors, prefix="unet."):
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "spell",
    [
        lambda tensors: with_alphas(tensors),
        lambda tensors: prefixed(with_alphas(tensors)),
        lambda tensors: prefixed(down_and_up(with_alphas(tensors), ".")),
        lambda tensors: down_and_up(with_alphas(tensors), "_"),
        lambda tensors: {name.replace(".weight", ".default.weight"): t for name, t in with_alphas(tensors).items()},
    ],
    ids=["peft", "prefix", "diffusers", "underscores", "adapter name"],
)
def test_bare_files_in_every_spelling_are_the_same_lora(adapter, spell, tmp_path):
    _, tensors, expected = adapter
    save_file(spell(tensors), tmp_path / "lora.safetensors")
    assert_same(read_lora(tmp_path / "lora.safetensors", SHAPES), expected)


def assert_same(read, expected):
    actual, expected = flatten_dict(read.lora), flatten_dict(expected.lora)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(actual[path], leaf, err_msg="/".join(path))


def test_alpha_in_the_metadata_of_diffusers_counts_and_without_any_alpha_is_the_rank(adapter, tmp_path):
    _, tensors, expected = adapter
    file = tmp_path / "lora.safetensors"
    # As diffusers' `save_lora_weights` with `unet_lora_adapter_metadata` writes it, and as `save_lora_adapter` does.
    for fields in ({"unet.r": 4, "unet.lora_alpha": 6, "text_encoder.r": 8}, {"r": 4, "lora_alpha": 6}):
        save_file(prefixed(tensors), file, {"lora_adapter_metadata": json.dumps(fields)})
        assert_same(read_lora(file, SHAPES), expected)
    save_file(prefixed(tensors), file)
    unscaled = jax.tree.map_with_path(lambda p, x: x / np.float32(1.5) if p[-1].key == "b" else x, expected.lora)
    for path, leaf in flatten_dict(read_lora(file, SHAPES).lora).items():
        np.testing.assert_allclose(leaf, flatten_dict(unscaled)[path], rtol=1e-5)


def test_half_precision_files_are_read_as_float32(adapter, tmp_path):
    _, tensors, expected = adapter
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in with_alphas(tensors).items()}
    save_file(halves, tmp_path / "lora.safetensors")
    read = read_lora(tmp_path / "lora.safetensors", SHAPES)
    for path, leaf in flatten_dict(read.lora).items():
        assert leaf.dtype == np.float32
        # Rounded once, by 0.2 % at most.
        assert 0 < relative_error(leaf, flatten_dict(expected.lora)[path]) < 4e-3


def test_different_ranks_survive_both_formats(base, tmp_path):
    options = {"lora_alpha": 4, "rank_pattern": {"conv_in": 2}, "target_modules": ["conv_in", "proj_in"]}
    expected = run_torch(foreign(tmp_path / "theirs", r=4, **options))
    read = read_lora(tmp_path / "theirs", SHAPES)
    (tmp_path / "ours").mkdir()
    write_peft(tmp_path / "ours", read.lora)
    write_diffusers(tmp_path / "ours.safetensors", read.lora)
    for written in ("ours", "ours.safetensors"):
        assert_same(read_lora(tmp_path / written, SHAPES), read)
    unet = peft.PeftModel.from_pretrained(torch_unet(UNET), tmp_path / "ours")
    assert relative_error(run_torch(unet), expected) <= 1e-5


def refused(path):
    with pytest.raises(UserError) as error:
        read_lora(path, SHAPES)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_keys_that_match_nothing_are_listed(adapter, tmp_path):
    _, tensors, _ = adapter
    strange = {f"down_blocks.9.attentions.{i}.proj_in.lora_A.weight": torch.zeros(4, 32) for i in range(7)}
    strange |= {f"text_model.layers.{i}.q_proj.lora_A.weight": torch.zeros(4, 32) for i in range(5)}
    save_file(tensors | strange, tmp_path / "lora.safetensors")
    sentence = refused(tmp_path / "lora.safetensors")
    assert "12 keys that match nothing in this UNet (down_blocks.9.attentions.0.proj_in.lora_A.weight," in sentence
    assert "text_model.layers.2.q_proj.lora_A.weight, ...)" in sentence
    assert "text_model.layers.3" not in sentence  # Ten are shown.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{BLOCK}.attn2.to_v.lora_A.weight": None}, ["1 modules with only one of A and B", f"{BLOCK}.attn2.to_v"]),
        ({f"{BLOCK}.attn2.to_v.lora_B.weight": torch.zeros(32, 3)}, ["ranks of A and B", "are 4 and 3"]),
        ({f"{BLOCK}.attn2.to_v.lora_A.weight": torch.zeros(4, 9)}, ["1 modules of other sizes", "attn2.to_v"]),
        ({f"{BLOCK}.attn2.to_v.lora_B.weight": torch.zeros(33, 4)}, ["1 modules of other sizes", "attn2.to_v"]),
        ({f"{BLOCK}.attn2.to_v.lora_A.weight": torch.zeros(())}, ["attn2.to_v has rank 0"]),
        ({f"{BLOCK}.attn2.to_v.lora_B.weight": torch.zeros(32)}, ["1 modules of other sizes", "attn2.to_v"]),
        (
            {
                f"{BLOCK}.attn2.to_v.lora_A.weight": torch.zeros(0, 8),
                f"{BLOCK}.attn2.to_v.lora_B.weight": torch.zeros(32, 0),
            },
            ["attn2.to_v has rank 0"],
        ),
        ({f"{BLOCK}.attn2.to_v.lora_magnitude_vector": torch.zeros(32)}, ["1 keys", "lora_magnitude_vector"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(adapter, change, words, tmp_path):
    tensors = {name: tensor for name, tensor in (adapter[1] | change).items() if tensor is not None}
    save_file(tensors, tmp_path / "lora.safetensors")
    sentence = refused(tmp_path / "lora.safetensors")
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "alpha"])
def test_values_that_are_not_finite_are_named(adapter, part, value, tmp_path):
    tensors = with_alphas(adapter[1])
    name = f"{BLOCK}.attn2.to_v.{part}"
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] = value
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    words = f"={value} must be a finite number above 0" if part == "alpha" else " has values that are NaN or infinite"
    assert f"{file}: {name}{words}" in refused(file)


@pytest.mark.parametrize("alpha", [torch.tensor(0.0), torch.tensor(-6.0), torch.ones(2), torch.zeros(0)])
def test_an_alpha_among_the_tensors_is_one_number_above_zero(adapter, alpha, tmp_path):
    save_file(with_alphas(adapter[1]) | {f"{BLOCK}.attn2.to_v.alpha": alpha}, tmp_path / "lora.safetensors")
    assert f"{BLOCK}.attn2.to_v.alpha" in refused(tmp_path / "lora.safetensors")
    save_file(
        with_alphas(adapter[1]) | {f"{BLOCK}.attn2.to_v.alpha": torch.full((1,), 6.0)}, tmp_path / "lora.safetensors"
    )
    assert_same(read_lora(tmp_path / "lora.safetensors", SHAPES), adapter[2])


def test_codes_of_a_quantised_lora_are_refused(adapter, tmp_path):
    name = f"{BLOCK}.attn2.to_v.lora_A.weight"
    save_file(adapter[1] | {name: adapter[1][name].to(torch.int8)}, tmp_path / "lora.safetensors")
    assert f"tensor {name} is stored as int8" in refused(tmp_path / "lora.safetensors")


def test_an_alpha_said_twice_is_refused(adapter, tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 6})}
    save_file(with_alphas(adapter[1]), tmp_path / "lora.safetensors", metadata)
    assert "has an alpha among the tensors and one in its config" in refused(tmp_path / "lora.safetensors")


def test_what_is_no_lora_is_refused(tmp_path):
    assert "does not exist" in refused(tmp_path / "nothing")
    assert "holds no LoRA" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    assert "is of a LOHA adapter" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"\xff{}")
    assert "is not readable JSON" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    assert "is not readable JSON" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    assert "does not map" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "adapter_model.bin does not exist" in refused(tmp_path)
    (tmp_path / "short.safetensors").write_bytes(b"\1\0\0\0\0\0\0\0{")
    assert "damaged" in refused(tmp_path / "short.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    assert "has no LoRA in it" in refused(tmp_path / "empty.safetensors")


def test_a_lora_of_another_unet_is_refused():
    lora = {"nowhere": {"a": np.zeros((4, 2)), "b": np.zeros((2, 4))}, "conv_in": {"a": np.zeros((8, 2)), "b": 0}}
    lora["conv_in"]["b"] = np.zeros((2, 32))
    with pytest.raises(UserError) as error:
        check_lora(lora, SHAPES, "runs/x")
    sentence = str(error.value)
    assert "runs/x does not fit" in sentence and "1 modules that this UNet does not have (nowhere)" in sentence
    assert "1 modules of other sizes (conv_in)" in sentence


def test_import_is_for_the_released_unet_by_default(tmp_path, capsys):
    """A LoRA of the full-size UNet needs no weights to be checked."""
    shape = expected_params("unet", UNetConfig())[("mid_block", "attentions_0", "proj_in", "kernel")].shape
    tensors = {"lora_A": torch.ones(8, shape[0]), "lora_B": torch.ones(shape[1], 8)}
    name = torch_name(("mid_block", "attentions_0", "proj_in", "kernel")).removesuffix("weight")
    save_file({f"{name}{half}.weight": t for half, t in tensors.items()}, tmp_path / "lora.safetensors")
    arguments = ["import-lora", str(tmp_path / "lora.safetensors"), str(tmp_path / "out")]
    assert convert(arguments) == 0
    assert "1 modules of rank 8" in capsys.readouterr().out
    assert is_lora(tmp_path / "out") and is_lora(tmp_path / "lora.safetensors") and not is_lora(tmp_path)
    assert convert(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    tensors["lora_B"][5, 3] = np.nan
    save_file({f"{name}{half}.weight": t for half, t in tensors.items()}, tmp_path / "lora.safetensors")
    assert convert([*arguments, "--overwrite"]) == 2
    told = capsys.readouterr().err
    assert f"{name}lora_B.weight has values that are NaN or infinite" in told and told.count("\n") == 1
    assert is_lora(tmp_path / "out")


@pytest.fixture(scope="module")
def networks():
    return build_networks(CONFIGS, discriminator_blocks=(0, 1))


def training_config(**changes):
    """What matters here of a run with LoRA of rank 4 and alpha 8."""
    chosen = {"rank": 4, "alpha": 8.0, "targets": "all"} | changes
    return ConfigDict({"lora": chosen, "trainable": ("lora",)})


@pytest.mark.integration
def test_training_starts_from_a_foreign_lora(base, adapter, networks):
    folder, _, read = adapter
    config = training_config()
    objective = Stage1(networks, OSVOptions(lora=LoRAOptions(**config.lora)))
    state = quick_jit(setup.make_init(objective))(jax.random.key(0), {"unet": base})
    given = origins.read_lora(folder, config, networks)
    begun = origins.start_from_lora(given.lora, config, state, objective)
    expected = run_flax({"params": merge_lora(base, read.lora)})
    # Under this run's own alpha / rank = 2, the student is what the file says, and so is its EMA.
    student = run_flax(begun.players["student"].params.variables(base, 2.0))
    assert relative_error(student, expected) <= 1e-5
    jax.tree.map(np.testing.assert_array_equal, begun.players["student"].ema, begun.players["student"].params)
    # Modules that the file lacks train from where they would have started.
    assert ranks(begun.players["student"].params.lora) == ranks(state.players["student"].params.lora)
    own, other = (flatten_dict(s.players["student"].params.lora) for s in (state, begun))
    lacking = ("mid_block", "resnets_0", "spatial_res_block", "conv2", "a")
    np.testing.assert_array_equal(other[lacking], own[lacking])
    jax.tree.map(np.testing.assert_array_equal, begun.players["disc"], state.players["disc"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 16}, ["LoRA of rank 4", "config.lora.rank=16"]),
        ({"targets": "attention"}, ["config.lora.targets='attention'", "conv1", "lost"]),
    ],
)
def test_training_that_would_lose_a_part_of_the_lora_is_refused(adapter, networks, changes, words):
    with pytest.raises(UserError) as error:
        origins.read_lora(adapter[0], training_config(**changes), networks)
    assert all(word in str(error.value) for word in words), str(error.value)
