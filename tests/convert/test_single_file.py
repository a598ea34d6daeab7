"""Stability's names and single files: the released names, the first stage's encoder, and what is refused."""

import hashlib
import json
import re

import numpy as np
import pytest
import tiny
import torch
from conftest import relative_error
from diffusers import UNetSpatioTemporalConditionModel
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_pipeline import UNET

from osv_jax.convert.architectures import expected_params
from osv_jax.convert.lora_files import write_comfyui, write_kohya
from osv_jax.convert.naming import flax_shape_to_torch, torch_name
from osv_jax.convert.single_file import plan_single_file, write_single_file
from osv_jax.convert.stability_names import file_names
from osv_jax.errors import UserError
from osv_jax.models.clip_vision import CLIPVisionConfig
from osv_jax.models.lora import without_effect
from osv_jax.models.svd_unet import UNetConfig
from osv_jax.models.svd_vae import VAEConfig
from osv_jax.objectives.random_networks import random_params

UNET_NAME, CLIP_NAME = "model.diffusion_model.", "conditioner.embedders.0.open_clip.model.visual."
# Tensors of svd.safetensors, and what diffusers and transformers call them.
RELEASED = {
    "unet": {
        f"{UNET_NAME}time_embed.0.weight": "time_embedding.linear_1.weight",
        f"{UNET_NAME}label_emb.0.2.bias": "add_embedding.linear_2.bias",
        f"{UNET_NAME}input_blocks.0.0.weight": "conv_in.weight",
        f"{UNET_NAME}input_blocks.1.0.in_layers.2.weight": "down_blocks.0.resnets.0.spatial_res_block.conv1.weight",
        f"{UNET_NAME}input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
        f"{UNET_NAME}input_blocks.4.0.skip_connection.weight": (
            "down_blocks.1.resnets.0.spatial_res_block.conv_shortcut.weight"
        ),
        f"{UNET_NAME}input_blocks.5.0.time_mixer.mix_factor": "down_blocks.1.resnets.1.time_mixer.mix_factor",
        f"{UNET_NAME}input_blocks.8.1.time_stack.0.attn2.to_v.weight": (
            "down_blocks.2.attentions.1.temporal_transformer_blocks.0.attn2.to_v.weight"
        ),
        f"{UNET_NAME}input_blocks.11.0.time_stack.emb_layers.1.weight": (
            "down_blocks.3.resnets.1.temporal_res_block.time_emb_proj.weight"
        ),
        f"{UNET_NAME}middle_block.1.time_pos_embed.2.weight": "mid_block.attentions.0.time_pos_embed.linear_2.weight",
        f"{UNET_NAME}middle_block.2.out_layers.3.bias": "mid_block.resnets.1.spatial_res_block.conv2.bias",
        f"{UNET_NAME}output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
        f"{UNET_NAME}output_blocks.5.2.conv.weight": "up_blocks.1.upsamplers.0.conv.weight",
        f"{UNET_NAME}output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight": (
            "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj.weight"
        ),
        f"{UNET_NAME}out.2.weight": "conv_out.weight",
    },
    "vae": {
        "conditioner.embedders.3.encoder.encoder.down.1.block.0.nin_shortcut.weight": (
            "encoder.down_blocks.1.resnets.0.conv_shortcut.weight"
        ),
        "conditioner.embedders.3.encoder.encoder.down.2.downsample.conv.bias": (
            "encoder.down_blocks.2.downsamplers.0.conv.bias"
        ),
        "conditioner.embedders.3.encoder.encoder.mid.attn_1.proj_out.weight": (
            "encoder.mid_block.attentions.0.to_out.0.weight"
        ),
        "conditioner.embedders.3.encoder.quant_conv.weight": "quant_conv.weight",
        "first_stage_model.decoder.conv_out.time_mix_conv.weight": "decoder.time_conv_out.weight",
        "first_stage_model.decoder.mid.block_1.mix_factor": "decoder.mid_block.resnets.0.time_mixer.mix_factor",
        "first_stage_model.decoder.norm_out.weight": "decoder.conv_norm_out.weight",
        "first_stage_model.decoder.up.0.block.2.time_stack.out_layers.3.weight": (
            "decoder.up_blocks.3.resnets.2.temporal_res_block.conv2.weight"
        ),
        "first_stage_model.decoder.up.3.upsample.conv.weight": "decoder.up_blocks.0.upsamplers.0.conv.weight",
    },
    "image_encoder": {
        f"{CLIP_NAME}positional_embedding": "vision_model.embeddings.position_embedding.weight",
        f"{CLIP_NAME}conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        f"{CLIP_NAME}ln_pre.weight": "vision_model.pre_layrnorm.weight",
        f"{CLIP_NAME}transformer.resblocks.31.mlp.c_fc.weight": "vision_model.encoder.layers.31.mlp.fc1.weight",
        f"{CLIP_NAME}transformer.resblocks.7.attn.in_proj_bias": "vision_model.encoder.layers.7.self_attn.q_proj.bias",
        f"{CLIP_NAME}proj": "visual_projection.weight",
    },
}
# How many tensors the released file has for each.
COUNTS = {"unet": 1428, "vae": 374, "image_encoder": 392}
# Of all their names, sorted and a line each, as DiffSynth-Studio lists them one by one to read the released file and
# nobody made them by a rule: `from_civitai` in diffsynth/models/svd_*.py of diffsynth 1.1.7 on PyPI (Apache-2.0).
SHA256 = {
    "unet": "281ec0cd2d50e45ad350b6e7c707d769c35f8f5947d39f9d0546795e2c27a7c1",
    "vae": "2ff2157eea3fc7da0e12c281b5b69d1a468c15354d2cc240d11c3aedbef9065f",
    "image_encoder": "597069c71341cf4cf373637430db382aacdfd862e54a2db6909be3ad27d9257d",
}
CONFIGS = tiny.CONFIGS | {"unet": UNET}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A single file of tiny networks, with a decoder and an encoder that nothing reads, as the released one has."""
    file = tmp_path_factory.mktemp("single") / "svd.safetensors"
    networks = {}
    for name in COUNTS:
        shapes = unflatten_dict(expected_params(name, CONFIGS[name]))
        networks[name] = CONFIGS[name], random_params(shapes, 0, np.float32)
    write_single_file(file, networks, "float32")
    return file, networks


@pytest.mark.parametrize("component", COUNTS)
def test_the_released_names(component):
    config = {"unet": UNetConfig(), "vae": VAEConfig(), "image_encoder": CLIPVisionConfig()}[component]
    where = file_names(component, map(torch_name, expected_params(component, config)))
    names = sorted({name for name, _, _ in where.values()})
    assert len(names) == COUNTS[component]
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == SHA256[component]
    for name, ours in RELEASED[component].items():
        assert where[ours][0] == name
    packed = [part for _, part, parts in where.values() if parts == 3]
    assert packed.count(0) == packed.count(1) == packed.count(2) == (64 if component == "image_encoder" else 0)


def full_lora():
    """Of rank 1, for every layer of the released UNet that a LoRA has an effect in; it holds nothing."""
    shapes = expected_params("unet", UNetConfig())
    layers = {path[:-1] for path in shapes if path[-1] == "kernel"}
    lora = {}
    for path in sorted(layers - without_effect(layers)):
        *window, features = shapes[(*path, "kernel")].shape
        lora[(*path, "a")] = np.broadcast_to(np.float32(0), (*window, 1))
        lora[(*path, "b")] = np.broadcast_to(np.float32(0), (1, features))
    return shapes, unflatten_dict(lora)


def modules_of(file, layers):
    """Modules of a file that has a LoRA for each of so many layers, as kohya's scripts and ComfyUI read it."""
    tensors = load_file(file)
    modules = {name.split(".", 1)[0] for name in tensors}
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(tensors) == {f"{module}.{part}" for module in modules for part in parts}
    assert len(modules) == layers, "two layers have one name"
    return modules, tensors


def test_comfyui_knows_every_key_of_a_lora(tmp_path):
    """It makes `lora_unet_` keys of the names of a checkpoint's weights, with `_` for `.` (its comfy/lora.py)."""
    shapes, lora = full_lora()
    write_comfyui(tmp_path / "lora.safetensors", lora, shapes)
    layers = {path[:-1] for path in flatten_dict(lora)}
    modules, tensors = modules_of(tmp_path / "lora.safetensors", len(layers))
    stored = file_names("unet", map(torch_name, shapes))
    known = {}
    for path, leaf in shapes.items():
        name = stored[torch_name(path)][0].removeprefix("model.")
        if name.endswith(".weight"):
            size = flax_shape_to_torch(path, leaf.shape)
            known[f"lora_unet_{name.removeprefix('diffusion_model.').removesuffix('.weight').replace('.', '_')}"] = size
    assert modules <= known.keys()
    for module in modules:
        up, down = tensors[f"{module}.lora_up.weight"].shape, tensors[f"{module}.lora_down.weight"].shape
        # Their product, reshaped as it is there, is the weight.
        assert up[0] * np.prod(down[1:]) == np.prod(known[module]) and up[0] == known[module][0]
    # Left out are layers of one number or vector, and what has no effect.
    left = {module for module in known.keys() - modules if len(known[module]) > 1}
    assert left and all(re.search(r"_attn2_to_[qk]$", module) for module in left)


def test_every_key_of_a_lora_for_kohya_is_of_a_layer_of_diffusers(tmp_path):
    """Its scripts name a layer after where it stands in diffusers' network (`LoRANetwork` in networks/lora.py)."""
    _, lora = full_lora()
    write_kohya(tmp_path / "lora.safetensors", lora)
    layers = {path[:-1] for path in flatten_dict(lora)}
    modules, _ = modules_of(tmp_path / "lora.safetensors", len(layers))
    with torch.device("meta"):
        network = UNetSpatioTemporalConditionModel()
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    known = {f"lora_unet_{n.replace('.', '_')}" for n, layer in network.named_modules() if isinstance(layer, kinds)}
    assert modules <= known
    left = known - modules
    assert left and all(re.search(r"_attn2_to_[qk]$", module) for module in left)


def test_the_first_stage_has_quant_conv_in_its_encoder(file):
    """Its last convolution is two of the condition's encoder, one after the other."""
    tensors, x = load_file(file[0]), torch.randn(1, 32, 5, 6, generator=torch.Generator().manual_seed(0))
    assert not any(name.startswith("first_stage_model.quant_conv") for name in tensors)

    def convolved(x, name, padding):
        weight, bias = (torch.tensor(tensors[f"{name}.{kind}"]) for kind in ("weight", "bias"))
        return torch.nn.functional.conv2d(x, weight, bias, padding=padding)

    condition = "conditioner.embedders.3.encoder"
    expected = convolved(convolved(x, f"{condition}.encoder.conv_out", 1), f"{condition}.quant_conv", 0)
    assert relative_error(convolved(x, "first_stage_model.encoder.conv_out", 1), expected) <= 1e-5
    encoder = {
        name.removeprefix(f"{condition}.encoder.") for name in tensors if name.startswith(f"{condition}.encoder.")
    }
    first = {
        name.removeprefix("first_stage_model.encoder.") for name in tensors if "first_stage_model.encoder." in name
    }
    assert encoder == first


def test_what_nothing_reads_may_be_there(file, tmp_path):
    more = {
        f"conditioner.embedders.{name}": np.ones(3, np.float32) for name in ("3.encoder.post_quant_conv.bias", "0.x")
    }
    save_file(load_file(file[0]) | more, tmp_path / "svd.safetensors", metadata(file[0]))
    assert [plan.component for plan in plan_single_file(tmp_path / "svd.safetensors")] == list(COUNTS)


def metadata(file):
    with safe_open(file, "numpy") as opened:
        return opened.metadata()


def edited(file, target, drop=(), sizes=None):
    tensors = {name: x for name, x in load_file(file).items() if not name.startswith(tuple(drop) or ("-",))}
    save_file(tensors, target, {} if sizes is None else {"osv_jax": json.dumps(sizes)})
    return target


def test_a_file_of_others_has_the_released_sizes(file, tmp_path):
    with pytest.raises(UserError, match=r"does not match its unet config: .*misshapen"):
        plan_single_file(edited(file[0], tmp_path / "svd.safetensors"), ["unet"])


@pytest.mark.parametrize(("name", "frames"), [("svd.safetensors", 14), ("svd_xt_1_1.safetensors", 25)])
def test_frames_are_told_by_the_files_name(name, frames, tmp_path, monkeypatch):
    """One tensor with the UNet's prefix is enough to be asked for its parameters."""
    save_file({f"{UNET_NAME}out.2.bias": np.zeros(4, np.float32)}, tmp_path / name)
    asked = []

    class Enough(Exception):
        pass

    def expected(component, config):
        asked.append(config)
        raise Enough

    monkeypatch.setattr("osv_jax.convert.single_file.expected_params", expected)
    with pytest.raises(Enough):
        plan_single_file(tmp_path / name, ["unet"])
    assert asked == [UNetConfig(num_frames=frames)]


@pytest.mark.parametrize(
    ("drop", "sizes", "words"),
    [
        ([UNET_NAME], None, r"has no unet: expected tensors called model\.diffusion_model\..*--components"),
        ([f"{CLIP_NAME}proj"], "own", r"does not match its image_encoder config: 1 missing.*visual_projection"),
        ([], {"unet": {"in_channels": 8}}, "written by another version"),
        ([], {"unet": 3}, "written by another version"),
    ],
)
def test_files_that_do_not_fit_are_refused(file, tmp_path, drop, sizes, words):
    sizes = json.loads(metadata(file[0])["osv_jax"]) if sizes == "own" else sizes
    with pytest.raises(UserError, match=words):
        plan_single_file(edited(file[0], tmp_path / "svd.safetensors", drop, sizes))


def test_components_and_paths_that_are_not_there_are_refused(file, tmp_path):
    with pytest.raises(UserError, match="no component 'text_encoder'"):
        plan_single_file(file[0], ["text_encoder"])
    with pytest.raises(UserError, match="does not exist"):
        plan_single_file(tmp_path / "svd.safetensors")
