"""I3D in PyTorch under the names of its two ports, written from the paper and TensorFlow's padding rule."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

CHANNELS = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
POOLED_BEFORE = {"3b": ((1, 3, 3), (1, 2, 2)), "4b": ((3, 3, 3), (2, 2, 2)), "5b": ((2, 2, 2), (2, 2, 2))}


def pad_same(x: torch.Tensor, window: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """Zeros so that an axis of n gives ceil(n / stride) windows, one more at the far end where they are odd."""
    padding = []
    for length, size, stride in zip(x.shape[2:], window, strides, strict=True):
        total = max((-(-length // stride) - 1) * stride + size - length, 0)
        padding = [total // 2, total - total // 2, *padding]
    return functional.pad(x, padding)


class Unit(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, window: int, stride: int = 1, norm: str = "bn"):
        super().__init__()
        self.window, self.stride, self.norm = (window,) * 3, (stride,) * 3, norm
        self.conv3d = nn.Conv3d(inputs, outputs, window, stride, bias=not norm)
        if norm:
            setattr(self, norm, nn.BatchNorm3d(outputs, eps=1e-3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv3d(pad_same(x, self.window, self.stride))
        return functional.relu(getattr(self, self.norm)(x)) if self.norm else x


class Mixed(nn.Module):
    """Four branches, under the names of pytorch-i3d."""

    def __init__(self, inputs: int, channels: tuple[int, ...]):
        super().__init__()
        self.b0 = Unit(inputs, channels[0], 1)
        self.b1a, self.b1b = Unit(inputs, channels[1], 1), Unit(channels[1], channels[2], 3)
        self.b2a, self.b2b = Unit(inputs, channels[3], 1), Unit(channels[3], channels[4], 3)
        self.b3b = Unit(inputs, channels[5], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = functional.max_pool3d(pad_same(x, (3, 3, 3), (1, 1, 1)), 3, 1)
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class TorchI3D(nn.Module):
    """All channels are those of the paper divided by `divisor`."""

    def __init__(self, classes: int = 400, divisor: int = 1):
        super().__init__()
        stem = 64 // divisor
        self.Conv3d_1a_7x7 = Unit(3, stem, 7, 2)
        self.Conv3d_2b_1x1 = Unit(stem, stem, 1)
        self.Conv3d_2c_3x3 = Unit(stem, 3 * stem, 3)
        inputs = 3 * stem
        for name, counts in CHANNELS.items():
            channels = tuple(count // divisor for count in counts)
            setattr(self, f"Mixed_{name}", Mixed(inputs, channels))
            inputs = channels[0] + channels[2] + channels[4] + channels[5]
        self.logits = Unit(inputs, classes, 1, norm="")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool3d(pad_same(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2)), (1, 3, 3), (1, 2, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        for name in CHANNELS:
            if name in POOLED_BEFORE:
                window, strides = POOLED_BEFORE[name]
                x = functional.max_pool3d(pad_same(x, window, strides), window, strides)
            x = getattr(self, f"Mixed_{name}")(x)
        return self.logits(functional.avg_pool3d(x, (2, 7, 7), 1)).mean(dim=(2, 3, 4))


def random_i3d(divisor: int = 8, classes: int = 20, seed: int = 0) -> TorchI3D:
    """Random weights and statistics, the scales of batch normalisation being one."""
    generator = torch.Generator().manual_seed(seed)
    model = TorchI3D(classes, divisor).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.randn(value.shape, generator=generator) if value.is_floating_point() else None
            if value.ndim > 1:
                value.copy_(noise * (2 / value[0].numel()) ** 0.5)
            elif name.endswith("running_var"):
                value.copy_(torch.exp(noise))
            elif noise is not None and not name.endswith("bn.weight"):
                value.copy_(0.3 * noise)
    return model
