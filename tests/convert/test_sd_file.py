"""Stable Diffusion 1.5 in one file, in LDM's naming: diffusers reads the same out of it."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_animatediff
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from flax.traverse_util import flatten_dict
from safetensors.torch import save_file
from tool import convert as main

from osv_jax.convert.naming import to_torch
from osv_jax.convert.single_file import SD_COMPONENTS, plan_sd_file
from osv_jax.convert.stability_names import file_names
from osv_jax.convert.weights import load_config, load_params
from osv_jax.errors import UserError

NAMES = dict(zip(SD_COMPONENTS, ("unet", "vae", "text_encoder"), strict=True))


def tensors_of(network):
    """A network's tensors under the names that all versions of the libraries know."""
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    if any(name.startswith("final_layer_norm") for name in state):  # transformers 5 leaves the prefix away.
        state = {f"text_model.{name}": tensor for name, tensor in state.items()}
    return state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a checkpoint with the file `model.safetensors` in it, the networks, and their imported weights."""
    folder = tmp_path_factory.mktemp("sd")
    networks = tiny_animatediff.save_checkpoint(folder)
    tiny_animatediff.import_all(folder, folder / "weights")
    tensors, sizes = {"betas": torch.zeros(3), "model_ema.decay": torch.zeros(1)}, {}
    for component, name in NAMES.items():
        state = tensors_of(networks[name])
        for ours, (theirs, _, _) in file_names(component, state).items():
            is_convolution = ".attn_1." in theirs and state[ours].ndim == 2
            tensors[theirs] = state[ours][:, :, None, None] if is_convolution else state[ours]
        sizes[component] = dataclasses.asdict(load_config(folder / "weights", component))
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None].float()
    save_file(tensors, folder / "model.safetensors", {"osv_jax": json.dumps(sizes)})
    return folder, networks, tensors


@pytest.mark.parametrize(("kind", "name"), [(UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")])
def test_diffusers_reads_the_file_as_the_network_that_was_written(checkpoint, kind, name):
    folder, networks, _ = checkpoint
    read = kind.from_single_file(
        str(folder / "model.safetensors"), config=str(folder / "sd"), subfolder=name, local_files_only=True
    )
    for key, tensor in networks[name].state_dict().items():
        torch.testing.assert_close(read.state_dict()[key], tensor, rtol=0, atol=0, msg=key)


def test_the_import_of_the_file_is_that_of_the_folder(checkpoint, tmp_path, capsys):
    folder, *_ = checkpoint
    assert main(["sd", str(folder / "model.safetensors"), str(tmp_path), "--dtype=float32"]) == 0
    printed = capsys.readouterr().out
    assert "convert_weights tokenizer" in printed and "position_ids is not used" in printed
    for component in SD_COMPONENTS:
        expected = flatten_dict(load_params(folder / "weights", component))
        made = flatten_dict(load_params(tmp_path, component))
        assert made.keys() == expected.keys()
        for path, leaf in made.items():
            np.testing.assert_array_equal(leaf, expected[path], err_msg=to_torch(path, np.asarray(leaf))[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda names: [name for name in names if "cond_stage" not in name], "has no text_encoder: expected tensors"),
        (lambda names: [name for name in names if "mid.attn_1.q" not in name], "4 missing tensors"),
        (lambda names: [*names, "model.diffusion_model.label_emb.0.0.weight"], "1 left-over tensors"),
    ],
    ids=["another model", "missing", "left over"],
)
def test_files_that_are_not_whole_are_refused_in_one_sentence(checkpoint, tmp_path, spoil, message):
    folder, _, tensors = checkpoint
    metadata = {
        "osv_jax": json.dumps({name: dataclasses.asdict(load_config(folder / "weights", name)) for name in NAMES})
    }
    kept = {name: tensors.get(name, torch.zeros(2)) for name in spoil(list(tensors))}
    save_file(kept, tmp_path / "model.safetensors", metadata)
    with pytest.raises(UserError, match=message) as caught:
        plan_sd_file(tmp_path / "model.safetensors")
    assert "\n" not in str(caught.value)
