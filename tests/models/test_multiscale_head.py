"""AVDM2's head against PyTorch, and the features of AnimateDiff's encoder that it is given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import quick_jit, relative_error
from torch.nn import functional

from osv_jax.models.multiscale_head import MultiscaleHead
from osv_jax.models.text_unet import MotionConfig, TextUNet, TextUNetConfig
from osv_jax.objectives.random_networks import random_params


def test_head_is_that_of_pytorch(rng):
    sizes = ((6, 10, 8), (3, 5, 16), (2, 3, 16))
    features = tuple(rng.standard_normal((2, 3, *size)).astype(np.float32) for size in sizes)
    head = MultiscaleHead(width=8)
    params = random_params(jax.eval_shape(head.init, jax.random.key(0), features)["params"], 0, np.float32)
    # Not what norms start as.
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params)
    logits = jax.jit(head.apply)({"params": params}, features)

    def conv(name, x):
        kernel, bias = (torch.tensor(params[name][leaf]) for leaf in ("kernel", "bias"))
        return functional.conv2d(x, kernel.permute(3, 2, 0, 1), bias, padding=1)

    scales = []
    for i, x in enumerate(features):
        y = conv(f"scale_{i}_conv", torch.tensor(x).flatten(0, 1).permute(0, 3, 1, 2))
        norm = {name: torch.tensor(leaf) for name, leaf in params[f"scale_{i}_norm"].items()}
        y = functional.leaky_relu(functional.group_norm(y, 8, norm["scale"], norm["bias"], 1e-5), 0.2)
        scales.append(functional.interpolate(y, (6, 10), mode="bilinear"))
    expected = conv("out_conv", torch.cat(scales, dim=1)).reshape(2, -1)
    assert logits.dtype == jnp.float32
    assert relative_error(logits, expected.numpy()) < 2e-5


def test_features_of_stable_diffusion_s_encoder_have_three_scales_and_are_the_last_at_each():
    unet = TextUNet(TextUNetConfig(), MotionConfig())
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 2, 64, 64, 4), (1,), (1, 77, 768))]
    features, variables = jax.eval_shape(
        lambda *inputs: unet.init_with_output(jax.random.key(0), *inputs, features=True), *inputs
    )
    assert [x.shape for x in features] == [(1, 2, 32, 32, 320), (1, 2, 16, 16, 640), (1, 2, 8, 8, 1280)]
    # The teacher's encoder and nothing else.
    assert {name.rstrip("0123") for name in variables["params"]} == {"conv_in", "time_embedding", "down_blocks_"}


@pytest.mark.integration
def test_features_are_what_the_down_blocks_give():
    config = TextUNetConfig(
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        num_attention_heads=(1, 1, 1),
        has_attention=(False, False, False),
        cross_attention_dim=4,
        norm_num_groups=4,
    )
    motion = MotionConfig(config.block_out_channels, 1, 1, 4)
    unet = TextUNet(dataclasses.replace(config), motion)
    inputs = jnp.ones((1, 2, 9, 6, 4)), jnp.ones(1), jnp.ones((1, 2, 4))
    shapes = jax.eval_shape(unet.init, jax.random.key(0), *inputs)["params"]
    variables = {"params": random_params(shapes, 0, np.float32)}
    inside = lambda module, name: name == "__call__" and module.path[:1] != ()  # noqa: E731
    _, state = quick_jit(lambda v: unet.apply(v, *inputs, capture_intermediates=inside))(variables)
    blocks = [state["intermediates"][f"down_blocks_{i}"]["__call__"][0][0] for i in range(3)]
    features = jax.jit(lambda v: unet.apply(v, *inputs, features=True))(variables)
    assert [x.shape[2:4] for x in blocks] == [(5, 3), (3, 2), (3, 2)]
    assert len(features) == 2
    for given, block in zip(features, (blocks[0], blocks[2]), strict=True):
        assert relative_error(given, block) < 1e-5
