"""What a run has achieved: its loss, and how far one-step samples are from the teacher's, before and after.

    python benchmarks/distance_to_teacher.py runs/demo/stage2

The run's Huber loss depends so much on the noise level drawn that its curve says little; here it is computed for the
state before the first step and for the last checkpoint on the same clips, levels and noise.

Then teacher (25 Euler steps, guidance 1 to 3 over the frames), untrained student and trained student start from the
same noise and the same first frames; printed is the mean squared error of the latents over 16 clips, with the spread.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from osv_jax import clips, experiment
from osv_jax.data import pixels
from osv_jax.diffusion import samplers
from osv_jax.diffusion.edm import SIGMA_MAX, denoise
from osv_jax.diffusion.ode import guided_denoiser
from osv_jax.distill.networks import Networks
from osv_jax.distill.pixels import encode_batch
from osv_jax.runtime import checkpoint, mesh
from osv_jax.runtime.trained import load_trained


def compare_losses(
    config: ConfigDict,
    workdir: pathlib.Path,
    networks: Networks,
    frozen: dict[str, Any],
    index: pixels.ClipIndex,
    batches: int,
) -> None:
    """Prints the Huber loss of the first and of the last state, over the same draws."""
    devices = mesh.make_mesh(-1, 1)
    optimizers = experiment.optimizers_of(config)
    init = experiment.make_init(config, networks, optimizers)
    with jax.set_mesh(devices), checkpoint.open_checkpoints(workdir, config.keep_checkpoints) as checkpoints:
        shapes = jax.eval_shape(init, jax.random.key(0), frozen["unet"])
        like = checkpoint.abstract(shapes, mesh.parameter_shardings(devices, shapes))
        states = {
            "before": jax.jit(init)(jax.random.key(config.seed), frozen["unet"]),
            "after": checkpoint.restore_state(checkpoints, checkpoints.latest_step(), like),
        }
        if config.init_from:
            states["before"] = experiment.start_from(pathlib.Path(config.init_from), states["before"], optimizers)
        # The step draws everything from its number: numbers that training has not reached are fresh draws.
        step = jax.jit(experiment.make_train_step(config, networks, optimizers))
        for name, state in states.items():
            losses = []
            for number in range(batches):
                read = [
                    index.read((number * config.batch_size + i) % len(index.clips)) for i in range(config.batch_size)
                ]
                batch = jax.tree.map(lambda *leaves: np.stack(leaves), *read)
                _, metrics = step(state.replace(step=jnp.int32(1_000_000 + number)), frozen, batch)
                losses.append(float(metrics["loss_huber"]))
            print(f"Huber loss {name:<7} {np.mean(losses):.5f} over {batches} batches", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--steps", type=int, default=25, help="of the teacher")
    arguments = parser.parse_args()
    config = ConfigDict(json.loads((arguments.workdir / "config.json").read_text()))
    networks = experiment.networks_of(config)
    frozen = experiment.load_frozen(config, networks, mesh.make_mesh(-1, 1))
    index = clips.index_videos(config, arguments.workdir)
    compare_losses(config, arguments.workdir, networks, frozen, index, arguments.clips)

    trained = load_trained(arguments.workdir)
    students = {"untrained": frozen["unet"], "trained": trained.merge_into(frozen["unet"])}
    guidance = jnp.linspace(1.0, 3.0, config.data.num_frames)

    @jax.jit
    def samples(unet: dict, frozen: dict, video: jax.Array, key: jax.Array, teach: bool) -> jax.Array:
        encode_key, noise_key = jax.random.split(key)
        fps = jnp.full(1, config.data.fps)
        batch = encode_batch(networks, frozen, video[None], fps, encode_key, config.data.motion_bucket_id)
        noise = jax.random.normal(noise_key, batch.latents.shape)
        network = networks.unet_with({"params": unet})

        def teacher(noise: jax.Array) -> jax.Array:
            denoiser = guided_denoiser(network, batch.cond, guidance)
            return samplers.euler(denoiser, noise, samplers.euler_levels(arguments.steps))

        def student(noise: jax.Array) -> jax.Array:
            return denoise(network, SIGMA_MAX * noise, jnp.full(1, SIGMA_MAX), batch.cond, config.boundary)

        return jax.lax.cond(teach, teacher, student, noise)

    errors: dict[str, list[float]] = {name: [] for name in students}
    for clip in range(arguments.clips):
        video, key = index.read(clip % len(index.clips))["video"], jax.random.key(1000 + clip)
        target = samples(frozen["unet"], frozen, video, key, True)
        for name, unet in students.items():
            errors[name].append(float(jnp.mean((samples(unet, frozen, video, key, False) - target) ** 2)))
    for name, values in errors.items():
        print(f"{name:<10} {np.mean(values):.5f} +- {np.std(values):.5f} over {len(values)} clips")
    print(f"trained is {np.mean(errors['untrained']) / np.mean(errors['trained']):.2f} times closer")


if __name__ == "__main__":
    main()
