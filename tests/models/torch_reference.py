"""PyTorch reference networks with random weights, and their weights as Flax trees."""

from __future__ import annotations

import jax.numpy as jnp
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
