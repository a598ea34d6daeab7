"""OSV's discriminator in PyTorch, for `beside_pytorch`: nobody has published one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flax.traverse_util import flatten_dict
from torch import nn
from torch.nn import functional

from osv_jax.convert import naming

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PATCH = 14


class SpectralConv(nn.Module):  # type: ignore[misc]  # Mypy sees nothing of PyTorch.
    """A convolution over its largest singular value, of which the vector `u` is kept; see `models.heads`.

    PyTorch's own parametrisation keeps both vectors, of which one is out of date after each update of the weight.
    """

    u: torch.Tensor

    def __init__(self, inputs: int, outputs: int, window: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *window))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.register_buffer("u", torch.empty(outputs))

    def forward(self, x: torch.Tensor, update: bool) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            with torch.no_grad():
                if update:
                    v = functional.normalize(matrix.T @ self.u, dim=0)
                    self.u.copy_(functional.normalize(matrix @ v, dim=0))
                v = functional.normalize(matrix.T @ self.u, dim=0)
                u = self.u.clone()
            weight = self.weight / (u @ matrix @ v)
        convolve = functional.conv2d if weight.ndim == 4 else functional.conv1d
        return convolve(x, weight, self.bias, padding="same")


class Head(nn.Module):  # type: ignore[misc]  # Mypy sees nothing of PyTorch.
    """A pointwise block, a residual block, one logit a position."""

    def __init__(self, width: int, window: tuple[int, ...]) -> None:
        super().__init__()
        pointwise = (1,) * len(window)
        self.in_conv, self.in_norm = SpectralConv(width, width, pointwise), nn.GroupNorm(32, width)
        self.residual_conv, self.residual_norm = SpectralConv(width, width, window), nn.GroupNorm(32, width)
        self.out_conv = SpectralConv(width, 1, pointwise)

    def forward(self, x: torch.Tensor, update: bool) -> torch.Tensor:
        x = functional.leaky_relu(self.in_norm(self.in_conv(x, update)), 0.2)
        y = functional.leaky_relu(self.residual_norm(self.residual_conv(x, update)), 0.2)
        return self.out_conv((x + y) / 2**0.5, update).float()


class Discriminator(nn.Module):  # type: ignore[misc]  # Mypy sees nothing of PyTorch.
    """Latents, upsampled, through DINOv2, which stays frozen, to the logits of all heads of a clip [b n].

    Args:
        variables: `params` and `spectral`, as `models.discriminator.init_discriminator` makes them.
        backbone: transformers' DINOv2.
    """

    def __init__(self, variables: Mapping[str, Any], backbone: Any, blocks: tuple[int, ...], width: int) -> None:
        super().__init__()
        # Not a part of this module: its parameters are none of the player's.
        self.see = lambda x: backbone(x, output_hidden_states=True).hidden_states
        self.blocks = blocks
        self.upsampler = nn.Conv2d(4, variables["params"]["upsampler"]["bias"].shape[0], 3, padding=1)
        self.spatial = nn.ModuleList(Head(width, (3, 3)) for _ in blocks)
        self.temporal = nn.ModuleList(Head(width, (3,)) for _ in blocks)
        values = {**flatten_dict(variables["params"]), **flatten_dict(variables["spectral"])}
        named = dict(naming.to_torch(path, np.asarray(leaf, np.float32)) for path, leaf in values.items())
        self.load_state_dict({name: torch.from_numpy(np.array(array, order="C")) for name, array in named.items()})

    def forward(self, latents: torch.Tensor, update: bool = False) -> torch.Tensor:
        batch, frames = latents.shape[:2]
        upscale = round((self.upsampler.out_channels / 3) ** 0.5)
        pixels = (functional.pixel_shuffle(self.upsampler(latents.flatten(0, 1)), upscale).float() + 1) / 2
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
        sides = [max(1, (side + _PATCH // 2) // _PATCH) * _PATCH for side in pixels.shape[-2:]]
        features = self.see(functional.interpolate((pixels - mean) / std, sides, mode="bilinear"))
        logits: list[torch.Tensor] = []
        for block, spatial, temporal in zip(self.blocks, self.spatial, self.temporal, strict=True):
            x = features[block + 1][:, 1:].unflatten(1, [side // _PATCH for side in sides]).movedim(-1, 1)
            logits += [spatial(x, update).reshape(batch, -1)]
            tracks = x.unflatten(0, (batch, frames)).permute(0, 3, 4, 2, 1).flatten(0, 2)
            logits += [temporal(tracks, update).reshape(batch, -1)]
        return torch.cat(logits, dim=1)
