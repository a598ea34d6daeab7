"""Weights folders are loaded, into any shardings, and what is wrong with them is said."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints

from osv_jax.convert.weights import load_config, load_params, load_video, save_packed
from osv_jax.errors import UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    svd = tmp_path_factory.mktemp("svd")
    tiny_checkpoints.save_svd(svd)
    return tiny_checkpoints.import_all(svd, tmp_path_factory.mktemp("weights"))


def test_weights_that_are_not_their_configurations_are_an_error(weights, tmp_path):
    shutil.copytree(weights / "dinov2", tmp_path / "orbax" / "dinov2")
    file = tmp_path / "orbax" / "dinov2" / "config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"config": stored["config"] | {"mlp_ratio": 2}}))
    with pytest.raises(UserError, match=r"does not match its config\.json: encoder/layer_0/mlp/fc1/bias is \(512,\)"):
        load_params(tmp_path / "orbax", "dinov2")
    params, config = load_params(weights, "dinov2"), load_config(weights, "dinov2")
    del params["layernorm"]["scale"]
    save_packed(tmp_path / "packed" / "dinov2", "dinov2", config, params, weights)
    with pytest.raises(UserError, match=r"layernorm/scale is missing, not \(128,\)"):
        load_params(tmp_path / "packed", "dinov2")


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_a_damaged_checkpoint_of_weights_is_an_error(weights, tmp_path, name):
    shutil.copytree(weights / "dinov2", tmp_path / "dinov2")
    file = tmp_path / "dinov2" / "params" / name
    file.write_bytes(b"x" * file.stat().st_size)  # Of the size that config.json says.
    with pytest.raises(UserError, match="dinov2 is damaged: convert the weights again"):
        load_params(tmp_path, "dinov2")


def test_a_rate_that_no_clip_has_is_an_error(tmp_path):
    (tmp_path / "video.json").write_text('{"height": 64, "fps": NaN}')
    with pytest.raises(UserError, match=r"video\.json: fps=nan must be a number from 0\.1 to 240"):
        load_video(tmp_path)


def test_load_into_shardings_and_dtypes(weights):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    single = load_params(weights, "image_encoder")
    shardings = jax.tree.map(lambda leaf: split if leaf.ndim == 2 and leaf.shape[1] % 8 == 0 else replicated, single)
    sharded = load_params(weights, "image_encoder", shardings, dtype=jnp.bfloat16)
    projection = sharded["visual_projection"]["kernel"]
    assert projection.sharding == split
    assert projection.addressable_shards[0].data.shape == (32, 3)
    for leaf, original in zip(jax.tree.leaves(sharded), jax.tree.leaves(single), strict=True):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, original.astype(jnp.bfloat16))
    for leaf in jax.tree.leaves(load_params(weights, "image_encoder", replicated)):
        assert leaf.sharding == replicated


def test_loading_what_is_not_there(weights, tmp_path):
    with pytest.raises(UserError, match=r"python -m osv_jax\.convert_weights svd SVD_FOLDER .*/none"):
        load_params(tmp_path / "none", "unet")
    with pytest.raises(UserError, match=r"python -m osv_jax\.convert_weights dinov2 DINOV2_FOLDER_OR_PTH"):
        load_config(tmp_path / "none", "dinov2")
    with pytest.raises(UserError, match="no component 'tokenizer'"):
        load_config(weights, "tokenizer")
    with pytest.raises(UserError, match="is one component: give the folder that contains it"):
        load_params(weights / "vae", "vae")
    shutil.copytree(weights / "vae", tmp_path / "unet")
    with pytest.raises(UserError, match="holds 'vae', not 'unet'"):
        load_params(tmp_path, "unet")


@pytest.mark.parametrize("lost", ["config.json", "params", "params/_METADATA", "params/manifest.ocdbt", "params/d/*"])
def test_incomplete_weights(weights, tmp_path, lost):
    shutil.copytree(weights / "vae", tmp_path / "vae")
    for path in list((tmp_path / "vae").glob(lost)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match="is incomplete"):
        load_params(tmp_path, "vae")


def test_truncated_weights(weights, tmp_path):
    shutil.copytree(weights / "vae", tmp_path / "vae")
    largest = max((tmp_path / "vae").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(UserError, match="is incomplete"):
        load_params(tmp_path, "vae")


def test_config_of_another_version(weights, tmp_path):
    shutil.copytree(weights / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "config.json"
    tiny_checkpoints.edit_json(file, format=0)
    with pytest.raises(UserError, match="another version"):
        load_config(tmp_path, "vae")
    file.write_text("{}")
    with pytest.raises(UserError, match="was not written by"):
        load_config(tmp_path, "vae")
