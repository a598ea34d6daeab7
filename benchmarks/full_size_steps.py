"""Optimizer steps of the full-size networks with random weights, on whatever device there is.

    python benchmarks/full_size_steps.py --config=configs/stage1.py --height=64 --width=64 --steps=2

Prints compilation time, seconds a step, and the peak memory of the process (and of the device, where it tells).
The configuration is the real one: only weights and clips are made up.
"""

from __future__ import annotations

import argparse
import resource
import time

import jax
import numpy as np

from osv_jax.planning.compiling import CPU_OPTIONS
from osv_jax.runtime import mesh
from osv_jax.runtime.ranges import COUNT, PIXELS
from osv_jax.training import setup
from osv_jax.training.config import read_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/stage1.py")
    parser.add_argument("--height", type=PIXELS, default=64)
    parser.add_argument("--width", type=PIXELS, default=64)
    parser.add_argument("--batch-size", type=COUNT, default=1)
    parser.add_argument("--steps", type=COUNT, default=2)
    arguments = parser.parse_args()
    config = read_config(arguments.config)
    config.weights, config.random_networks.unet = "", {}
    config.batch_size = arguments.batch_size
    config = setup.with_num_frames(config)

    devices = mesh.make_mesh(-1, 1)
    networks = setup.networks_of(config)
    objective = setup.objective_of(config, networks)
    with jax.set_mesh(devices):
        start = time.perf_counter()
        frozen = setup.load_frozen(config, networks, devices)
        init = setup.make_init(objective)
        state = jax.block_until_ready(jax.jit(init)(jax.random.key(0), frozen))
        print(f"random weights and state: {time.perf_counter() - start:.0f} s, {_host_gib():.1f} GiB", flush=True)
        print(setup.describe(config, objective, state, frozen, 0), flush=True)

        shape = (config.batch_size, config.data.num_frames, arguments.height, arguments.width, 3)
        rng = np.random.default_rng(0)
        batch = {
            "video": rng.integers(0, 256, shape, np.uint8),
            "fps": np.full(config.batch_size, config.data.fps, np.float32),
            "clip_id": np.zeros(config.batch_size, np.int32),
        }
        batch = jax.device_put(batch, mesh.batch_shardings(devices, batch))
        start = time.perf_counter()
        program = jax.jit(setup.make_train_step(config, objective), donate_argnums=0)
        options = CPU_OPTIONS if jax.default_backend() == "cpu" else None
        step = program.lower(state, frozen, batch).compile(options)
        print(f"compiled in {time.perf_counter() - start:.0f} s, {_host_gib():.1f} GiB", flush=True)
        print(step.memory_analysis(), flush=True)
        for number in range(1, arguments.steps + 1):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, frozen, batch))
            seconds = time.perf_counter() - start
            losses = {name: float(metrics[name]) for name in ("loss_huber", "loss_adversarial", "loss_disc")}
            print(f"step {number}: {seconds:.1f} s, {losses}, {_host_gib():.1f} GiB", flush=True)
            assert all(np.isfinite(value) for value in losses.values()), "a loss is not finite"
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        print(f"peak of device memory: {stats['peak_bytes_in_use'] / 2**30:.1f} GiB")


def _host_gib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
