"""A stand-in for the UNet, for tests in which only what is done with it matters."""

import contextlib
import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from osv_jax import train
from osv_jax.convert.architectures import ARCHITECTURES
from osv_jax.models.layers import Dense, FeedForward
from osv_jax.models.svd_unet import SVDUNet
from osv_jax.objectives import networks, objective
from osv_jax.training import loop, previews


class _Block(nn.Module):
    dtype: object
    param_dtype: object

    @nn.compact
    def __call__(self, x):
        return x + FeedForward(self.dtype, self.param_dtype, name="ff")(x)


class _Attention(nn.Module):
    dtype: object
    param_dtype: object

    @nn.compact
    def __call__(self, x):
        return _Block(self.dtype, self.param_dtype, name="temporal_transformer_blocks_0")(x)


class ToyUNet(SVDUNet):
    """Depends on all its inputs, has LoRA modules and a temporal transformer's parameters, and compiles at once."""

    @nn.compact
    def __call__(self, sample, timestep, image_embedding, added_time_ids, features=""):
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shift = timestep + image_embedding.mean(axis=-1) + 0.01 * added_time_ids.sum(axis=-1)
        x = Dense(16, name="proj_in", **dtypes)(sample) + shift[:, None, None, None, None].astype(self.dtype)
        x = _Attention(name="attentions_0", **dtypes)(jnp.sin(x))
        if features:
            # As wide as the one level of the UNet whose place it takes.
            block = jnp.concatenate([x, jnp.cos(x), jnp.sin(3 * x), x**2], axis=-1)
            return (block,) * {"encoder": 1, "unet": 3}[features]
        return Dense(4, name="conv_out", **dtypes)(x + x[:, ::-1]).astype(jnp.float32)


# Of a configuration, what the step does not depend on; of `data` it depends on the batch's shape only.
_NOT_OF_THE_STEP = (
    "checkpoint_every",
    "data",
    "eval_every",
    "evaluation",
    "init_from",
    "keep_checkpoints",
    "log_every",
    "num_steps",
    "picture_every",
)
_PROGRAMS = {}


def _compile_once(compile_step):
    """`loop.compile_step` that compiles once for all runs of a process with the same step, as stopped and resumed."""

    def remembered(run, state, batch):
        settings = {name: value for name, value in run.config.to_dict().items() if name not in _NOT_OF_THE_STEP}
        shapes = str(jax.tree.map(jax.typeof, (state, batch)))
        key = (json.dumps(settings, sort_keys=True), shapes, run.devices)
        if key not in _PROGRAMS:
            _PROGRAMS[key] = compile_step(run, state, batch)
        return _PROGRAMS[key]

    return remembered


@contextlib.contextmanager
def toy_training():
    """Training on one device, the toy for the UNet and no pictures: those compile slowly and have their own tests.

    Yields:
        The mesh of one device.
    """
    mesh = tiny.one_device_mesh()
    with toy_networks(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.mesh, "make_mesh", lambda *sizes: mesh)
        patch.setattr(loop, "compile_step", _compile_once(loop.compile_step))
        yield mesh


@contextlib.contextmanager
def toy_networks():
    """Training with the toy for the UNet, without pictures, and with curves drawn once."""

    def build_networks(*args, **options):
        made = networks.build_networks(*args, **options)
        unet = made.unet
        return dataclasses.replace(made, unet=ToyUNet(unet.config, unet.dtype, unet.param_dtype))

    with pytest.MonkeyPatch.context() as patch:
        curves = loop.metrics.loss_curves
        patch.setattr(loop.metrics, "loss_curves", lambda rows, png, names: png.exists() or curves(rows, png, names))
        patch.setattr(previews, "make_picture", lambda *_: lambda *_: (np.zeros((8, 8, 3), np.uint8), {}))
        patch.setattr(objective, "build_networks", build_networks)
        patch.setitem(ARCHITECTURES, "unet", dataclasses.replace(ARCHITECTURES["unet"], network=ToyUNet))
        yield
