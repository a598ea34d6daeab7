"""Configurations of checkpoints that no network here has."""

import dataclasses
import json
import shutil

import pytest
import tiny_checkpoints

from osv_jax.convert import importers
from osv_jax.convert.architectures import expected_params, parse_config
from osv_jax.errors import UserError


@pytest.fixture(scope="module")
def svd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("svd")
    tiny_checkpoints.save_svd(folder)
    return folder


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("unet", {"_class_name": "UNet2DConditionModel"}, "_class_name = 'UNet2DConditionModel'"),
        ("unet", {"down_block_types": ["AttnDownBlock2D", "DownBlockSpatioTemporal"]}, "AttnDownBlock2D"),
        ("unet", {"up_block_types": ["UpBlockSpatioTemporal"] * 2}, "up_block_types"),
        ("unet", {"layers_per_block": [1, 2]}, "layers_per_block"),
        ("vae", {"_class_name": "AutoencoderKL"}, "AutoencoderKLTemporalDecoder"),
        ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types"),
        ("vae", {"layers_per_block": 1}, "layers_per_block"),
        ("image_encoder", {"hidden_act": "relu"}, "hidden_act"),
        ("image_encoder", {"model_type": "clip_text_model"}, "model_type"),
    ],
)
def test_unknown_options_are_named(svd, tmp_path, component, changes, message):
    shutil.copytree(svd / component, tmp_path / component)
    tiny_checkpoints.edit_json(tmp_path / component / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        importers.plan_svd(tmp_path, [component])


@pytest.mark.parametrize(
    ("component", "changes", "words"),
    [
        ("unet", {"block_out_channels": 32}, "block_out_channels=32 must be a list of 1 to 8 values"),
        ("unet", {"block_out_channels": [32, "64"]}, "block_out_channels='64' must be a whole number"),
        ("unet", {"num_attention_heads": [2, 0]}, "num_attention_heads=0 must be a whole number"),
        ("unet", {"layers_per_block": 10**9}, "layers_per_block=1000000000 must be a whole number from 1 to 16"),
        ("unet", {"layers_per_block": []}, "only one value for all levels"),
        ("unet", {"cross_attention_dim": [24, None]}, "only one value for all levels"),
        ("unet", {"addition_time_embed_dim": 0}, "is damaged"),
        ("unet", {"addition_time_embed_dim": "32"}, "is damaged"),
        ("unet", {"down_block_types": 5}, "is damaged"),
        ("unet", {"down_block_types": [["x"], "y"]}, "is damaged"),
        ("vae", {"block_out_channels": 32}, "is damaged"),
        ("vae", {"scaling_factor": "0.18"}, "scaling_factor='0.18' must be a finite number above 0"),
        ("vae", {"scaling_factor": True}, "scaling_factor=True must be"),
        ("image_encoder", {"hidden_size": -32}, "hidden_size=-32 must be a whole number"),
        ("image_encoder", {"hidden_size": 32.0}, "hidden_size=32.0 must be a whole number"),
        ("image_encoder", {"num_hidden_layers": 10**30}, "must be a whole number from 1 to 128"),
        ("image_encoder", {"hidden_act": 3}, "hidden_act=3 must be of type str"),
        ("image_encoder", {"hidden_act": "relu"}, "hidden_act must be one of"),
    ],
)
def test_a_configuration_that_no_network_has_is_an_error(svd, component, changes, words):
    fields = json.loads((svd / component / "config.json").read_text())
    with pytest.raises(UserError) as error:
        parse_config(component, fields | changes)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("component", "changes"),
    [("unet", {"num_attention_heads": (2,)}), ("image_encoder", {"num_attention_heads": 5})],
)
def test_sizes_that_do_not_go_together_are_an_error(svd, component, changes):
    config = parse_config(component, json.loads((svd / component / "config.json").read_text()))
    with pytest.raises(UserError, match=f"No {component} has the sizes .* check its config.json") as error:
        expected_params(component, dataclasses.replace(config, **changes))
    assert "\n" not in str(error.value)
