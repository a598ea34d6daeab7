"""Trains: `python -m osv_jax.train --config=configs/stage1.py --workdir=runs/stage1`.

Started again with the same arguments it resumes, exactly, from the last checkpoint. The workdir receives config.json,
checkpoints/, metrics.jsonl, tensorboard/, pictures/ and losses.png.
"""

from __future__ import annotations

import collections
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict, config_flags

from osv_jax.convert import weights
from osv_jax.convert.architectures import ARCHITECTURES, expected_params
from osv_jax.data import demo, pixels
from osv_jax.diffusion.edm import BOUNDARIES, SIGMA_MAX, denoise
from osv_jax.distill import stage1
from osv_jax.distill.adversarial import AdversarialOptions
from osv_jax.distill.networks import Networks, Params, build_networks, random_params
from osv_jax.distill.pixels import encode_batch
from osv_jax.distill.state import TrainState, init_state, make_optimizer
from osv_jax.errors import UserError
from osv_jax.models import lora
from osv_jax.models.layers import ATTENTION_IMPLEMENTATIONS
from osv_jax.models.svd_unet import REMAT_POLICIES
from osv_jax.runtime import checkpoint, mesh, metrics, pictures

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/, e.g. configs/stage1.py:tiny.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures.")

# Steps the host may be ahead of the devices: enough that they never wait for it, few enough that a value that is not
# finite is noticed at once.
_STEPS_IN_FLIGHT = 2


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells 20 lines about every checkpoint.
    if argv[1:]:
        raise UserError(f"Unexpected argument {argv[1]!r}; options look like --config.batch_size=4.")
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise UserError("Both --config and --workdir are needed, e.g. --config=configs/stage1.py --workdir=runs/a.")
    train(_CONFIG.value, pathlib.Path(_WORKDIR.value))


def train(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Runs or resumes one training run.

    Raises:
        UserError: on anything the user can mend, before compilation starts where it can be known by then.
    """
    check_config(config)
    checkpoint.check_workdir(workdir, config.to_dict())
    networks = networks_of(config)
    index = index_videos(config, workdir)
    devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
    if config.batch_size % (devices.size * config.grad_accum):
        raise UserError(
            f"config.batch_size={config.batch_size} does not split over {devices.size} devices x"
            f" {config.grad_accum} parts (config.grad_accum); use a multiple of their product."
        )
    checkpoint.write_config(workdir, config.to_dict())

    with jax.set_mesh(devices):
        frozen = load_frozen(config, networks, devices)
        optimizers = optimizers_of(config)

        def init(key: jax.Array) -> TrainState:
            return init_state(key, networks, frozen["unet"], *optimizers, config.lora.rank, config.lora.targets)

        shapes = jax.eval_shape(init, jax.random.key(0))
        shardings = mesh.parameter_shardings(devices, shapes)
        checkpoints = checkpoint.open_checkpoints(workdir, config.keep_checkpoints)
        start = checkpoints.latest_step() or 0
        if start:
            position = checkpoint.restore_data(checkpoints, start)
            pixels.restore_step(position, index, config.batch_size, config.seed)
            state = checkpoint.restore_state(checkpoints, start, checkpoint.abstract(shapes, shardings))
            print(f"Resuming from step {start}.")
        else:
            state = jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))
        print(describe(config, state, frozen, index, devices.size))
        if start < config.num_steps:
            state = _loop(config, workdir, networks, optimizers, devices, index, frozen, state, shardings, checkpoints)
    checkpoints.close()
    print(
        f"Done: {int(state.step)} steps.\n"
        f"  metrics      {workdir / 'metrics.jsonl'}, {workdir / 'losses.png'}, tensorboard --logdir {workdir}\n"
        f"  checkpoints  {workdir / 'checkpoints'}\n"
        f"  pictures     {workdir / 'pictures'}"
    )


def _loop(
    config: ConfigDict,
    workdir: pathlib.Path,
    networks: Networks,
    optimizers: tuple[Any, Any],
    devices: jax.sharding.Mesh,
    index: pixels.ClipIndex,
    frozen: Params,
    state: TrainState,
    shardings: Any,
    checkpoints: Any,
) -> TrainState:
    start = int(state.step)
    process, processes = jax.process_index(), jax.process_count()
    data = pixels.pixel_dataset(
        index, config.batch_size, config.seed, start, process_index=process, process_count=processes
    )
    batches = iter(mesh.global_batches(data, devices))
    batch = next(batches)
    names, step = compile_step(config, networks, optimizers, devices, frozen, state, shardings, batch)
    picture = PreviewPicture(config, networks, index, frozen)
    writer = metrics.MetricsWriter(workdir, start, process)
    in_flight: collections.deque[tuple[int, jax.Array]] = collections.deque()
    clock = last_done = time.perf_counter()

    def finish_one() -> None:
        """Waits for the oldest step in flight, writes its metrics, and stops the run if one is not finite."""
        nonlocal clock, last_done
        number, values = in_flight.popleft()
        row = dict(zip(names, np.asarray(values).tolist(), strict=True))
        now = time.perf_counter()
        row |= {"seconds_per_step": now - last_done, "clips_per_second": config.batch_size / (now - last_done)}
        last_done = now
        writer.write(number, row)
        bad = [name for name in names if not math.isfinite(row[name])]
        if bad:
            kept = checkpoints.latest_step()
            where = f"the checkpoint of step {kept} is intact" if kept else "no checkpoint had been written yet"
            raise UserError(
                f"Step {number}: {', '.join(f'{name} is {row[name]}' for name in bad)}. Training stopped; {where}."
                " Lower the learning rates or set config.optimizer.max_grad_norm, in a new workdir."
            )
        if number % config.log_every == 0 or number == config.num_steps:
            shown = {name: row[name] for name in ("loss_huber", "loss_adversarial", "loss_disc")}
            steps = (number - 1) % config.log_every + 1
            print(metrics.progress_line(number, config.num_steps, (now - clock) / steps, config.batch_size, shown))
            clock = now

    def finish_all() -> None:
        while in_flight:
            finish_one()

    if start == 0 and process == 0:
        writer.write_picture("samples", 0, picture.draw(state, frozen))
    clock = last_done = time.perf_counter()
    for number in range(start + 1, config.num_steps + 1):
        state, values = step(state, frozen, batch)
        in_flight.append((number, values))
        if len(in_flight) > _STEPS_IN_FLIGHT:
            finish_one()
        last = number == config.num_steps
        if not last:
            batch = next(batches)
        if number % config.checkpoint_every == 0 or last:
            finish_all()  # A state whose metrics are not finite must not become a checkpoint.
            checkpoint.save(
                checkpoints, number, state, pixels.save_position(index, config.batch_size, config.seed, number)
            )
        if process == 0 and (number % config.picture_every == 0 or last):
            finish_all()
            writer.write_picture("samples", number, picture.draw(state, frozen))
            curves = ("loss_huber", "loss_adversarial", "loss_disc")
            metrics.loss_curves(workdir / "metrics.jsonl", workdir / "losses.png", curves)
            last_done = time.perf_counter()
    checkpoints.wait_until_finished()
    writer.close()
    return state


def check_config(config: ConfigDict) -> None:
    """What can be known to be wrong from the configuration alone.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    if config.objective != "stage1":
        raise UserError(f"config.objective={config.objective!r} does not exist; the objectives are: stage1.")
    for name in ("height", "width"):
        if config.data[name] <= 0 or config.data[name] % 8:
            raise UserError(f"config.data.{name}={config.data[name]} is not divisible by 8; the VAE needs that.")
    for name in ("batch_size", "grad_accum", "num_steps", "log_every", "picture_every", "checkpoint_every"):
        if config[name] < 1:
            raise UserError(f"config.{name}={config[name]} must be at least 1.")
    choices = {
        "lora.targets": tuple(lora.TARGETS),
        "dtype": ("float32", "bfloat16", "float16"),
        "attention": ATTENTION_IMPLEMENTATIONS,
        "remat": REMAT_POLICIES,
        "boundary": BOUNDARIES,
    }
    flat = flatten_dict(config.to_dict(), sep=".")
    for name, allowed in choices.items():
        if flat[name] not in allowed:
            raise UserError(f"config.{name}={flat[name]!r} is not one of {', '.join(allowed)}.")
    if bool(config.weights) == bool(config.random_networks):
        raise UserError(
            "Exactly one of config.weights (a folder of converted weights) and config.random_networks must be set."
        )


def networks_of(config: ConfigDict) -> Networks:
    """The modules, for the architectures beside the weights or those in the configuration."""
    if config.weights:
        architectures = {name: weights.load_config(config.weights, name) for name in ARCHITECTURES}
    else:
        chosen = config.random_networks.to_dict()
        architectures = {name: known.config(**chosen.get(name, {})) for name, known in ARCHITECTURES.items()}
    depth = architectures["dinov2"].num_hidden_layers
    if not all(0 <= block < depth for block in config.discriminator_blocks):
        raise UserError(
            f"config.discriminator_blocks={tuple(config.discriminator_blocks)} must lie in 0 .. {depth - 1}, the"
            " blocks of this DINOv2."
        )
    return build_networks(
        architectures,
        discriminator_blocks=tuple(config.discriminator_blocks),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.dtype),
        attention=config.attention,
        remat=config.remat,
    )


def index_videos(config: ConfigDict, workdir: pathlib.Path) -> pixels.ClipIndex:
    """The clips to train on, with a line about files that were left out."""
    data = config.data
    folder = demo.demo_videos() if data.videos == "demo" else data.videos
    index = pixels.index_clips(folder, data.num_frames, data.fps, data.height, data.width, workdir / "clips.json")
    if index.skipped:
        print(f"{len(index.skipped)} videos were left out:", file=sys.stderr)
        for path, reason in index.skipped[:10]:
            print(f"  {path} {reason}", file=sys.stderr)
    return index


def load_frozen(config: ConfigDict, networks: Networks, devices: jax.sharding.Mesh) -> dict[str, Params]:
    """The frozen parameters, each read or made on the devices that hold it."""
    shapes = {name: unflatten_dict(expected_params(name, getattr(networks, name).config)) for name in ARCHITECTURES}
    shardings = mesh.parameter_shardings(devices, shapes)
    dtype = jnp.dtype(config.dtype)
    if config.weights:
        return {name: weights.load_params(config.weights, name, shardings[name], dtype) for name in ARCHITECTURES}
    # A seed of their own: another seed for a run does not change the teacher.
    return jax.device_put(random_params(shapes, 0, dtype), shardings)


def optimizers_of(config: ConfigDict) -> tuple[Any, Any]:
    """Adam for the student and for the discriminator."""
    chosen = config.optimizer
    shared = (chosen.b1, chosen.b2, chosen.max_grad_norm or None)
    return make_optimizer(chosen.learning_rate, *shared), make_optimizer(chosen.disc_learning_rate, *shared)


def make_train_step(config: ConfigDict, networks: Networks, optimizers: tuple[Any, Any]) -> Callable:
    """`(state, frozen, {video, fps, clip_id}) -> (state, metrics)`: encoding and the objective, ready for `jit`."""
    options = AdversarialOptions(
        adversarial_weight=config.adversarial_weight,
        huber_c=config.huber_c,
        ema_decay=config.ema_decay,
        lora_scale=config.lora.alpha / config.lora.rank,
        boundary=config.boundary,
        grad_accum=config.grad_accum,
    )
    objective = stage1.make_step(networks, *optimizers, options, config.num_levels)

    def train_step(
        state: TrainState, frozen: Params, clips: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        # All randomness is a function of the seed and the step: a resumed run repeats it.
        encode_key, step_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        batch = encode_batch(networks, frozen, clips["video"], clips["fps"], encode_key, config.data.motion_bucket_id)
        return objective(state, frozen, batch, step_key)

    return train_step


def compile_step(
    config: ConfigDict,
    networks: Networks,
    optimizers: tuple[Any, Any],
    devices: jax.sharding.Mesh,
    frozen: Params,
    state: TrainState,
    shardings: Any,
    batch: dict[str, jax.Array],
) -> tuple[list[str], Callable]:
    """Compiles the step ahead of time; the program that comes back cannot be recompiled behind anyone's back.

    Returns:
        The metrics' names, and `(state, frozen, batch) -> (state, vector of metrics)`, which donates the state.
    """
    train_step = make_train_step(config, networks, optimizers)
    names: list[str] = []

    def packed(state: TrainState, frozen: Params, batch: dict[str, jax.Array]) -> tuple[TrainState, jax.Array]:
        state, values = train_step(state, frozen, batch)
        names[:] = sorted(values)  # Known once this has been traced.
        # One array is one transfer to the host.
        return state, jnp.stack([values[name] for name in names])

    compiled = jax.jit(packed, donate_argnums=0, out_shardings=(shardings, mesh.replicated(devices)))
    print("Compiling the step ...", flush=True)
    start = time.perf_counter()
    step = compiled.lower(state, frozen, batch).compile()
    print(f"Compiled in {time.perf_counter() - start:.0f} s.")
    return names, step


class PreviewPicture:
    """The picture of a run's progress: the first clip, the image the sample starts from, and a one-step sample."""

    def __init__(self, config: ConfigDict, networks: Networks, index: pixels.ClipIndex, frozen: Params):
        clip = index.read(0)
        self.video, fps = clip["video"], jnp.asarray(clip["fps"])[None]
        # The same noise every time, so that pictures of different steps compare.
        encode_key, noise_key = jax.random.split(jax.random.key(config.seed))
        scale = config.lora.alpha / config.lora.rank

        @jax.jit
        def sample(state: TrainState, frozen: Params) -> jax.Array:
            batch = encode_batch(networks, frozen, self.video[None], fps, encode_key, config.data.motion_bucket_id)
            noise = jax.random.normal(noise_key, batch.latents.shape)
            network = networks.unet_with(state.student.variables(frozen["unet"], scale))
            sigma = jnp.full(1, SIGMA_MAX)
            return denoise(network, SIGMA_MAX * noise, sigma, batch.cond, config.boundary)

        self._sample = sample
        # Two frames at a time: decoding a whole clip at 576 x 1024 takes more memory than a training step.
        self._decode = jax.jit(lambda params, latents: networks.decode_video(params, latents))

    def draw(self, state: TrainState, frozen: Params) -> np.ndarray:
        latents = self._sample(state, frozen)
        chunks = [self._decode(frozen["vae"], latents[:, i : i + 2]) for i in range(0, latents.shape[1], 2)]
        decoded = np.concatenate([np.asarray(chunk[0]) for chunk in chunks])
        sample = ((decoded.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
        return pictures.sample_grid({"condition": self.video[0], "real clip": self.video, "one-step sample": sample})


def describe(config: ConfigDict, state: TrainState, frozen: Params, index: pixels.ClipIndex, num_devices: int) -> str:
    """What is about to run, in a few lines."""

    def millions(tree: Any) -> str:
        return f"{sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6:.1f} M"

    data = config.data
    frozen_sizes = ", ".join(f"{name} {millions(params)}" for name, params in frozen.items())
    return (
        f"{config.objective} on {num_devices} {jax.devices()[0].platform} device(s)\n"
        f"  data      {len(index.clips)} clips: {data.num_frames} x {data.height} x {data.width}, {data.fps:g} fps\n"
        f"  frozen    {frozen_sizes}, {config.dtype}\n"
        f"  training  LoRA {millions(state.student)}, discriminator {millions(state.disc['params'])}\n"
        f"  steps     {int(state.step)} of {config.num_steps} done, batch {config.batch_size}"
    )


def run() -> None:
    """Parses the command line and trains; what the user can mend is one sentence on stderr and exit status 2."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # What is compiled once need not be compiled again by the next start of the same run.
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path("~/.cache/osv_jax/jax").expanduser()))
    try:
        app.run(main, flags_parser=_parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
    for argument in argv:
        if argument.startswith("--config="):
            file = pathlib.Path(argument.removeprefix("--config=").split(":")[0])
            if not file.is_file():
                raise UserError(f"The configuration file {file} does not exist; see the folder configs/.")
    try:
        return flags.FLAGS(argv)
    except AttributeError as error:
        raise UserError(f"The configuration has no key {error}; see the file given with --config.") from error
    except (flags.Error, ValueError) as error:
        # What a configuration file raises arrives as a whole traceback, its last line being the message.
        raise UserError(str(error).strip().splitlines()[-1]) from error


if __name__ == "__main__":
    run()
