"""PyTorch reference networks with random weights, and their weights as Flax trees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import UNetSpatioTemporalConditionModel
from flax.traverse_util import unflatten_dict

from osv_jax.convert import naming
from osv_jax.convert.architectures import expected_params
from osv_jax.models.svd_unet import UNetConfig


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values everywhere, around 1 for norms' weights: identity initialisation would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                value.copy_(noise * value[0].numel() ** -0.5)
            else:
                value.copy_(0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval()


def torch_unet(config: UNetConfig, seed: int = 0) -> UNetSpatioTemporalConditionModel:
    down = [("CrossAttn" if a else "") + "DownBlockSpatioTemporal" for a in config.has_attention]
    up = [("CrossAttn" if a else "") + "UpBlockSpatioTemporal" for a in reversed(config.has_attention)]
    model = UNetSpatioTemporalConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        transformer_layers_per_block=config.transformer_layers_per_block,
        num_attention_heads=config.num_attention_heads,
        cross_attention_dim=config.cross_attention_dim,
        addition_time_embed_dim=config.addition_time_embed_dim,
        projection_class_embeddings_input_dim=config.num_added_time_ids * config.addition_time_embed_dim,
        num_frames=config.num_frames,
    )
    return randomise(model, seed)


def flax_params(model: torch.nn.Module, component: str, config) -> dict:
    """The weights of a PyTorch network as the tree of our `component`, each copied; none may be left over."""
    state = dict(model.state_dict())
    params = {
        path: jnp.array(naming.to_flax(path, state.pop(naming.torch_name(path)).numpy()))
        for path in expected_params(component, config)
    }
    assert not state, f"left over: {sorted(state)}"
    return unflatten_dict(params)


def random_params(module, *inputs, seed=0):
    """The module's parameters with normal values; norm scales and kernels keep a sensible magnitude."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return values / np.float32(np.prod(leaf.shape[:-1]) ** 0.5)
        return 1 + 0.3 * values if path[-1].key == "scale" else 0.5 * values

    return jax.tree.map_with_path(draw, shapes)


def torch_state(params, copy=True):
    """PyTorch's state dict of a parameter tree: the naming rule of the package, written out a second time."""
    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *modules, name = (key.key for key in path)
        modules = [
            f"{module.rpartition('_')[0]}.{module.rpartition('_')[2]}"
            if module.rpartition("_")[2].isdigit() and module not in ("linear_1", "linear_2")
            else module
            for module in modules
        ]
        leaf = np.moveaxis(leaf, (-1, -2), (0, 1)) if name == "kernel" else leaf
        name = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(name, name)
        state[".".join([*modules, name])] = torch.tensor(np.ascontiguousarray(leaf)) if copy else leaf
    return state


def to_torch(x):
    """[*batch h w c] -> [n c h w]"""
    return torch.tensor(np.moveaxis(x.reshape(-1, *x.shape[-3:]), -1, 1))


def from_torch(x, batch):
    """[n c h w] -> [*batch h w c]"""
    return np.moveaxis(x.detach().numpy(), 1, -1).reshape(*batch, *x.shape[2:], x.shape[1])
