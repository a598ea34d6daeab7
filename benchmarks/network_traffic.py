"""What one network reads, writes and needs on a device that need not be there: docs/performance.md quotes the results.

    python benchmarks/network_traffic.py unet --topology=h100:1
    python benchmarks/network_traffic.py decode --topology=h100:1

The networks of Stable Video Diffusion, in bfloat16 as training and sampling run them, with parameters that are shapes
only. It takes the extra that `osv_jax.plan` takes for the topology, and minutes of compiling.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from osv_jax.convert.architectures import expected_params
from osv_jax.models.svd_unet import SVDUNet, UNetConfig
from osv_jax.models.svd_vae import SVDVAE, VAEConfig
from osv_jax.planning.compiling import CPU_OPTIONS, GPU_OPTIONS
from osv_jax.planning.hlo import analyse, operations
from osv_jax.planning.report import describe
from osv_jax.planning.topologies import devices_of
from osv_jax.runtime.ranges import NUM_FRAMES, PIXELS

Shapes = Mapping[tuple[str, ...], jax.ShapeDtypeStruct]
Program = tuple[Callable[..., Any], Shapes, list[jax.ShapeDtypeStruct]]


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=PROGRAMS)
    parser.add_argument("--topology", default="h100:1", help="as of osv_jax.plan (default %(default)s)")
    parser.add_argument("--num_frames", type=NUM_FRAMES, default=14, help="(default %(default)s)")
    parser.add_argument("--height", type=PIXELS, default=576, help="(default %(default)s)")
    parser.add_argument("--width", type=PIXELS, default=1024, help="(default %(default)s)")
    parser.add_argument("--save", type=pathlib.Path, help="a file for the compiled program, as text")
    args = parser.parse_args()
    chip, devices = devices_of(args.topology)
    axes = ("data", "fsdp", "context")
    mesh = jax.make_mesh((1, 1, 1), axes, axis_types=(AxisType.Auto,) * 3, devices=devices[:1])
    started = time.monotonic()
    traced = trace(PROGRAMS[args.network](args.num_frames, args.height, args.width), mesh)
    options = {"cpu": CPU_OPTIONS, "gpu": GPU_OPTIONS}.get(devices[0].platform)
    compiled = traced.lower().compile(options)
    plan = analyse(compiled, operations(traced.jaxpr.jaxpr))
    verdict = f"Compiled in {time.monotonic() - started:.0f} s."
    print(f"{args.network}, {args.num_frames} x {args.height} x {args.width}, bfloat16, one of {args.topology}:")
    print(describe(plan, chip, verdict))
    if args.save:
        args.save.write_text(compiled.as_text() or "")


def trace(program: Program, mesh: Mesh) -> jax.stages.Traced:
    """The program with its arguments on the mesh's one device."""
    function, shapes, inputs = program
    placed = NamedSharding(mesh, PartitionSpec())
    params = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=placed) for path, leaf in shapes.items()}
    arguments = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed) for leaf in inputs]
    with jax.set_mesh(mesh):
        return jax.jit(function).trace(unflatten_dict(params), *arguments)


def unet(num_frames: int, height: int, width: int) -> Program:
    """One evaluation of the UNet."""
    config = UNetConfig()
    network = SVDUNet(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    sizes = (1, num_frames, height // 8, width // 8, 8), (1,), (1, config.cross_attention_dim), (1, 3)
    inputs = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    return lambda params, *given: network.apply({"params": params}, *given), expected_params("unet", config), inputs


def decode(num_frames: int, height: int, width: int) -> Program:
    """The VAE's decoder on a whole clip."""
    return _vae("decode", (1, num_frames, height // 8, width // 8, 4))


def encode(num_frames: int, height: int, width: int) -> Program:
    """The VAE's encoder on all frames of a clip at once."""
    return _vae("encode", (num_frames, height, width, 3))


def _vae(method: str, size: tuple[int, ...]) -> Program:
    config = VAEConfig()
    network = SVDVAE(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)

    def apply(params: dict[str, Any], x: jax.Array) -> Any:
        return network.apply({"params": params}, x, method=method)

    return apply, expected_params("vae", config), [jax.ShapeDtypeStruct(size, jnp.float32)]


PROGRAMS = {"unet": unet, "decode": decode, "encode": encode}

if __name__ == "__main__":
    main()
