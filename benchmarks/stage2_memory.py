"""Device memory of the full-size stage-2 step, from the compiler's own analysis; no weights are allocated.

    python benchmarks/stage2_memory.py                              # 14 x 512 x 512, batch 1, bfloat16, remat `full`
    python benchmarks/stage2_memory.py --trainable=lora             # one choice of groups only
    python benchmarks/stage2_memory.py --lower                      # where the host is too small to compile
    python benchmarks/stage2_memory.py --config=configs/stage2.py:tiny --height=32 --width=48

The step is the one that training runs, encoding of the clips included, for one device of the default backend. On CPU,
XLA computes bfloat16 in float32 and has no fused attention: its temporaries are an upper bound for an accelerator's.
A full-size compilation took 25 minutes and 18.6 GB of host memory on 2 cores; on a GPU, minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from cpu_options import CPU_OPTIONS
from flax.traverse_util import unflatten_dict
from jax.sharding import AxisType
from ml_collections import ConfigDict

from osv_jax import experiment
from osv_jax.convert.architectures import ARCHITECTURES, expected_params
from osv_jax.models import groups
from osv_jax.runtime.mesh import AXES

CHOICES = (("lora", "temporal_transformer"), ("lora",))


def load_config(file: str) -> ConfigDict:
    config = experiment.read_config(file)
    if config.weights:  # Without weights to look at, the architectures are the defaults: Stable Video Diffusion's.
        config.weights, config.random_networks.unet = "", {}
    return config


def lower(config: ConfigDict) -> tuple[dict[str, Any], Callable[[], Any]]:
    """The step's arguments by name, as shapes, and a function that lowers it."""
    networks, optimizers = experiment.networks_of(config), experiment.optimizers_of(config)

    def in_dtype(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.dtype))

    frozen = {name: unflatten_dict(expected_params(name, getattr(networks, name).config)) for name in ARCHITECTURES}
    frozen = jax.tree.map(in_dtype, frozen)
    state = jax.eval_shape(experiment.make_init(config, networks, optimizers), jax.random.key(0), frozen["unet"])
    _, height, width = config.data.resolutions[0]
    clips = {
        "video": jax.ShapeDtypeStruct((config.batch_size, config.data.num_frames, height, width, 3), jnp.uint8),
        "fps": jax.ShapeDtypeStruct((config.batch_size,), jnp.float32),
    }
    step = jax.jit(experiment.make_train_step(config, networks, optimizers), donate_argnums=0)
    parts = {f"frozen {name}": tree for name, tree in frozen.items()}
    parts |= {f"state {name}": getattr(state, name) for name in state.__dataclass_fields__} | {"clips": clips}
    return parts, lambda: step.lower(state, frozen, clips)


def gigabytes(tree: Any) -> float:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / 1e9


def report(config: ConfigDict, compiles: bool) -> None:
    """Prints what one configuration needs."""
    start = time.perf_counter()
    parts, lower_step = lower(config)
    for name, tree in parts.items():
        print(f"  {name:<24}{gigabytes(tree):8.3f} GB")
    print(f"  {'all arguments':<24}{gigabytes(parts):8.3f} GB", flush=True)
    lowered = lower_step()
    print(f"  lowered in {time.perf_counter() - start:.0f} s", flush=True)
    if not compiles:
        return
    start = time.perf_counter()
    options = CPU_OPTIONS if jax.default_backend() == "cpu" else None
    memory = lowered.compile(options).memory_analysis()
    print(f"  compiled in {time.perf_counter() - start:.0f} s")
    sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "temp", "output", "alias")}
    for name, size in sizes.items():
        print(f"  {name:<24}{size / 1e9:8.3f} GB")
    # Outputs that take the place of an argument need no memory of their own.
    total = sum(sizes.values()) - 2 * sizes["alias"]
    print(f"  {'total':<24}{total / 1e9:8.3f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/stage2.py")
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--trainable", nargs="+", choices=groups.TRAINABLE, help="default: two choices in turn")
    parser.add_argument("--lower", action="store_true", help="do not compile")
    arguments = parser.parse_args()

    config = load_config(arguments.config)
    config.batch_size = 1
    config.data.resolutions = ((0, arguments.height, arguments.width),)
    mesh = jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        for trainable in [tuple(arguments.trainable)] if arguments.trainable else CHOICES:
            config.trainable = trainable
            frames = config.data.num_frames
            print(
                f"{' + '.join(trainable)}, {frames} x {arguments.height} x {arguments.width}, batch 1, {config.dtype},"
                f" remat {config.remat}, {jax.devices()[0].device_kind}"
            )
            report(config, not arguments.lower)


if __name__ == "__main__":
    main()
