"""Trains: `python -m osv_jax.train --config=configs/stage1.py --workdir=runs/stage1`.

Started again with the same arguments it resumes, exactly, from the last checkpoint. The workdir receives config.json,
checkpoints/, metrics.jsonl, tensorboard/, pictures/ and losses.png. SIGTERM, with which schedulers announce that they
take the machine, makes it save the last finished step and end with status 143.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from ml_collections import ConfigDict, config_flags

from osv_jax.convert import lora_files, weights
from osv_jax.diffusion.conditioning import Conditioning
from osv_jax.diffusion.edm import SIGMA_MAX, denoise
from osv_jax.diffusion.ode import guided_denoiser
from osv_jax.diffusion.samplers import euler, euler_levels
from osv_jax.errors import UserError
from osv_jax.objectives.finetune import BAND_METRIC
from osv_jax.objectives.networks import Networks, Params
from osv_jax.objectives.players import Student, TrainState
from osv_jax.runtime import checkpoint, command_line, distributed, media, mesh, metrics
from osv_jax.runtime.finite import NotFinite, blame_weights
from osv_jax.runtime.paths import Path, as_path
from osv_jax.training import setup
from osv_jax.training.clips import LatentClips, PixelClips, open_clips
from osv_jax.training.setup import Optimizers, Phase

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/, e.g. configs/stage1.py:tiny.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures.")

# Steps the host may be ahead of the devices: enough that they never wait for it, few enough that a value that is not
# finite is noticed at once.
_STEPS_IN_FLIGHT = 2
_ADVERSARIAL_CURVES = ("loss_huber", "loss_adversarial", "loss_disc")
_CURVES = {"stage1": _ADVERSARIAL_CURVES, "stage2": _ADVERSARIAL_CURVES, "finetune": ("loss", "grad_norm/student")}
# What pictures of `finetune` are sampled with, as SVD's are.
_EULER_STEPS = 25
_MAX_GUIDANCE = 3.0


def main(argv: list[str]) -> None:
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise UserError("Both --config and --workdir are needed, e.g. --config=configs/stage1.py --workdir=runs/a.")
    distributed.join()
    with distributed.quiet_but_first():
        train(_CONFIG.value, as_path(_WORKDIR.value))


@dataclasses.dataclass
class _Run:
    """What the phases of a run have in common."""

    config: ConfigDict
    workdir: Path
    networks: Networks
    optimizers: Optimizers
    devices: jax.sharding.Mesh
    clips: PixelClips | LatentClips
    frozen: Params
    shardings: Any
    checkpoints: ocp.CheckpointManager
    writer: metrics.MetricsWriter


def train(config: ConfigDict, workdir: Path) -> None:
    """Runs or resumes one training run.

    Raises:
        UserError: on anything the user can mend, before compilation starts where it can be known by then.
        distributed.Preempted: after SIGTERM.
    """
    setup.check_config(config)
    checkpoint.check_workdir(workdir, config.to_dict())
    networks = setup.networks_of(config)
    origin = weights.locate(config.init_from) if config.init_from else None
    start = checkpoint.latest_step(workdir) or 0
    given = None
    if origin and not start and lora_files.is_lora(origin):
        given = setup.read_lora(origin, config, networks)
    elif origin and not start:
        setup.check_origin(origin, config)
    clips = open_clips(config, networks, workdir)
    devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.context)
    setup.check_layout(config, networks, devices)
    if jax.process_index() == 0:
        checkpoint.write_config(workdir, config.to_dict())

    with jax.set_mesh(devices), checkpoint.open_checkpoints(workdir, config.keep_checkpoints) as checkpoints:
        frozen = setup.load_frozen(config, networks, devices)
        optimizers = setup.optimizers_of(config)
        init = setup.make_init(config, networks, optimizers)
        shapes = jax.eval_shape(init, jax.random.key(0), frozen["unet"])
        shardings = mesh.parameter_shardings(devices, shapes)
        if start:
            clips.check_position(_phase_before(config, start), checkpoint.restore_data(checkpoints, start))
            state = checkpoint.restore_state(checkpoints, start, checkpoint.abstract(shapes, shardings))
            print(f"Resuming from step {start}.")
        else:
            state = jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed), frozen["unet"])
            if given:
                state = setup.start_from_lora(given.lora, config, state, optimizers)
                print(f"Starting from the LoRA {origin}. {given.notice}".rstrip())
            elif origin:
                state = setup.start_from(origin, state, optimizers)
                print(f"Starting from step {checkpoint.latest_step(origin)} of {origin}.")
        print(setup.describe(config, state, frozen, clips.count(setup.phases_of(config)[0])))
        whole = mesh.unsplit_parameters((frozen, state), devices.shape["fsdp"])
        if whole:
            print(
                f"fsdp={devices.shape['fsdp']} divides no dimension of {len(whole)} large parameters, which each"
                f" device holds whole: {', '.join(whole[:10])}."
            )

        with contextlib.closing(metrics.MetricsWriter(workdir, start, jax.process_index())) as writer:
            run = _Run(config, workdir, networks, optimizers, devices, clips, frozen, shardings, checkpoints, writer)
            with blame_weights(frozen):
                for phase in setup.phases_of(config):
                    if start < phase.end:
                        state = _run_phase(run, phase, max(start, phase.start), state)
    print(
        f"Done: {int(state.step)} steps.\n"
        f"  metrics      {workdir / 'metrics.jsonl'}, {workdir / 'losses.png'}, tensorboard --logdir {workdir}\n"
        f"  checkpoints  {workdir / 'checkpoints'}\n"
        f"  pictures     {workdir / 'pictures'}"
    )


def _run_phase(run: _Run, phase: Phase, start: int, state: TrainState) -> TrainState:
    """Trains from step `start` to the end of the phase, on clips of its size."""
    # Closing ends the processes that read, if there are any.
    with contextlib.closing(iter(run.clips.batches(phase, start))) as local_batches:
        return _train(run, phase, start, state, iter(mesh.global_batches(local_batches, run.devices)))


def _train(
    run: _Run, phase: Phase, start: int, state: TrainState, batches: Iterator[dict[str, jax.Array]]
) -> TrainState:
    config, writer = run.config, run.writer
    curves = _CURVES[config.objective]
    batch = next(batches)
    print(f"Compiling the step for {phase.height} x {phase.width} ...", flush=True)
    compile_start = time.perf_counter()
    names, step = compile_step(run, state, batch)
    print(f"Compiled in {time.perf_counter() - compile_start:.0f} s.")
    draw_picture = make_picture(config, run.networks, run.clips.example(phase), run.devices)
    in_flight: collections.deque[tuple[int, jax.Array]] = collections.deque()

    def finish_one() -> None:
        """Waits for the oldest step in flight, writes its metrics, and stops the run if one is not finite."""
        nonlocal shown_at, last_done
        number, values = in_flight.popleft()
        row = dict(zip(names, np.asarray(values).tolist(), strict=True))
        # Noise levels that no clip of the batch has have no loss; if theirs is the fault, `loss` is not finite either.
        row = {name: row[name] for name in names if not (name.startswith(BAND_METRIC) and math.isnan(row[name]))}
        now = time.perf_counter()
        row |= {"seconds_per_step": now - last_done, "clips_per_second": config.batch_size / (now - last_done)}
        last_done = now
        writer.write(number, row)
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if bad:
            kept = run.checkpoints.latest_step()
            where = f"the checkpoint of step {kept} is intact" if kept else "no checkpoint had been written yet"
            raise NotFinite(
                f"Step {number}: {', '.join(f'{name} is {row[name]}' for name in bad)}. Training stopped; {where}."
                " Lower the learning rates or set config.optimizer.max_grad_norm, in a new workdir."
            )
        if number % config.log_every == 0 or number == phase.end:
            steps, seconds = number - shown_at[0], now - shown_at[1]
            shown = {name: row[name] for name in curves}
            print(metrics.progress_line(number, config.num_steps, seconds / steps, config.batch_size, shown))
            shown_at = (number, now)

    def finish_all() -> None:
        while in_flight:
            finish_one()

    if start == 0:
        writer.write_picture("samples", 0, draw_picture(state, run.frozen))
    last_done = time.perf_counter()
    shown_at = (start, last_done)
    with distributed.watch_sigterm() as should_stop:
        for number in range(start + 1, phase.end + 1):
            state, values = step(state, run.frozen, batch)
            in_flight.append((number, values))
            if len(in_flight) > _STEPS_IN_FLIGHT:
                finish_one()
            last = number == phase.end
            stops = should_stop(number) and number < config.num_steps
            if not last:
                batch = next(batches)
            if number % config.checkpoint_every == 0 or last or stops:
                finish_all()  # A state whose metrics are not finite must not become a checkpoint.
                writer.flush()
                checkpoint.save(run.checkpoints, number, state, run.clips.save_position(phase, number))
            if stops:
                run.checkpoints.wait_until_finished()
                raise distributed.Preempted(f"SIGTERM: step {number} is saved. The same command continues from there.")
            if number % config.picture_every == 0 or last:
                finish_all()
                writer.write_picture("samples", number, draw_picture(state, run.frozen))
                writer.flush()
                if jax.process_index() == 0:
                    metrics.loss_curves(run.workdir / "metrics.jsonl", run.workdir / "losses.png", curves)
            if not in_flight:
                last_done = time.perf_counter()  # Steps are not charged for checkpoints and pictures.
    return state


def _phase_before(config: ConfigDict, step: int) -> Phase:
    """The phase that the steps up to `step` belong to."""
    return [phase for phase in setup.phases_of(config) if phase.start < step][-1]


def compile_step(run: _Run, state: TrainState, batch: dict[str, jax.Array]) -> tuple[list[str], Callable]:
    """Compiles the step ahead of time; the program that comes back cannot be recompiled behind anyone's back.

    Returns:
        The metrics' names, and `(state, frozen, batch) -> (state, vector of metrics)`, which donates the state.
    """
    train_step = setup.make_train_step(run.config, run.networks, run.optimizers)
    names: list[str] = []

    def packed(state: TrainState, frozen: Params, batch: dict[str, jax.Array]) -> tuple[TrainState, jax.Array]:
        state, values = train_step(state, frozen, batch)
        names[:] = sorted(values)  # Known once this has been traced.
        # One array is one transfer to the host.
        return state, jnp.stack([values[name] for name in names])

    out_shardings = (run.shardings, mesh.replicated(run.devices))
    step = jax.jit(packed, donate_argnums=0, out_shardings=out_shardings).lower(state, run.frozen, batch).compile()
    return names, step


def make_picture(
    config: ConfigDict, networks: Networks, example: Mapping[str, np.ndarray], devices: jax.sharding.Mesh
) -> Callable[..., np.ndarray]:
    """`(state, frozen) -> image`: a clip, the frame the sample starts from, and a sample.

    It is a one-step sample of a student that learns that, and SVD's own Euler sample with guidance in `finetune`.

    Args:
        example: a batch of one clip; of latents, the clip is shown as the VAE decodes it.
        devices: those of the run.
    """
    # The same noise every time, so that pictures of different steps compare.
    encode_key, noise_key = jax.random.split(jax.random.key(config.seed))
    scale = config.lora.alpha / config.lora.rank

    # Every process has the whole sample, so that the first can write it down.
    whole = mesh.replicated(devices)

    @functools.partial(jax.jit, out_shardings=whole)
    def encode(frozen: Params) -> tuple[Conditioning, jax.Array]:
        batch = setup.to_batch(config, networks, frozen, example, encode_key)
        return batch.cond, jax.random.normal(noise_key, batch.latents.shape)

    @functools.partial(jax.jit, out_shardings=whole)
    def denoised(student: Student, frozen: Params, cond: Conditioning, x: jax.Array, sigma: jax.Array) -> jax.Array:
        network = networks.unet_with(student.variables(frozen["unet"], scale))
        if config.objective == "finetune":
            return guided_denoiser(network, cond, jnp.linspace(1.0, _MAX_GUIDANCE, x.shape[1]))(x, sigma)
        return denoise(network, x, sigma, cond, config.boundary)

    def sample(state: TrainState, frozen: Params) -> jax.Array:
        cond, noise = encode(frozen)
        denoiser = functools.partial(denoised, state.student, frozen, cond)
        if config.objective == "finetune":
            return euler(denoiser, noise, euler_levels(_EULER_STEPS))
        return denoiser(SIGMA_MAX * noise, np.full(1, SIGMA_MAX, np.float32))

    decode = jax.jit(networks.decode_video, out_shardings=whole)

    def frames_of(frozen: Params, latents: np.ndarray) -> np.ndarray:
        # Two frames at a time: decoding a whole clip at 576 x 1024 takes more memory than a training step.
        chunks = [decode(frozen["vae"], latents[:, i : i + 2]) for i in range(0, latents.shape[1], 2)]
        decoded = np.concatenate([np.asarray(chunk[0]) for chunk in chunks])
        return media.to_uint8(decoded)

    def draw(state: TrainState, frozen: Params) -> np.ndarray:
        sampled = frames_of(frozen, np.asarray(sample(state, frozen)))
        is_video = "video" in example
        clip = example["video"][0] if is_video else frames_of(frozen, example["latents"].astype(np.float32))
        label = "real clip" if is_video else "real clip, decoded from its latents"
        sampler = f"sample, {_EULER_STEPS} Euler steps" if config.objective == "finetune" else "one-step sample"
        return media.sample_grid({"condition": clip[0], label: clip, sampler: sampled})

    return draw


def run() -> None:
    """Parses the command line and trains; see `command_line.run`."""
    command_line.run(main)


if __name__ == "__main__":
    run()
