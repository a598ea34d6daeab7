"""Which device holds which part: the mesh, parameters at full size, batches."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from osv_jax.convert.architectures import expected_params
from osv_jax.errors import UserError
from osv_jax.models.svd_unet import UNetConfig
from osv_jax.runtime import mesh

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def shapes():
    """Of SVD's UNet."""
    return {"/".join(path): leaf.shape for path, leaf in expected_params("unet", UNetConfig()).items()}


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("conv_in/kernel", ()),  # 3 x 3 x 8 x 320: small
        ("time_embedding/linear_1/kernel", (None, "fsdp")),  # 320 x 1280
        ("down_blocks_0/attentions_0/transformer_blocks_0/ff/net_0/proj/kernel", (None, "fsdp")),  # 320 x 2560
        ("down_blocks_0/attentions_0/transformer_blocks_0/ff/net_2/kernel", ("fsdp",)),  # 1280 x 320
        ("down_blocks_2/attentions_0/transformer_blocks_0/attn1/to_q/kernel", ("fsdp",)),  # 1280 x 1280
        ("mid_block/resnets_0/spatial_res_block/conv1/kernel", (None, None, "fsdp")),  # 3 x 3 x 1280 x 1280
        ("mid_block/resnets_0/temporal_res_block/conv1/kernel", (None, None, None, "fsdp")),  # 3 x 1 x 1 x 1280 x 1280
        ("up_blocks_0/resnets_0/spatial_res_block/conv1/kernel", (None, None, "fsdp")),  # 3 x 3 x 2560 x 1280
        ("mid_block/resnets_0/spatial_res_block/conv1/bias", ()),
    ],
)
def test_specs(shapes, name, spec):
    assert mesh.parameter_spec(shapes[name], 4) == PartitionSpec(*spec)
    assert mesh.parameter_spec(shapes[name], 1) == PartitionSpec()


@pytest.mark.parametrize("fsdp", [2, 4, 8, 16, 32, 64])
def test_no_parameter_of_a_megabyte_is_held_whole(shapes, fsdp):
    large = {name: shape for name, shape in shapes.items() if 2 * np.prod(shape) >= MEGABYTE}
    assert len(large) > 300
    for name, shape in large.items():
        spec = mesh.parameter_spec(shape, fsdp)
        assert spec != PartitionSpec(), name
        assert shape[len(spec) - 1] % fsdp == 0 and spec[-1] == "fsdp"
    assert (
        mesh.unsplit_parameters({name: jax.ShapeDtypeStruct(shape, "bfloat16") for name, shape in large.items()}, fsdp)
        == []
    )


def test_parameters_that_cannot_be_split_are_named(shapes):
    tree = {
        "a": {"kernel": jax.ShapeDtypeStruct((1024, 1024), "float32"), "bias": jax.ShapeDtypeStruct((1024,), "float32")}
    }
    assert mesh.unsplit_parameters(tree, 3) == ["a/kernel"]
    assert mesh.unsplit_parameters(tree, 4) == mesh.unsplit_parameters(tree, 1) == []


def test_batches_are_split_by_clips_and_clips_by_height():
    devices = mesh.make_mesh(2, 2, 2)
    batch = {"video": np.zeros((4, 3, 6, 5, 3), np.uint8), "fps": np.zeros(4, np.float32)}
    placed = next(iter(mesh.global_batches([batch], devices)))
    assert {shard.data.shape for shard in placed["video"].addressable_shards} == {(1, 3, 3, 5, 3)}
    assert {shard.data.shape for shard in placed["fps"].addressable_shards} == {(1,)}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((3, 1, 1), ["data=3 x fsdp=1 x context=1", "there are 8"]), ((-1, 3, 1), ["make the product 8"])],
)
def test_impossible_meshes_are_refused(sizes, words):
    with pytest.raises(UserError) as error:
        mesh.make_mesh(*sizes)
    assert all(word in str(error.value) for word in words)


def test_one_axis_takes_what_is_left():
    assert mesh.make_mesh(-1, 2, 2).shape == {"data": 2, "fsdp": 2, "context": 2}
    assert mesh.make_mesh(1, -1).shape == {"data": 1, "fsdp": 8, "context": 1}
