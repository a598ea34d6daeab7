"""The same inputs through diffusers' UNet and through ours."""

from __future__ import annotations

import numpy as np
import torch
from conftest import quick_jit
from tiny_pipeline import UNET

from osv_jax.models.svd_unet import SVDUNet

# Batch 2, odd sizes; a time and a noise strength of its own for each clip.
_RNG = np.random.default_rng(0)
_SHAPES = (2, 3, 5, 7, 8), (2,), (2, UNET.cross_attention_dim), (2, 3)
_INPUTS = [_RNG.standard_normal(shape, np.float32) for shape in _SHAPES]
_apply = quick_jit(SVDUNet(UNET).apply)


def run_flax(variables) -> np.ndarray:
    """Our tiny UNet with these variables, [b f h w c]."""
    return np.asarray(_apply(variables, *_INPUTS))


def run_torch(unet: torch.nn.Module) -> np.ndarray:
    """diffusers' tiny UNet, with or without adapters, [b f h w c]."""
    sample, timestep, embedding, ids = map(torch.tensor, _INPUTS)
    with torch.no_grad():
        sample = sample.permute(0, 1, 4, 2, 3).contiguous()
        output = unet(sample, timestep, embedding[:, None], ids, return_dict=False)[0]
    return output.permute(0, 1, 3, 4, 2).numpy()
