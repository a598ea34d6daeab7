"""Times this package's networks beside their PyTorch references, in one process and on one device.

    python benchmarks/beside_pytorch.py --size=tiny                     # a minute on a CPU
    python benchmarks/beside_pytorch.py --size=full --dtype=bfloat16    # one GPU of 80 GB

Both sides have the same random weights and inputs, and their results are compared before anything is timed. Runs
alternate, so that whatever else the machine does meets both. The references are diffusers' UNet and VAE with PyTorch's
fused attention, PEFT's LoRA on that UNet, and transformers' DINOv2 and CLIP; on a GPU they are also compiled by
`torch.compile`. `stage1_step` and `stage2_step` are whole training steps of OSV, and `discriminator` the gradient of
its mean logit with respect to latents; what is compared of a step are the gradients of every part that learns.
`image_to_latents` and `image_to_mp4` are what a user of a one-step student waits for. Prints a table in Markdown and
writes the same as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# Both have to fit into one GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from pytorch_pairs import SIZES, Pair
from pytorch_steps import Steps

from osv_jax.planning.hlo import operations
from osv_jax.runtime.compiler import compiler_options
from osv_jax.runtime.ranges import COUNT, PIXELS

PARTS = (
    "unet",
    "student",
    "vae_encode",
    "vae_decode",
    "dinov2",
    "discriminator",
    "stage1_step",
    "stage2_step",
    "image_to_latents",
    "image_to_mp4",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table; times in seconds, medians over the runs, and their quotient run by run."""

    name: str
    ours: float
    theirs: float
    faster: float
    compile: float
    memory: float
    tflops: float
    of_ceiling: float
    error: float


def difference(ours: Any, theirs: Any) -> float:
    """The norm of the difference over the reference's; of several parts, the largest."""
    if isinstance(theirs, dict):
        return max(difference(ours[name], part) for name, part in theirs.items())
    return float(np.linalg.norm(ours - theirs.reshape(ours.shape)) / np.linalg.norm(theirs))


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    jax.block_until_ready(result)
    return time.perf_counter() - start


def ceiling(dtype: jnp.dtype, device: str) -> float:
    """TFLOP/s of a large product of matrices, the best of ten."""
    side = 1024 if device == "cpu" else 8192
    x = jnp.ones((side, side), dtype)
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    return 2 * side**3 / min(seconds_of(lambda: multiply(x)) for _ in range(10)) / 1e12


def measure(name: str, pair: Pair, runs: int, top: float, bound: float) -> Row:
    """Compiles, compares, and times in turn."""
    start = time.perf_counter()
    traced = pair.ours.trace(*pair.arguments)
    program = traced.lower().compile(compiler_options())
    compiling = time.perf_counter() - start
    with torch.no_grad():
        error = difference(pair.read(program(*pair.arguments)), pair.compare(pair.theirs()))
        if not error < bound:
            sys.exit(f"{name}: the two sides differ by {error:.1e}, expected less than {bound:.0e}: nothing was timed.")

        def ours() -> Any:
            result = program(*pair.arguments)
            return pair.finish(pair.read(result)) if pair.finish else result

        def theirs() -> Any:
            result = pair.theirs()
            return pair.finish(pair.compare(result)) if pair.finish else result

        pairs = [(seconds_of(ours), seconds_of(theirs)) for _ in range(runs)]
    median_ours, median_theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    tflops = operations(traced.jaxpr.jaxpr) / median_ours / 1e12
    faster = statistics.median(theirs / ours for ours, theirs in pairs)
    return Row(name, median_ours, median_theirs, faster, compiling, held / 1e9, tflops, tflops / top, error)


def table(rows: list[Row]) -> Iterator[str]:
    yield "| | ours | PyTorch | PyTorch / ours | compiled in | memory | TFLOP/s | of a product's | difference |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row.name} | {row.ours:.4f} s | {row.theirs:.4f} s | {row.faster:.2f} | {row.compile:.0f} s | "
            f"{row.memory:.2f} GB | {row.tflops:.3f} | {100 * row.of_ceiling:.0f} % | {row.error:.1e} |"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--height", type=PIXELS, help="of frames, in place of the size's")
    parser.add_argument("--width", type=PIXELS)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--runs", type=COUNT, default=5)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/beside_pytorch.json"))
    chosen = parser.parse_args(arguments)
    changes = {name: value for name in ("height", "width") if (value := getattr(chosen, name))}
    size = dataclasses.replace(SIZES[chosen.size], **changes)
    bench = Steps(size, chosen.dtype, compile_reference=jax.default_backend() == "gpu")
    top = ceiling(bench.dtype, bench.device)
    device = jax.devices()[0].device_kind
    print(f"{device}, {chosen.size}, {size.num_frames} x {size.height} x {size.width}, {chosen.dtype}; ", end="")
    print(f"a product of matrices reaches {top:.3f} TFLOP/s", flush=True)
    bound, rows = {"float32": 1e-3, "bfloat16": 1e-1}[chosen.dtype], []
    for name in chosen.parts:
        rows.append(measure(name, getattr(bench, name)(), chosen.runs, top, bound))
        print(f"{name}: {rows[-1].ours:.4f} s, PyTorch {rows[-1].theirs:.4f} s", flush=True)
    print("\n".join(table(rows)))
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    written = {"device": device, "ceiling": top, **vars(chosen), "rows": [dataclasses.asdict(row) for row in rows]}
    chosen.output.write_text(json.dumps(written | {"output": str(chosen.output)}, indent=1))


if __name__ == "__main__":
    main()
