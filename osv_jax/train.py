"""Trains: `python -m osv_jax.train --config=configs/stage1.py --workdir=runs/stage1`.

Started again with the same arguments it resumes, exactly, from the last checkpoint. The workdir receives config.json,
checkpoints/, metrics.jsonl, tensorboard/, pictures/ and losses.png. SIGTERM, with which schedulers announce that they
take the machine, and Ctrl-C make it save the last finished step and end with status 143 and 130.
"""

from __future__ import annotations

import contextlib

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from osv_jax.convert import lora_files, weights
from osv_jax.errors import UserError
from osv_jax.evaluation.while_training import plan_evaluation
from osv_jax.runtime import checkpoint, command_line, distributed, mesh, metrics
from osv_jax.runtime.finite import blame_weights
from osv_jax.runtime.paths import Path, as_path
from osv_jax.runtime.precision import matmul_precision
from osv_jax.training import origins, previews, setup
from osv_jax.training.clips import open_clips
from osv_jax.training.config import Phase, check_config, phases_of
from osv_jax.training.loop import Picture, Run, run_phase

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/, e.g. configs/stage1.py:tiny.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures.")


def main(argv: list[str]) -> None:
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise UserError("Both --config and --workdir are needed, e.g. --config=configs/stage1.py --workdir=runs/a.")
    distributed.join()
    with distributed.quiet_but_first():
        train(_CONFIG.value, as_path(_WORKDIR.value))


def train(config: ConfigDict, workdir: Path) -> None:
    """Runs or resumes one training run.

    Raises:
        UserError: on anything the user can fix, before compilation starts where it can be known by then.
        Stopped: after SIGTERM or Ctrl-C.
    """
    check_config(config)
    config = setup.with_num_frames(config)
    checkpoint.check_workdir(workdir, config.to_dict())
    networks = setup.networks_of(config)
    objective = setup.objective_of(config, networks)
    origin = weights.locate(config.init_from) if config.init_from else None
    start = checkpoint.latest_step(workdir) or 0
    given = None
    if origin and not start and lora_files.is_lora(origin):
        given = origins.read_lora(origin, config, networks)
    elif origin and not start:
        origins.check_origin(origin, config)
    clips = open_clips(config, networks, workdir)
    devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.context)
    setup.check_layout(config, networks, devices)
    make_evaluation = plan_evaluation(config, objective, workdir, devices) if config.eval_every else None
    if jax.process_index() == 0:
        checkpoint.write_config(workdir, config.to_dict())

    with (
        jax.set_mesh(devices),
        matmul_precision(config.dtype),
        checkpoint.open_checkpoints(workdir, config.keep_checkpoints) as checkpoints,
    ):
        frozen = setup.load_frozen(config, networks, devices)
        init = setup.make_init(objective)
        shapes = jax.eval_shape(init, jax.random.key(0), frozen)
        shardings = mesh.parameter_shardings(devices, shapes)
        if start:
            clips.check_position(_phase_before(config, start), checkpoint.restore_data(checkpoints, start))
            state = checkpoint.restore_state(checkpoints, start, checkpoint.abstract(shapes, shardings))
            print(f"Resuming from step {start}.")
        else:
            state = jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed), frozen)
            if given:
                state = origins.start_from_lora(given.lora, config, state, objective)
                print(f"Starting from the LoRA {origin}. {given.notice}".rstrip())
            elif origin:
                state = origins.start_from(origin, state, objective)
                print(f"Starting from step {checkpoint.latest_step(origin)} of {origin}.")
        print(setup.describe(config, objective, state, frozen, clips.count(phases_of(config)[0])))
        whole = mesh.unsplit_parameters((frozen, state), devices.shape["fsdp"])
        if whole:
            print(
                f"fsdp={devices.shape['fsdp']} divides no dimension of {len(whole)} large parameters, which each"
                f" device holds whole: {', '.join(whole[:10])}."
            )

        def make_picture(phase: Phase) -> Picture:
            return previews.make_picture(config, objective, clips.example(phase), devices)

        with contextlib.closing(metrics.MetricsWriter(workdir, start, jax.process_index())) as writer:
            run = Run(
                *(config, workdir, objective, devices, clips, frozen, shardings, checkpoints, writer),
                picture_name="samples",
                make_picture=make_picture,
                make_evaluation=make_evaluation,
            )
            with blame_weights(frozen):
                for phase in phases_of(config):
                    if start < phase.end:
                        state = run_phase(run, phase, max(start, phase.start), state)
    print(
        f"Done: {int(state.step)} steps.\n"
        f"  metrics      {workdir / 'metrics.jsonl'}, {workdir / 'losses.png'}, tensorboard --logdir {workdir}\n"
        f"  checkpoints  {workdir / 'checkpoints'}\n"
        f"  pictures     {workdir / 'pictures'}"
    )


def _phase_before(config: ConfigDict, step: int) -> Phase:
    """The phase that the steps up to `step` belong to."""
    return [phase for phase in phases_of(config) if phase.start < step][-1]


def run() -> None:
    """Parses the command line and trains; see `command_line.run`."""
    command_line.run(main)


if __name__ == "__main__":
    run()
