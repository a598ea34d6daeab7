"""The named groups: a partition of the UNet's parameters, less those that cannot learn."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from osv_jax.convert.architectures import expected_params
from osv_jax.models import groups
from osv_jax.models.svd_unet import SVDUNet, UNetConfig
from osv_jax.objectives.random_networks import random_params

# Every kind of block; two channels a group of a norm (with one, biases ahead of the norms would have no gradient).
SMALL = UNetConfig(
    block_out_channels=(64, 64),
    layers_per_block=1,
    num_attention_heads=(1, 2),
    has_attention=(True, False),
    cross_attention_dim=8,
    addition_time_embed_dim=8,
)


@pytest.fixture(scope="module")
def full_size():
    """Shapes of the real UNet's parameters, by path."""
    return expected_params("unet", UNetConfig())


def paths_by_group(shapes):
    """The paths that each group selects alone."""
    return {name: set(flatten_dict(groups.select(unflatten_dict(shapes), (name,)))) for name in groups.GROUPS}


def test_every_parameter_is_in_one_group(full_size):
    selected = paths_by_group(full_size)
    times = collections.Counter(path for paths in selected.values() for path in paths)
    assert set(times.values()) == {1}
    # What no group selects is what has no gradient, in the 16 spatial and 16 temporal blocks.
    left_out = full_size.keys() - times.keys()
    kinds = collections.Counter("/".join(path[3:]) for path in left_out)
    assert kinds == dict.fromkeys(("attn2/to_q/kernel", "attn2/to_k/kernel", "norm2/scale", "norm2/bias"), 32)
    assert {path[2] for path in left_out} == {"transformer_blocks_0", "temporal_transformer_blocks_0"}


def test_groups_hold_what_their_names_say(full_size):
    words = {
        "spatial_transformer": "/transformer_blocks_0/",
        "temporal_transformer": "/temporal_transformer_blocks_0/",
        "spatial_resnet": "/spatial_res_block/",
        "temporal_resnet": "/temporal_res_block/",
    }
    for path in full_size:
        fitting = [name for name, word in words.items() if word in "/".join(path)]
        assert [groups.group_of(path)] == (fitting or ["other"]), path
    others = {path[-2] for path in full_size if groups.group_of(path) == "other"}
    assert {"conv_in", "conv_out", "proj_in", "proj_out", "linear_1", "time_mixer", "conv"} <= others


def test_sizes_of_stable_video_diffusion(full_size):
    sizes = dict.fromkeys(groups.GROUPS, 0)
    for path, leaf in full_size.items():
        sizes[groups.group_of(path)] += math.prod(leaf.shape)
    print({name: f"{number / 1e6:.1f} M" for name, number in sizes.items()})
    assert sum(sizes.values()) == 1_524_623_082
    assert round(sizes["spatial_transformer"] / 1e6, 1) == 248.8
    assert round(sizes["temporal_transformer"] / 1e6, 1) == 397.6


def test_all_is_the_union_and_lora_is_nothing(full_size):
    tree = unflatten_dict(full_size)
    selected = paths_by_group(full_size)
    assert set(flatten_dict(groups.select(tree, ("all",)))) == set().union(*selected.values())
    assert groups.select(tree, ("lora",)) == {} == groups.select(tree, ())
    pair = groups.select(tree, ("lora", "spatial_resnet", "temporal_resnet"))
    assert set(flatten_dict(pair)) == selected["spatial_resnet"] | selected["temporal_resnet"]


def test_an_unknown_group_is_refused():
    with pytest.raises(ValueError, match=r"must be among .*'temporal_transformer'.*, got 'transformer'\.$"):
        groups.select({}, ("lora", "transformer"))


def test_table_counts_parameters_and_what_is_trained(full_size):
    table = groups.count_table(unflatten_dict(full_size), ("lora", "temporal_transformer"), 12_345_678)
    rows = {line.split()[0]: line.split()[1::2] for line in table.splitlines()[1:]}
    selected = paths_by_group(full_size)
    assert list(rows) == ["lora", *groups.GROUPS]
    assert rows["lora"] == ["12.346", "12.346"]
    trained = sum(math.prod(full_size[path].shape) for path in selected["temporal_transformer"])
    assert rows["temporal_transformer"] == ["397.620", f"{trained / 1e6:.3f}"] == ["397.620", "372.426"]
    assert all(rows[name][1] == "0.000" for name in groups.GROUPS if name != "temporal_transformer")
    assert sum(float(row[0]) for row in rows.values()) == pytest.approx(1524.623 + 12.346, abs=0.004)


@pytest.mark.integration  # The gradient of every parameter of a UNet.
def test_select_leaves_out_exactly_what_has_no_gradient(rng):
    shapes = unflatten_dict(expected_params("unet", SMALL))
    params = random_params({"unet": shapes}, 0, np.float32)["unet"]
    sample = rng.standard_normal((2, 2, 4, 6, 8), np.float32)
    embedding, direction = rng.standard_normal((2, 8), np.float32), rng.standard_normal((2, 2, 4, 6, 4), np.float32)
    ids = np.array([[6, 127, 0.02], [24, 40, 0.3]], np.float32)
    unet = SVDUNet(SMALL)

    @jax.jit
    def gradient(params):
        answer = lambda params: unet.apply({"params": params}, sample, jnp.array([-1.0, 1.0]), embedding, ids)  # noqa: E731
        return jax.grad(lambda params: jnp.sum(direction * answer(params)))(params)

    norms = {path: np.linalg.norm(leaf) for path, leaf in flatten_dict(gradient(params)).items()}
    kept = flatten_dict(groups.select(params, ("all",)))
    assert {path for path, norm in norms.items() if norm == 0} == norms.keys() - kept.keys()
    # Not rounding errors either.
    smallest = min(kept, key=norms.get)
    print(f"smallest gradient {norms[smallest]:.1e} of {'/'.join(smallest)}, largest {max(norms.values()):.1e}")
    assert norms[smallest] > 1e-5 * max(norms.values())
