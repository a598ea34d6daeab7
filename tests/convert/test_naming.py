import numpy as np
import pytest
import tiny_checkpoints
import torch
from diffusers import UNetSpatioTemporalConditionModel

from osv_jax.convert.architectures import ARCHITECTURES, expected_params
from osv_jax.convert.naming import flax_shape_to_torch, module_path, to_flax, to_torch, torch_module, torch_name
from osv_jax.models.svd_unet import UNetConfig


def test_known_names():
    assert module_path("down_blocks.0.resnets.1.conv1") == ("down_blocks_0", "resnets_1", "conv1")
    assert module_path("attn1.to_out.0") == ("attn1", "to_out_0")
    assert module_path("time_embedding.linear_1") == ("time_embedding", "linear_1")
    assert torch_name(("time_embedding", "linear_2", "kernel")) == "time_embedding.linear_2.weight"
    assert torch_name(("norm1", "scale")) == "norm1.weight"
    assert torch_name(("vision_model", "embeddings", "position_embedding", "embedding")).endswith("embedding.weight")
    assert torch_name(("time_mixer", "mix_factor")) == "time_mixer.mix_factor"
    assert torch_module(("blocks_0_3", "norm")) == "blocks.0.3.norm"


@pytest.mark.parametrize("component", ["unet", "vae", "image_encoder", "dinov2"])
def test_every_name_makes_the_round_trip(component, tmp_path):
    getattr(tiny_checkpoints, component)().save_pretrained(tmp_path)
    for name in tiny_checkpoints.on_disk(tmp_path):
        module, _, leaf = name.rpartition(".")
        assert torch_name((*module_path(module), leaf)) == name


def test_full_size_unet_has_exactly_the_reference_tensors():
    with torch.device("meta"):
        reference = UNetSpatioTemporalConditionModel(num_frames=14).state_dict()
    expected = expected_params("unet", UNetConfig())
    ours = {torch_name(path): flax_shape_to_torch(path, leaf.shape) for path, leaf in expected.items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in reference.items()}
    assert sum(np.prod(leaf.shape) for leaf in expected.values()) == 1_524_623_082


@pytest.mark.parametrize(
    ("torch_shape", "flax_shape"),
    [
        ((6, 5), (5, 6)),
        ((6, 5, 3), (3, 5, 6)),
        ((6, 5, 3, 4), (3, 4, 5, 6)),
        ((6, 5, 3, 2, 4), (3, 2, 4, 5, 6)),
    ],
)
def test_kernel_layouts(torch_shape, flax_shape, rng):
    array, path = rng.standard_normal(torch_shape), ("m", "kernel")
    ours = to_flax(path, array)
    assert ours.shape == flax_shape
    # Output and input channel stay what they were, whatever the window does.
    np.testing.assert_array_equal(ours[..., 2, 3].ravel(), array[3, 2].ravel())
    assert flax_shape_to_torch(path, flax_shape) == torch_shape
    name, back = to_torch(path, ours)
    assert name == "m.weight"
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("leaf", ["scale", "embedding", "bias", "cls_token"])
def test_other_leaves_keep_their_layout(leaf, rng):
    array = rng.standard_normal((3, 4))
    assert to_flax(("m", leaf), array) is array
    assert to_torch(("m", leaf), array)[1] is array


def test_a_kernel_of_one_axis_is_refused():
    with pytest.raises(ValueError, match="2 to 5 axes"):
        to_flax(("m", "kernel"), np.zeros(3))


def test_default_configs_give_trees():
    # SVD's VAE: 97.7 M parameters; ViT-H/14 with projection: 632 M; DINOv2 ViT-S/14: 22 M.
    sizes = {"vae": 97.7e6, "image_encoder": 632.1e6, "dinov2": 22.06e6}
    for component, size in sizes.items():
        expected = expected_params(component, ARCHITECTURES[component].config())
        assert sum(np.prod(leaf.shape) for leaf in expected.values()) == pytest.approx(size, rel=2e-3)
