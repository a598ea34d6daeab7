"""The CLIP image encoder against transformers, through the files that `save_pretrained` writes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from conftest import relative_error
from flax import traverse_util

from osv_jax.models.clip_vision import CLIPVision, CLIPVisionConfig

CONFIGS = {
    "gelu": CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=80,
        projection_dim=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=42,
        patch_size=14,
    ),
    "quick_gelu": CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=72,
        projection_dim=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=35,
        patch_size=5,
        hidden_act="quick_gelu",
        # Large enough to show when it is not passed on.
        layer_norm_eps=1e-2,
    ),
}


def parameters_on_disk(model, folder):
    """Writes the torch model and reads it back as our tree."""
    model.save_pretrained(folder)
    tree = {}
    for name, array in safetensors.numpy.load_file(folder / "model.safetensors").items():
        *path, leaf = name.replace(".layers.", ".layers_").split(".")
        if leaf == "weight" and path[-1] == "position_embedding":
            leaf = "embedding"
        elif leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
            array = array.transpose({1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[array.ndim])
        tree[(*path, leaf)] = jnp.asarray(array)
    return traverse_util.unflatten_dict(tree)


def randomise(model):
    """Random weights of a trained network's size, also where the initialisation is zero or one."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weight.data = 1 + 0.3 * noise
        else:
            fan_in = weight[0].numel() if weight.ndim > 1 and "position" not in name else 10
            weight.data = noise / fan_in**0.5
    return model.eval()


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tmp_path_factory):
    """Our config, the same weights here and in torch, and a batch of pixels with torch's answer."""
    config = CONFIGS[request.param]
    reference = transformers.CLIPVisionConfig(**dataclasses.asdict(config))
    torch_model = randomise(transformers.CLIPVisionModelWithProjection(reference))
    params = parameters_on_disk(torch_model, tmp_path_factory.mktemp("clip"))
    pixels = np.random.default_rng(2).standard_normal((2, config.image_size, config.image_size, 3), dtype=np.float32)
    with torch.no_grad():
        expected = torch_model(torch.from_numpy(pixels).movedim(-1, 1)).image_embeds
    return config, params, jnp.asarray(pixels), expected


def test_the_tree_is_the_checkpoints(case):
    config, params, pixels, _ = case
    ours = jax.eval_shape(CLIPVision(config).init, jax.random.key(0), pixels)["params"]
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, params)


def test_matches_transformers(case):
    config, params, pixels, expected = case
    actual = jax.jit(CLIPVision(config).apply)({"params": params}, pixels)
    assert relative_error(actual, expected) <= 2e-5


def test_half_precision_stays_close(case):
    config, params, pixels, expected = case
    actual = jax.jit(CLIPVision(config, dtype=jnp.bfloat16).apply)({"params": params}, pixels)
    assert actual.dtype == jnp.bfloat16
    assert relative_error(actual, expected) <= 0.1


def test_the_defaults_are_svds_image_encoder():
    model = CLIPVision(CLIPVisionConfig(), param_dtype=jnp.bfloat16)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    leaves = jax.tree.leaves(params)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    with torch.device("meta"):
        reference = transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**dataclasses.asdict(CLIPVisionConfig()))
        )
    assert sum(leaf.size for leaf in leaves) == sum(weight.numel() for weight in reference.parameters())


def test_other_image_sizes_are_refused():
    config = CONFIGS["gelu"]
    with pytest.raises(ValueError, match=r"takes \[b, 42, 42, 3\] pixels"):
        CLIPVision(config).init(jax.random.key(0), jnp.zeros((1, 56, 42, 3)))


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="hidden_act must be one of"):
        CLIPVisionConfig(hidden_act="relu")
