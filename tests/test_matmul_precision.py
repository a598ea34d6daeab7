"""Programs of float32 networks ask for float32 products, which TPUs and GPUs do not compute otherwise."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import micro_stage1
import numpy as np
import pytest
import tiny

from osv_jax import train, train_vae
from osv_jax.codec import Codec
from osv_jax.data.schemas import Schema
from osv_jax.inference import pipeline, programs
from osv_jax.inference.pipeline import ImageToVideo
from osv_jax.inference.trained import Trained
from osv_jax.objectives.players import Student
from osv_jax.preparation.encoder import Encoder
from osv_jax.runtime.precision import matmul_precision
from osv_jax.training import setup
from osv_jax.training.config import read_config

pytestmark = pytest.mark.parametrize(("dtype", "expected"), [("float32", "highest"), ("bfloat16", None)])


class Traced(Exception):
    """With the precision under which a program would have been traced."""


def stop(*_, **__):
    raise Traced(jax.config.jax_default_matmul_precision)


def test_products_are_lowered_with_the_precision_of_their_dtype(dtype, expected):
    x = jnp.ones((1, 8, 8, 8), dtype)

    def run(x):
        y = x @ x
        return jax.lax.conv_general_dilated(y, y, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    with matmul_precision(dtype):
        lowered = jax.jit(run).lower(x).as_text()
    assert lowered.count("HIGHEST") == (4 if expected else 0), lowered  # Of two operands each.


def test_train(dtype, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "load_frozen", stop)
    config = micro_stage1.get_config()
    config.dtype, config.batch_size = dtype, 8
    with pytest.raises(Traced) as traced:
        train.train(config, tmp_path / "run")
    assert traced.value.args == (expected,)


def test_train_vae(dtype, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(train_vae, "_first_params", stop)
    monkeypatch.setattr(train_vae, "index_folder", lambda *_: types.SimpleNamespace(clips=[]))
    config = read_config("configs/vae.py:tiny")
    config.dtype, config.batch_size = dtype, 8
    with pytest.raises(Traced) as traced:
        train_vae.train_vae(config, tmp_path / "run")
    assert traced.value.args == (expected,)


def test_the_vae_of_a_run_is_held_in_float32(dtype, expected):
    config = micro_stage1.get_config()
    config.dtype = dtype
    networks = setup.networks_of(config)
    frozen = setup.load_frozen(config, networks, tiny.one_device_mesh())
    held = {name: {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} for name, tree in frozen.items()}
    assert held.pop("vae") == {"float32"} and set().union(*held.values()) == {dtype}
    # As it is planned.
    planned = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), frozen)
    assert planned == setup.frozen_shapes(config, networks)


def test_sample_and_compare(dtype, expected, monkeypatch):
    monkeypatch.setattr(programs, "_PROGRAMS", {})
    monkeypatch.setattr(Codec, "decode_video", stop)
    params = {name: {"x": jnp.ones(1)} for name in pipeline.COMPONENTS}
    model = ImageToVideo(tiny.CONFIGS, params, Trained(Student(lora={}, tuned={})), jnp.dtype(dtype))
    with pytest.raises(Traced) as traced:
        model.decode(jnp.ones((1, 1, 2, 2, 4)), 1)
    assert traced.value.args == (expected,)


def test_prepare(dtype, expected, monkeypatch):
    monkeypatch.setattr(Encoder, "_encode", stop)
    codec = tiny.tiny_networks(jnp.dtype(dtype)).codec
    schema = Schema(**dict.fromkeys((field.name for field in dataclasses.fields(Schema)), 1))
    with pytest.raises(Traced) as traced:
        Encoder(codec, {"vae": np.ones(1), "image_encoder": np.ones(1)}, schema, 8, 8, 8)
    assert traced.value.args == (expected,)
