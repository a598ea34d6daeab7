"""Says whether a run fits: `python -m osv_jax.plan --config=configs/stage2.py --topology=v5e:4x4`.

Compiles the real step of every resolution of a configuration for devices that need not be there, and prints for one
device: its memory, operations, what it sends to others, and a bound on the time of a step. Compilation is stopped when
all memory has been assigned; the code that would follow takes most of its time. Topologies: a TPU slice by its chips
(v5e:4x4, v5p:2x2x2, v6e:2x2; needs the package libtpu), gpu:8x80GB (compiled for as many CPU devices, which compute
bfloat16 in float32: an upper bound), or cpu. Keys of the configuration are changed as in training.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict, config_flags

from osv_jax.convert import weights
from osv_jax.errors import UserError
from osv_jax.models.groups import GROUPS
from osv_jax.objectives.objective import Objective
from osv_jax.runtime import checkpoint, command_line, mesh
from osv_jax.runtime.precision import matmul_precision
from osv_jax.runtime.ranges import Range
from osv_jax.training import setup
from osv_jax.training.config import Phase, check_config, phases_of

_GB = 1e9
# On CPU: XLA's default order of operations favours concurrency and holds the float32 copies of all bfloat16 weights at
# once; and code that is built fast, without the pass that splits the sum over a parameter in two, takes a fraction of
# the time of compilation.
CPU_OPTIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_disable_hlo_passes": "tree_reduction_rewriter",
}
# Each is a CPU device with threads of its own.
_GPUS, _GIGABYTES = Range(1, 1024, whole=True), Range(1, 10_000, whole=True)
_DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_COLLECTIVE = re.compile(
    r" = (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\((?:.*channel_id=(\d+))?"
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of device.

    Attributes:
        memory: that programs can use [bytes]; None if unknown.
        peak: bfloat16 operations a second; None if unknown.
    """

    name: str
    memory: float | None
    peak: float | None


# The memory is what libtpu gives to programs, a little less than the chip has; the peak is Google's figure.
_TPUS = {
    "v5e": Chip("TPU v5e", 15.75 * 2**30, 197e12),
    "v5p": Chip("TPU v5p", 95.74 * 2**30, 459e12),
    "v6e": Chip("TPU v6e", 31.25 * 2**30, 918e12),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one device needs for a step; bytes, operations, seconds.

    Attributes:
        results: those that take the place of an argument need no memory of their own, and are not counted.
        collectives: kind -> (how many in the program, bytes of their results); those in loops are counted once.
    """

    arguments: float
    temporaries: float
    results: float
    flops: float
    collectives: Mapping[str, tuple[int, float]]

    @property
    def total(self) -> float:
        return self.arguments + self.temporaries + self.results


class DoesNotFit(Exception):
    """A program for which XLA found no memory; the message is how much it would need, as far as XLA says."""


def devices_of(topology: str) -> tuple[Chip, list[Any]]:
    """The kind and the devices of a topology.

    Raises:
        UserError: an unknown name, a shape without devices, or a TPU's without libtpu.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and not shape:
        return Chip("CPU", None, None), jax.local_devices(backend="cpu")[:1]
    if kind == "gpu" and (match := re.fullmatch(r"(\d+)x(\d+)GB", shape)):
        count, gigabytes = int(match[1]), int(match[2])
        if count not in _GPUS or gigabytes not in _GIGABYTES:
            raise UserError(
                f"--topology={topology} must have {_GPUS} for the devices, and for the memory of each [GB]"
                f" {_GIGABYTES}, such as gpu:8x80GB."
            )
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError as error:
            raise UserError(f"--topology={topology} must be chosen before devices are used.") from error
        return Chip(f"GPU of {gigabytes} GB", gigabytes * _GB, None), jax.local_devices(backend="cpu")
    if kind in _TPUS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        # Or libtpu would be one process's alone, as chips are.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        # Without a TPU machine libtpu asks the network who else there is.
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        try:
            # libtpu takes every host for one with four chips, but single chips are rented, too.
            single = {"chips_per_host_bounds": (1, 1, 1)} if re.fullmatch(r"1(x1)*", shape) else {}
            described = topologies.get_topology_desc(topology, platform="tpu", **single)
        except Exception as error:  # libtpu's own; JAX names no type for them
            raise UserError(
                f"--topology={topology} cannot be compiled for: {str(error).splitlines()[0]}; give a shape that exists,"
                " such as v5e:4x4, and install libtpu (pip install 'jax[tpu]')."
            ) from error
        return _TPUS[kind], list(described.devices)
    raise UserError(
        f"--topology={topology} is unknown; give a TPU slice ({', '.join(_TPUS)}; v5e:4x4), gpu:8x80GB, or cpu."
    )


def layout(config: ConfigDict, available: list[Any]) -> Mesh:
    """The mesh of a configuration on these devices.

    Raises:
        UserError: when it does not multiply to their number.
    """
    sizes = mesh.mesh_sizes(config.mesh.data, config.mesh.fsdp, config.mesh.context, len(available))
    return Mesh(np.asarray(available).reshape(sizes), mesh.AXES, axis_types=(AxisType.Auto,) * 3)


def trace(config: ConfigDict, objective: Objective, phase: Phase, devices: Mesh) -> jax.stages.Traced:
    """The step that training runs on clips of a phase's size, encoding included, for devices that need not be there."""
    dtype = jnp.dtype(config.dtype)
    frozen = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), setup.frozen_shapes(config, objective.networks)
    )
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


def operations(jaxpr: Jaxpr) -> float:
    """Multiplications and additions of all matrix products and convolutions, those in loops as often as they run.

    XLA's own count has the body of a loop once, and stage 2's solver is one.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        inner = sum(operations(child) for child in jaxprs_in_params(equation.params))
        if equation.primitive.name == "scan":
            inner *= equation.params["length"]
        elif equation.primitive.name == "shard_map":
            inner *= equation.params["mesh"].size
        elif equation.primitive.name == "pallas_call":
            inner *= np.prod(equation.params["grid_mapping"].grid)
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = 2.0 * equation.outvars[0].aval.size * np.prod([left[axis] for axis in contracted])
        elif equation.primitive.name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
            inner = 2.0 * equation.outvars[0].aval.size * np.prod(kernel) / kernel[numbers.rhs_spec[0]]
        total += inner
    return total


def analyse(compiled: jax.stages.Compiled, flops: float) -> Plan:
    """What the compiler knows about its program, which is one device's.

    Args:
        flops: of one device.
    """
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes, results
    return Plan(*sizes, flops, collectives_of(compiled.as_text()))


def collectives_of(program: str) -> dict[str, tuple[int, float]]:
    """Kind -> (number, bytes of their results) of the collectives in an HLO program."""
    found: dict[str, tuple[int, float]] = {}
    seen = set()
    in_fusion = False
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            in_fusion = "fus" in line.split(" ", 1)[0]
        if not (match := _COLLECTIVE.search(line)):
            continue
        shapes, kind, start, channel = match.groups()
        sizes = [
            _DTYPE_BYTES.get(dtype, 4) * np.prod([int(size) for size in dims.split(",") if size], dtype=float)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        ]
        # What starts a gathering returns its operand beside its result; several that were combined return them all.
        size = max(sizes, default=0.0) if start and kind != "all-reduce" else sum(sizes)
        if in_fusion and channel:
            # A TPU's compiler hides one behind several computations, and writes it into the fusion of each.
            if (kind, channel, size) in seen:
                continue
            seen.add((kind, channel, size))
        count, total = found.get(kind, (0, 0.0))
        found[kind] = (count + 1, total + size)
    return found


def assigned_memory(assignment: str) -> tuple[float, float, float]:
    """Arguments, temporaries and results that are no argument [bytes] of XLA's text about a program's buffers."""
    sizes = {"arguments": 0.0, "temporaries": 0.0, "results": 0.0}
    for size, kind in re.findall(r"^allocation \d+: size (\d+), (.*)$", assignment, re.MULTILINE):
        # A colour is another memory, on the chip's own die.
        if kind.startswith("color") or "thread-local" in kind:
            continue
        where = "arguments" if "parameter" in kind else "results" if "maybe-live-out" in kind else "temporaries"
        sizes[where] += float(size)
    return sizes["arguments"], sizes["temporaries"], sizes["results"]


def read_assignment(folder: pathlib.Path, flops: float) -> Plan | None:
    """What XLA has written of a step into `--xla_dump_to` by the time it has assigned all memory; None before."""
    # The last one of them.
    if not list(folder.glob("*train_step*-memory-usage-report.txt")):
        return None
    (assignment,) = folder.glob("*train_step*-buffer-assignment.txt")
    (program,) = folder.glob("*train_step*after_optimizations.txt")
    return Plan(*assigned_memory(assignment.read_text()), flops, collectives_of(program.read_text()))


def advice(config: ConfigDict, devices: Mesh) -> str:
    """The next thing to change when a step does not fit."""
    per_part = config.batch_size // (devices.shape["data"] * devices.shape["fsdp"] * config.grad_accum)
    if config.remat != "full":
        return "set config.remat=full"
    if per_part > 1:
        return f"compute a device's clips one after the other: config.grad_accum={config.grad_accum * per_part}"
    if devices.shape["data"] > 1:
        return f"share the parameters among more devices: config.mesh.fsdp={devices.shape['fsdp'] * 2}"
    if config.get("discriminator_frames") == 0 and config.data.num_frames > 1:
        return f"show the discriminator half of each clip: config.discriminator_frames={config.data.num_frames // 2}"
    if any(group in (*GROUPS, "all") for group in config.trainable):
        return "train less: config.trainable=('lora',)"
    return f"share each clip among more devices: config.mesh.context={devices.shape['context'] * 2}"


def report(plan: Plan, chip: Chip, verdict: str) -> str:
    """What is printed about one program."""
    lines = [
        f"  arguments    {plan.arguments / _GB:9.2f} GB",
        f"  temporaries  {plan.temporaries / _GB:9.2f} GB",
        f"  total        {plan.total / _GB:9.2f} GB" + (f" of {chip.memory / _GB:.2f} GB" if chip.memory else ""),
        f"  operations   {plan.flops / 1e12:9.2f} TFLOP a step",
    ]
    lines += [
        f"  {kind:<19}{total / _GB:6.2f} GB in {count} places"
        for kind, (count, total) in sorted(plan.collectives.items())
    ]
    if chip.peak and plan.flops:
        lines.append(f"  time         {plan.flops / chip.peak:9.2f} s a step at the chip's peak: it cannot be faster")
    return "\n".join([*lines, f"  {verdict}"])


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
    try:
        compiled = traced.lower().compile(CPU_OPTIONS if devices.devices.flat[0].platform == "cpu" else None)
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


def make_plan(config: ConfigDict, topology: str) -> bool:
    """Prints what every resolution of a configuration needs; whether all fit.

    Raises:
        UserError: a configuration that cannot run on these devices.
    """
    check_config(config)
    if config.weights and not weights.locate(config.weights).is_dir():
        print(f"{config.weights} is not there: planning for Stable Video Diffusion's own sizes.")
        config.weights = ""
    if config.data.dataset:
        print("Planning for clips that are encoded in the step, which takes more memory than reading their latents.")
        config.data.dataset = ""
    config = setup.with_num_frames(config)
    chip, available = devices_of(topology)
    devices = layout(config, available)
    setup.check_layout(config, setup.networks_of(config), devices)
    shape = " x ".join(f"{name} {size}" for name, size in devices.shape.items())
    print(f"{config.objective} on {len(available)} x {chip.name} ({shape}), batch {config.batch_size}, {config.dtype},")
    print(f"trains {' + '.join(config.trainable)}; remat {config.remat}, attention {config.attention}")
    all_fit = True
    for phase in phases_of(config):
        start = time.perf_counter()
        print(f"{config.data.num_frames} x {phase.height} x {phase.width}: compiling ...", flush=True)
        try:
            plan = plan_without_code(config, phase, topology)
        except DoesNotFit as needed:
            print(f"  does not fit ({needed}): {advice(config, devices)}.")
            all_fit = False
            continue
        fits = chip.memory is None or plan.total <= chip.memory
        verdict = "fits" if fits else f"does not fit: {advice(config, devices)}"
        print(report(plan, chip, f"{verdict} (after {time.perf_counter() - start:.0f} s)."), flush=True)
        all_fit &= fits
    return all_fit


def run() -> None:
    """The program: exit status 1 if something does not fit; what the user can mend is one sentence and status 2."""
    config = config_flags.DEFINE_config_file("config", help_string="A file of configs/, e.g. configs/stage2.py.")
    topology = flags.DEFINE_string("topology", "cpu", "v5e:4x4, v5p:2x2x2, v6e:2x2, gpu:8x80GB, or cpu.")

    def main(argv: list[str]) -> int:
        if config.value is None:
            raise UserError("--config is needed, e.g. --config=configs/stage2.py.")
        return 0 if make_plan(config.value, topology.value) else 1

    command_line.run(main)


if __name__ == "__main__":
    run()
