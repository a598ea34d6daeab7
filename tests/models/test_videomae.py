"""VideoMAE against transformers, through the files that it writes and through those of the original."""

import json

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import relative_error
from flax.traverse_util import unflatten_dict
from torch_reference import randomise

from osv_jax.convert.architectures import ARCHITECTURES, expected_params
from osv_jax.convert.videomae import plan_videomae
from osv_jax.errors import UserError
from osv_jax.models.videomae import VideoMAE, VideoMAEConfig

_SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 80,
    "image_size": 21,
    "patch_size": 7,
    "num_frames": 6,
    "tubelet_size": 2,
    "layer_norm_eps": 1e-6,
}


@pytest.fixture(scope="module")
def reference():
    model = transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**_SIZES))
    return randomise(model).requires_grad_(False)


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videomae")
    reference.save_pretrained(folder)
    return folder


def parameters(plan):
    return unflatten_dict({tensor.path: tensor.read(plan.reader, np.float32) for tensor in plan.tensors})


def test_features_are_transformers(reference, folder):
    plan = plan_videomae(folder)
    assert plan.config == VideoMAEConfig(**_SIZES, fc_norm_eps=1e-5)
    video = np.random.default_rng(0).standard_normal((2, 6, 21, 21, 3), np.float32)
    expected = []
    reference.fc_norm.register_forward_hook(lambda module, inputs, output: expected.append(output))
    reference(torch.tensor(video).permute(0, 1, 4, 2, 3))
    features = jax.jit(VideoMAE(plan.config).apply)({"params": parameters(plan)}, video)
    assert relative_error(features, expected[0].numpy()) <= 2e-5


def test_the_originals_file_gives_the_same_tensors(folder, tmp_path):
    ours = {}
    for name, tensor in safetensors.torch.load_file(folder / "model.safetensors").items():
        name = name.replace("videomae.embeddings.patch_embeddings.projection", "patch_embed.proj")
        name = name.replace("videomae.encoder.layer.", "blocks.").replace("attention.attention.", "attn.")
        name = name.replace("attention.output.dense", "attn.proj").replace("intermediate.dense", "mlp.fc1")
        name = name.replace("output.dense", "mlp.fc2").replace("layernorm_before", "norm1")
        ours[name.replace("layernorm_after", "norm2").replace("classifier", "head")] = tensor
    for block in range(2):
        parts = [ours.pop(f"blocks.{block}.attn.{part}.weight") for part in ("query", "key", "value")]
        ours[f"blocks.{block}.attn.qkv.weight"] = torch.cat(parts)
    torch.save({"module": ours}, tmp_path / "vit.pth")
    plan = plan_videomae(tmp_path / "vit.pth")
    # What a file does not tell is that of the released networks.
    assert (plan.config.hidden_size, plan.config.num_attention_heads, plan.config.tubelet_size) == (128, 2, 2)
    assert (plan.config.num_frames, plan.config.image_size, plan.config.fc_norm_eps) == (16, 224, 1e-6)
    theirs = jax.tree.leaves_with_path(parameters(plan_videomae(folder)))
    for (path, leaf), (same, other) in zip(jax.tree.leaves_with_path(parameters(plan)), theirs, strict=True):
        assert path == same
        np.testing.assert_array_equal(leaf, other)


def test_the_default_is_cd_fvds_network():
    shapes = expected_params("videomae", ARCHITECTURES["videomae"].config())
    # ViT-g/14 with 174 classes has 1,012.7 M parameters; the classifier's 245,166 are left out.
    assert sum(np.prod(leaf.shape) for leaf in shapes.values()) == pytest.approx(1.0126e9, rel=1e-3)
    assert shapes["fc_norm", "scale"].shape == (1408,)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\[6, 21, 21\], got \[6, 21, 28\]"):
        VideoMAE(VideoMAEConfig(**_SIZES)).init(jax.random.key(0), np.zeros((1, 6, 21, 28, 3)))


def test_networks_without_code_are_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_mean_pooling": False}))
    with pytest.raises(UserError, match="use_mean_pooling = False"):
        plan_videomae(tmp_path)
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="is not a VideoMAE checkpoint"):
        plan_videomae(tmp_path / "a.pth")
