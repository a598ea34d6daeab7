"""Compiles the step of a configuration for devices that need not be there, as far as its memory being assigned."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from osv_jax.errors import UserError
from osv_jax.objectives.objective import Objective
from osv_jax.planning.hlo import Plan, analyse, operations, read_assignment
from osv_jax.planning.topologies import devices_of, layout
from osv_jax.runtime import checkpoint, compiler, mesh
from osv_jax.runtime.precision import matmul_precision
from osv_jax.training import setup
from osv_jax.training.config import Phase

# On CPU: XLA's default order of operations favours concurrency and holds the float32 copies of all bfloat16 weights at
# once; and code that is built fast takes a fraction of the time of compilation.
CPU_OPTIONS: dict[str, Any] = {
    **compiler.CPU_OPTIONS,
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
# On GPUs there is none to time choices on. XLA's own matrix kernels (Triton's) have parameters that only a timing can
# choose, so NVIDIA's are taken; the scheduler is that of the scripts in launch/.
GPU_OPTIONS: dict[str, Any] = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_enable_latency_hiding_scheduler": True,
}


class DoesNotFit(Exception):
    """A program for which XLA found no memory; the message is how much it would need, as far as XLA says."""


def trace(config: ConfigDict, objective: Objective, phase: Phase, devices: Mesh) -> jax.stages.Traced:
    """The step that training runs on clips of a phase's size, encoding included, for devices that need not be there."""
    frozen = setup.frozen_shapes(config, objective.networks)
    state = jax.eval_shape(setup.make_init(objective), jax.random.key(0), frozen)
    count, frames = config.batch_size, config.data.num_frames
    clips = {
        "video": jax.ShapeDtypeStruct((count, frames, phase.height, phase.width, 3), jnp.uint8),
        "fps": jax.ShapeDtypeStruct((count,), jnp.float32),
    }
    step = setup.make_train_step(config, objective)
    shardings = mesh.parameter_shardings(devices, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, mesh.replicated(devices)))
    with jax.set_mesh(devices), matmul_precision(config.dtype):
        return jitted.trace(
            checkpoint.abstract(state, shardings),
            checkpoint.abstract(frozen, mesh.parameter_shardings(devices, frozen)),
            checkpoint.abstract(clips, mesh.batch_shardings(devices, clips)),
        )


def plan_step(
    config: ConfigDict, phase: Phase, devices: Mesh, when_traced: Callable[[float], None] = lambda flops: None
) -> Plan:
    """Compiles the step of a phase.

    Args:
        when_traced: is given the operations of one device before compilation begins.

    Raises:
        DoesNotFit: XLA gives up on a program that does not fit a TPU.
    """
    traced = trace(config, setup.objective_of(config, setup.networks_of(config)), phase, devices)
    flops = operations(traced.jaxpr.jaxpr) / devices.size
    when_traced(flops)
    options = {"cpu": CPU_OPTIONS, "gpu": GPU_OPTIONS}.get(devices.devices.flat[0].platform)
    try:
        compiled = traced.lower().compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = re.search(r"Used [\d.]+\w? of [\d.]+\w? \w+|[\w ]+\([\d.]+\w\) exceeds .+\([\d.]+\w\)", str(error))
        raise DoesNotFit(needed[0].strip() if needed else "out of memory") from error
    return analyse(compiled, flops)


def plan_without_code(config: ConfigDict, phase: Phase, topology: str) -> Plan:
    """`plan_step` in a process of its own, which is stopped as soon as XLA has assigned all memory.

    Generating code is what follows: for a full-size step, most of the time and memory that compiling takes. What it
    adds to the device's memory, the program and scratch memory of single operations, is not in the plan.

    Raises:
        DoesNotFit: as `plan_step`.
        UserError: the process ended without a result, as when this machine's memory is not enough.
    """
    processes = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=compile_for, args=(sender, folder, config, phase, topology), daemon=True)
        process.start()
        sender.close()
        try:
            return first_result(receiver, pathlib.Path(folder))
        except EOFError as error:
            process.join()
            raise UserError(
                f"Compiling ended with status {process.exitcode}; -9 means that this machine's memory was not enough."
            ) from error
        finally:
            process.kill()
            process.join()


def compile_for(sender: Connection, folder: str, config: ConfigDict, phase: Phase, topology: str) -> None:
    """What the process of `plan_without_code` does: sends the operations of a step, then its plan or why there is none.

    XLA writes into `folder` meanwhile.
    """
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), f"--xla_dump_to={folder}", "--xla_dump_hlo_module_re=train_step"]
    )
    try:
        sender.send(plan_step(config, phase, layout(config, devices_of(topology)[1]), sender.send))
    except DoesNotFit as needed:
        sender.send(needed)


def first_result(receiver: Connection, folder: pathlib.Path) -> Plan:
    """The plan that `compile_for` sends, or what XLA has written, whichever is there first.

    Raises:
        DoesNotFit: as `plan_step`.
        EOFError: the process has ended without either.
    """
    flops = None
    while True:
        if receiver.poll(timeout=1.0):
            message = receiver.recv()
            if isinstance(message, DoesNotFit):
                raise message
            if isinstance(message, Plan):
                return message
            flops = message
        if flops is not None and (plan := read_assignment(folder, flops)):
            return plan
