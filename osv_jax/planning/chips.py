"""Kinds of devices: what their makers state, and what compilers need to know of GPUs that are not there.

`gpus/NAME.txtpb` is what a GPU tells XLA about itself (XLA's `GpuTargetConfigProto` as text) after one line of our own:
the dense bfloat16 operations a second that its maker states, with sums in float32.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re

_FOLDER = pathlib.Path(__file__).with_name("gpus")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of device.

    Attributes:
        memory: that programs can use [bytes]; None if unknown.
        peak: dense bfloat16 operations a second; None if unknown.
        bandwidth: of its memory [bytes/s]; None if unknown.
        target: XLA's description of a GPU.
        unknown: what a compiler cannot know without such a device.
    """

    name: str
    memory: float | None = None
    peak: float | None = None
    bandwidth: float | None = None
    target: str = ""
    unknown: str = ""


CPU = Chip("CPU", unknown="how an accelerator's would fuse; this one computes bfloat16 in float32")

# The memory is what libtpu gives to programs, a little less than the chip has; the rest are Google's figures.
_OF_TPUS = "what generating code adds: the program itself, and scratch memory of single operations"
TPUS = {
    "v5e": Chip("TPU v5e", 15.75 * 2**30, 197e12, 819e9, unknown=_OF_TPUS),
    "v5p": Chip("TPU v5p", 95.74 * 2**30, 459e12, 2765e9, unknown=_OF_TPUS),
    "v6e": Chip("TPU v6e", 31.25 * 2**30, 918e12, 1638e9, unknown=_OF_TPUS),
}

# The part of a GPU's memory that the scripts in launch/ give to programs.
_GPU_FRACTION = 0.92
_OF_GPUS = (
    "which kernels cuDNN and cuBLAS would choose by timing them, and therefore the scratch memory of convolutions and"
    " of attention's gradient, nor what XLA's own matrix kernels would fuse with products; what NCCL and CUDA"
    " themselves take is not in the total either"
)


def gpu_names() -> list[str]:
    """Of all GPUs that are described."""
    return sorted(path.stem for path in _FOLDER.glob("*.txtpb"))


def gpu(name: str) -> Chip:
    """One of `gpu_names`."""
    facts, target = (_FOLDER / f"{name}.txtpb").read_text().split("\n", 1)

    def fact(key: str, text: str = target) -> str:
        match = re.search(rf'\b{key}: "?([^"\n]+)', text)
        assert match, f"{name}.txtpb does not say {key}"
        return match[1]

    return Chip(
        fact("device_description_str"),
        _GPU_FRACTION * float(fact("device_memory_size")),
        float(fact("bfloat16_operations_per_second", facts)),
        float(fact("memory_bandwidth")),
        target,
        _OF_GPUS,
    )


def nearest_gpu(gigabytes: float) -> str:
    """The name of the described GPU whose memory is nearest; of those with the same, the fastest."""

    def distance(name: str) -> tuple[int, float]:
        described = gpu(name)
        assert described.memory and described.peak
        # What is sold as 80 GB has 85e9 bytes, of which programs get 78e9.
        return abs(round(described.memory / 1e9) - round(gigabytes)), -described.peak

    return min(gpu_names(), key=distance)
