"""Every field of PEFT's LoraConfig does here what it does there, or is refused by name."""

import dataclasses
import json
import shutil

import numpy as np
import peft
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from torch_reference import randomise

from osv_jax.convert import adapter_config
from osv_jax.convert.adapter_config import AdapterConfig
from osv_jax.convert.lora_files import read_lora, torch_tensors
from osv_jax.convert.naming import module_path, to_flax
from osv_jax.errors import UserError

MODULES = ["to_v", "conv1", "proj_in"]
ON = {
    "use_dora": True,
    "bias": "lora_only",
    "modules_to_save": ["conv_out"],
    "lora_bias": True,
    "layer_replication": [[0, 4], [2, 5]],
    "target_parameters": ["conv_in.weight"],
    "trainable_token_indices": {"embed_tokens": [0]},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "velora_config": {"num_groups": 64},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 8},
    "megatron_config": {"num_layers": 2},
}


class Block(torch.nn.Module):
    """Modules of a UNet's kinds and names."""

    def __init__(self):
        super().__init__()
        attention = {"to_v": (8, 6), "proj_in": (6, 6)}
        self.attentions = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: torch.nn.Linear(*sizes) for name, sizes in attention.items()}) for _ in range(2)
        )
        self.conv1 = torch.nn.Conv2d(5, 7, 3)
        self.temporal = torch.nn.ModuleDict({"conv1": torch.nn.Conv3d(7, 5, (3, 1, 1))})


def make_network():
    return randomise(torch.nn.ModuleDict({"up_blocks": torch.nn.ModuleList(Block() for _ in range(3))}))


BASE = {name: x.numpy() for name, x in make_network().state_dict().items() if name.endswith("weight")}
_PATHS = {name: (*module_path(name.removesuffix(".weight")), "kernel") for name in BASE}
SHAPES = {path: to_flax(path, BASE[name]) for name, path in _PATHS.items()}


def train(network):
    """Random changes of the LoRA, as if it were trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def make_adapter(folder, **options):
    network = peft.get_peft_model(make_network(), peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | options))
    train(network)
    network.save_pretrained(folder)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    make_adapter(folder, target_modules=MODULES)
    return folder


@pytest.fixture(params=["adapter_config.json", "metadata"])
def edited(adapter, tmp_path, request):
    """The adapter with changes in its config: PEFT's file, or what diffusers' pipelines keep beside the tensors."""
    config = json.loads((adapter / "adapter_config.json").read_text())

    def edit(keep=tuple(config), **changes):
        fields = {name: config[name] for name in keep} | changes
        if request.param == "adapter_config.json":
            shutil.copy(adapter / "adapter_model.safetensors", tmp_path)
            (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
            return tmp_path
        text = json.dumps({f"unet.{name}": value for name, value in fields.items()})
        tensors = load_file(adapter / "adapter_model.safetensors")
        tensors = {name.replace("base_model.model.", "unet.", 1): x for name, x in tensors.items()}
        save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": text})
        return tmp_path / "lora.safetensors"

    return edit


def assert_merged_alike(network, folder):
    """What is added to the kernels is what PEFT adds when it merges."""
    merged = network.merge_and_unload().state_dict()
    tensors = torch_tensors(read_lora(folder, SHAPES).lora)
    modules = set()
    for name, kernel in BASE.items():
        module, added = name.removesuffix(".weight"), merged[name].numpy() - kernel
        if f"{module}.lora_A.weight" not in tensors:
            np.testing.assert_array_equal(added, 0, err_msg=module)
            continue
        a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        ours = (b.reshape(len(b), -1) @ a.reshape(len(a), -1)).reshape(kernel.shape)
        # Of what float32 leaves of the kernel, from which the difference is taken.
        np.testing.assert_allclose(ours, added, rtol=0, atol=1e-5 * np.abs(kernel).max(), err_msg=module)
        assert np.abs(added).max() > 0.1 * np.abs(kernel).max()
        modules.add(module)
    assert modules


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.1, "target_modules": MODULES, "ensure_weight_tying": False},
        {
            "use_rslora": True,
            "target_modules": MODULES,
            "rank_pattern": {"proj_in": 2},
            "alpha_pattern": {"conv1": 5.5},
        },
        {"target_modules": r"up_blocks.*\.(to_v|temporal\.conv1)"},
        {"target_modules": MODULES, "exclude_modules": ["conv1", "up_blocks.0.attentions.0.proj_in"]},
        {"target_modules": MODULES, "exclude_modules": r".*temporal.*"},
        {"target_modules": MODULES, "layers_to_transform": [1]},
        {"target_modules": MODULES, "layers_to_transform": 0, "layers_pattern": "attentions"},
        {"target_modules": MODULES, "layers_to_transform": [0, 2], "layers_pattern": ["no_blocks", "up_blocks"]},
        {"target_modules": ["conv1"], "fan_in_fan_out": True},
        {"target_modules": MODULES, "init_lora_weights": False},
        {"target_modules": MODULES, "init_lora_weights": "gaussian"},
        {"target_modules": ["to_v"], "init_lora_weights": "orthogonal"},
        {"target_modules": ["to_v", "proj_in"], "init_lora_weights": "mica"},
    ],
    ids=lambda options: ",".join(options),
)
def test_honoured_fields_do_what_they_do_in_peft(options, tmp_path):
    make_adapter(tmp_path, **options)
    assert_merged_alike(peft.PeftModel.from_pretrained(make_network(), tmp_path), tmp_path)


@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_beside_changed_kernels_are_refused_until_peft_has_converted_them(init, tmp_path):
    options = {"target_modules": ["to_v", "proj_in"], "init_lora_weights": init}
    network = peft.get_peft_model(make_network(), peft.LoraConfig(r=4, lora_alpha=6, **options))
    network.save_pretrained(tmp_path / "initial")
    train(network)
    network.save_pretrained(tmp_path / "trained")
    with pytest.raises(UserError, match=f"init_lora_weights='{init}'.*path_initial_model_for_weight_conversion"):
        read_lora(tmp_path / "trained", SHAPES)
    initial = str(tmp_path / "initial")
    network.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=initial)
    assert_merged_alike(network, tmp_path / "converted")


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga", "Olora", "of another version", 3])
def test_other_initialisations_are_refused(edited, init):
    with pytest.raises(UserError, match=f"init_lora_weights={init!r}, with which the adapter is for kernels"):
        read_lora(edited(init_lora_weights=init), SHAPES)


@pytest.mark.parametrize("init", [None, "eva", "Gaussian"])
def test_initialisations_that_leave_the_kernels_alone_are_read(edited, init):
    assert read_lora(edited(init_lora_weights=init), SHAPES).lora


@pytest.mark.parametrize("name", [*ON, "of_another_version"])
def test_a_field_that_makes_more_than_a_lora_is_refused_by_name_where_it_is_on(edited, name):
    with pytest.raises(UserError, match=f"has {name}=.*merge_and_unload") as error:
        read_lora(edited(**{name: ON.get(name, 1)}), SHAPES)
    assert "\n" not in str(error.value)
    for off in (None, "none") if name == "bias" else (None, False, [], {}):
        assert read_lora(edited(**{name: off}), SHAPES).lora


def test_every_field_of_peft_is_known():
    known = {field.name for field in dataclasses.fields(AdapterConfig)} | adapter_config._NO_EFFECT | ON.keys()
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} == known | {"init_lora_weights"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_alpha": None}, "lora_alpha=None must be a finite number above 0"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be"),
        ({"lora_alpha": -6}, "lora_alpha=-6 must be"),
        ({"lora_alpha": "6"}, "lora_alpha='6' must be"),
        ({"lora_alpha": True}, "lora_alpha=True must be"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan must be"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf must be"),
        ({"lora_alpha": 1e300}, "times alpha / rank = 2.5e"),
        ({"r": None}, "r=None must be a whole number of at least 1"),
        ({"r": 0}, "r=0 must be"),
        ({"r": -4}, "r=-4 must be"),
        ({"r": 4.5}, "r=4.5 must be"),
        ({"r": "4"}, "r='4' must be"),
        ({"r": 8}, "has rank 4, but 8 by its config"),
        ({"rank_pattern": {"proj_in": 3}}, "proj_in has rank 4, but 3 by its config"),
        ({"rank_pattern": {"proj_in": 0}}, "rank_pattern: proj_in=0 must be"),
        ({"rank_pattern": [4]}, "rank_pattern=[4] must map"),
        ({"alpha_pattern": {"proj_in": None}}, "alpha_pattern: proj_in=None must be"),
        ({"alpha_pattern": {"proj_in(": 4}}, "no regular expression"),
        ({"use_rslora": "false"}, "use_rslora='false' must be true or false"),
        ({"target_modules": 3}, "target_modules=3 must be names of modules"),
        ({"target_modules": ["to_v", 3]}, "must be names of modules"),
        ({"target_modules": "(to_v"}, "no regular expression"),
        ({"exclude_modules": ["proj_in"]}, "modules that its config leaves out (up_blocks.0.attentions.0.proj_in"),
        ({"target_modules": ["to_v", "conv1"]}, "modules that its config leaves out"),
        ({"layers_to_transform": [3]}, "modules that its config leaves out"),
        ({"layers_to_transform": "3"}, "layers_to_transform='3' must be numbers of layers"),
        ({"layers_pattern": [3]}, "layers_pattern=[3] must be names of modules"),
        ({"layers_to_transform": 0, "layers_pattern": "["}, "no regular expression"),
        ({"peft_type": "ADALORA"}, "is of a ADALORA adapter"),
    ],
)
def test_values_that_no_lora_has_are_refused(edited, changes, words):
    with pytest.raises(UserError) as error:
        read_lora(edited(**changes), SHAPES)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_a_config_does_not_say_is_as_in_peft(edited):
    path = ("up_blocks_0", "attentions_0", "proj_in", "b")
    unsaid = flatten_dict(read_lora(edited(["peft_type", "r"]), SHAPES).lora)[path]
    said = flatten_dict(read_lora(edited(lora_alpha=peft.LoraConfig().lora_alpha), SHAPES).lora)[path]
    np.testing.assert_array_equal(unsaid, said)
