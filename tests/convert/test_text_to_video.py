"""Stable Diffusion folders and motion adapters into a weights folder: the same numbers, or one sentence."""

import shutil

import numpy as np
import pytest
import tiny_animatediff
import torch
import transformers
from conftest import quick_jit, relative_error
from diffusers import UNetMotionModel
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_checkpoints import edit_json
from tool import convert as main

from osv_jax.convert import text_to_video
from osv_jax.convert.naming import to_flax, to_torch, torch_name
from osv_jax.convert.tokenizer import Tokenizer
from osv_jax.convert.weights import load_config, load_params
from osv_jax.errors import UserError
from osv_jax.models.clip_text import CLIPText
from osv_jax.models.text_unet import MotionConfig, TextUNet

# As released, but for the sizes: what a file does not say, heads and groups, is the same in all.
V1 = MotionConfig((32, 64), motion_layers_per_block=1, motion_max_seq_length=24, use_motion_mid_block=False)
V2 = MotionConfig((32, 64), motion_layers_per_block=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folders `sd` and `motion` in diffusers layout, and the networks in them."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, tiny_animatediff.save_checkpoint(folder)


@pytest.fixture(scope="module")
def weights(checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("weights")
    tiny_animatediff.import_all(checkpoint[0], output)
    return output


def on_torch_side(params):
    return dict(to_torch(path, np.asarray(leaf)) for path, leaf in flatten_dict(params).items())


@pytest.mark.parametrize(
    ("component", "name"),
    [("unet_2d", "unet"), ("image_vae", "vae"), ("text_encoder", "text_encoder"), ("motion_adapter", "motion")],
)
def test_imported_tensors_are_the_checkpoints(checkpoint, weights, component, name):
    imported = on_torch_side(load_params(weights, component))
    for key, tensor in checkpoint[1][name].state_dict().items():
        if key.endswith("pos_embed.pe"):
            continue
        key = f"text_model.{key}" if name == "text_encoder" else key
        np.testing.assert_array_equal(imported.pop(key), tensor.numpy(), err_msg=key)
    assert not imported


def test_prompts_become_videos_of_the_same_noise(checkpoint, weights, rng):
    """Tokenizer, text encoder and the UNet of both folders together, against diffusers' of the same."""
    networks = checkpoint[1]
    prompts = ["the cat on the car", ""]
    tokens = Tokenizer(text_to_video.tokenizer_of(weights))(prompts).ids
    text = CLIPText(load_config(weights, "text_encoder"))
    context = quick_jit(text.apply)({"params": load_params(weights, "text_encoder")}, tokens)
    config, motion = load_config(weights, "unet_2d"), load_config(weights, "motion_adapter")
    text_to_video.check_motion_fits(motion, config, weights)
    both = (flatten_dict(load_params(weights, name)) for name in ("unet_2d", "motion_adapter"))
    params = unflatten_dict({path: leaf for params in both for path, leaf in params.items()})
    sample, t = rng.standard_normal((2, 3, 4, 6, 4), np.float32), np.array([999.0, 1.0], np.float32)
    noise = quick_jit(TextUNet(config, motion).apply)({"params": params}, sample, t, context)

    theirs = UNetMotionModel.from_unet2d(networks["unet"], networks["motion"]).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(checkpoint[0] / "sd" / "tokenizer", model_max_length=77)
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        states = networks["text_encoder"](ids)[0].repeat_interleave(3, dim=0)
        expected = theirs(torch.tensor(sample).permute(0, 4, 1, 2, 3), torch.tensor(t), states).sample
    assert relative_error(noise, expected.permute(0, 2, 3, 4, 1)) < 2e-5


@pytest.mark.parametrize("config", [V1, V2], ids=["v1", "v2"])
def test_animatediffs_own_file_is_the_same_adapter(tmp_path, config):
    options = {
        "motion_max_seq_length": config.motion_max_seq_length,
        "use_motion_mid_block": config.use_motion_mid_block,
    }
    state, own = tiny_animatediff.adapter(config.block_out_channels, **options).state_dict(), {}
    for name, tensor in state.items():
        for new, old in (
            (".transformer_blocks.", ".temporal_transformer.transformer_blocks."),
            (".norm.", ".temporal_transformer.norm."),
            (".proj_in.", ".temporal_transformer.proj_in."),
            (".proj_out.", ".temporal_transformer.proj_out."),
            (".attn1.", ".attention_blocks.0."),
            (".attn2.", ".attention_blocks.1."),
            (".norm1.", ".norms.0."),
            (".norm2.", ".norms.1."),
            (".norm3.", ".ff_norm."),
        ):
            name = name.replace(new, old)
        if name.endswith("pos_embed.pe"):
            for i in range(2):
                own["module." + name.replace("pos_embed", f"attention_blocks.{i}.pos_encoder")] = tensor
        else:
            own["module." + name] = tensor
    torch.save({"global_step": 1, "state_dict": own}, tmp_path / "mm.ckpt")
    plan = text_to_video.plan_motion_adapter(tmp_path / "mm.ckpt")
    assert plan.config == config
    for tensor in plan.tensors:
        expected = to_flax(tensor.path, state[torch_name(tensor.path)].numpy())
        np.testing.assert_array_equal(tensor.read(plan.reader, np.float32), expected)
    assert len(plan.tensors) == len([name for name in state if not name.endswith(".pe")])


@pytest.mark.parametrize("components", ["tokenizer", "unet_2d,tokenizer"])
def test_a_tokenizer_does_not_take_the_place_of_itself(checkpoint, components, capsys):
    folder = checkpoint[0] / "sd"
    before = sorted(folder.rglob("*"))
    assert main(["sd", str(folder), str(folder), f"--components={components}", "--overwrite"]) == 2
    assert "its source" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_what_is_there_is_not_overwritten_unasked(checkpoint, weights, capsys):
    again = ["sd", str(checkpoint[0] / "sd"), str(weights), "--components=tokenizer"]
    assert main(again) == 2
    assert "tokenizer exists" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 0
    assert Tokenizer(text_to_video.tokenizer_of(weights)).vocab_size == load_config(weights, "text_encoder").vocab_size


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet", {"addition_embed_type": "text_time"}, "none of Stable Diffusion 1.5's"),
        ("unet", {"use_linear_projection": True}, "none of Stable Diffusion 1.5's"),
        ("vae", {"scaling_factor": 0.13025}, "latents are not those of Stable Diffusion 1.5"),
        ("vae", {"_class_name": "AutoencoderKLTemporalDecoder"}, "only 'AutoencoderKL' is supported"),
        ("text_encoder", {"vocab_size": 7}, "vocab_size|misshapen"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "predict epsilon"),
    ],
)
def test_other_models_are_refused_in_one_sentence(checkpoint, tmp_path, file, changes, message):
    shutil.copytree(checkpoint[0] / "sd", tmp_path / "sd")
    edit_json(tmp_path / "sd" / (file if "." in file else f"{file}/config.json"), **changes)
    with pytest.raises(UserError, match=message) as caught:
        text_to_video.plan_stable_diffusion(tmp_path / "sd")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_checkpoint_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint[0] / "sd", tmp_path / "sd")
    vocabulary = tmp_path / "sd" / "tokenizer" / "vocab.json"
    vocabulary.write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (tmp_path / "sd" / "tokenizer" / "merges.txt").write_text("")
    with pytest.raises(UserError, match="has 2 tokens, and the text encoder beside it"):
        text_to_video.plan_stable_diffusion(tmp_path / "sd")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_motion_mid_block": False}, "two versions of AnimateDiff"),
        ({"motion_max_seq_length": 24}, "two versions of AnimateDiff"),
        ({"conv_in_channels": 9}, "only None is supported"),
    ],
)
def test_an_adapter_of_another_version_is_refused(checkpoint, tmp_path, changes, message):
    shutil.copytree(checkpoint[0] / "motion", tmp_path / "motion")
    edit_json(tmp_path / "motion" / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        text_to_video.plan_motion_adapter(tmp_path / "motion")


def test_learned_positions_and_another_unet_are_refused(checkpoint, weights, tmp_path):
    network = tiny_animatediff.small_adapter()
    with torch.no_grad():
        network.down_blocks[0].motion_modules[0].transformer_blocks[0].pos_embed.pe += 1
    network.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not AnimateDiff's sines and cosines"):
        text_to_video.plan_motion_adapter(tmp_path)
    with pytest.raises(UserError, match="use one for Stable Diffusion"):
        config = load_config(weights, "unet_2d")
        text_to_video.check_motion_fits(type(load_config(weights, "motion_adapter"))(), config, tmp_path)


def test_a_2d_model_of_other_texts_is_refused(checkpoint, tmp_path):
    """As of Stable Diffusion 2, whose UNet attends to 1024 channels, beside the text encoder of 1.5."""
    shutil.copytree(checkpoint[0] / "sd", tmp_path / "sd")
    other = tiny_animatediff.unet_2d(cross_attention_dim=32)
    other.save_pretrained(tmp_path / "sd" / "unet")
    with pytest.raises(UserError, match="attends to texts of 32 channels, and the text encoder's have 24") as caught:
        text_to_video.plan_stable_diffusion(tmp_path / "sd")
    assert "\n" not in str(caught.value)


def test_packed_weights_have_the_tokenizer(weights, tmp_path, capsys):
    assert main(["pack", str(weights), str(tmp_path / "packed"), "--dtype=float32"]) == 0
    assert "motion_adapter, tokenizer as float32" in capsys.readouterr().out
    packed, stored = (Tokenizer(text_to_video.tokenizer_of(folder)) for folder in (tmp_path / "packed", weights))
    np.testing.assert_array_equal(packed(["the cat"]).ids, stored(["the cat"]).ids)
