"""What is printed about every resolution of a configuration, with the next thing to change where it does not fit."""

from __future__ import annotations

import time

from jax.sharding import Mesh
from ml_collections import ConfigDict

from osv_jax.convert import weights
from osv_jax.models.groups import GROUPS
from osv_jax.planning import compiling, topologies
from osv_jax.planning.chips import Chip
from osv_jax.planning.hlo import Plan
from osv_jax.training import setup
from osv_jax.training.config import check_config, phases_of

_GB = 1e9


def make_plan(config: ConfigDict, topology: str) -> bool:
    """Prints what every resolution of a configuration needs; whether all fit.

    Raises:
        UserError: a configuration that cannot run on these devices.
    """
    check_config(config)
    if config.weights and not weights.locate(config.weights).is_dir():
        print(f"{config.weights} is not there: planning for the released networks' own sizes.")
        config.weights = ""
    if config.data.dataset:
        print("Planning for clips that are encoded in the step, which takes more memory than reading their latents.")
        config.data.dataset = ""
    config = setup.with_num_frames(config)
    chip, available = topologies.devices_of(topology)
    devices = topologies.layout(config, available)
    setup.check_layout(config, setup.networks_of(config), devices)
    shape = " x ".join(f"{name} {size}" for name, size in devices.shape.items())
    print(f"{config.objective} on {len(available)} x {chip.name} ({shape}), batch {config.batch_size}, {config.dtype},")
    trains = " + ".join(config.get("trainable", ("all",)))
    print(f"trains {trains}; remat {config.remat}, attention {config.attention}")
    all_fit = True
    for phase in phases_of(config):
        start = time.perf_counter()
        print(f"{config.data.num_frames} x {phase.height} x {phase.width}: compiling ...", flush=True)
        try:
            plan = compiling.plan_without_code(config, phase, topology)
        except compiling.DoesNotFit as needed:
            print(f"  does not fit ({needed}): {advice(config, devices)}.")
            all_fit = False
            continue
        fits = chip.memory is None or plan.total <= chip.memory
        verdict = "fits" if fits else f"does not fit: {advice(config, devices)}"
        print(describe(plan, chip, f"{verdict} (after {time.perf_counter() - start:.0f} s)."), flush=True)
        all_fit &= fits
    return all_fit


def advice(config: ConfigDict, devices: Mesh) -> str:
    """The next thing to change when a step does not fit."""
    accumulated = config.get("grad_accum", 1)
    per_part = config.batch_size // (devices.shape["data"] * devices.shape["fsdp"] * accumulated)
    if config.remat != "full":
        return "set config.remat=full"
    if per_part > 1 and "grad_accum" not in config:
        return f"give each device fewer clips: config.batch_size={config.batch_size // per_part}"
    if per_part > 1:
        return f"compute a device's clips one after the other: config.grad_accum={accumulated * per_part}"
    if devices.shape["data"] > 1:
        return f"share the parameters among more devices: config.mesh.fsdp={devices.shape['fsdp'] * 2}"
    if config.get("discriminator_frames") == 0 and config.data.num_frames > 1:
        return f"show the discriminator half of each clip: config.discriminator_frames={config.data.num_frames // 2}"
    if any(group in (*GROUPS, "all") for group in config.get("trainable", ())):
        return "train less: config.trainable=('lora',)"
    return f"share each clip among more devices: config.mesh.context={devices.shape['context'] * 2}"


def describe(plan: Plan, chip: Chip, verdict: str) -> str:
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
    lines += describe_traffic(plan, chip)
    if chip.unknown:
        lines.append(f"  The compiler cannot know {chip.unknown}.")
    return "\n".join([*lines, f"  {verdict}"])


def describe_traffic(plan: Plan, chip: Chip) -> list[str]:
    """What is printed about the traffic with a device's memory; docs/performance.md says how to read it."""
    traffic = plan.traffic
    lines = [f"  traffic      {traffic.total / _GB:9.2f} GB a step with the device's memory"]
    lines += [f"    {kind:<24}{size / _GB:9.2f} GB" for kind, size in traffic.by_kind.items()]
    if traffic.unknown_loops:
        lines.append(f"    Not known how often they run, and counted once: {traffic.unknown_loops} loops.")
    if chip.peak and chip.bandwidth:
        beside = traffic.beside_operations
        lines.append(
            f"  roofline     {traffic.seconds(plan.flops, chip.peak, chip.bandwidth):9.2f} s a step: the larger of"
            f" {plan.flops / chip.peak:.2f} s (operations) and {beside / chip.bandwidth:.2f} s (their traffic), and"
            f" {(traffic.total - beside) / chip.bandwidth:.2f} s (other traffic)"
        )
    lines.append("  most traffic comes from")
    lines += [
        f"    {cause.bytes / _GB:9.2f} GB {cause.kind}, {cause.runs} times, {cause.operation} {cause.source}".rstrip()
        for cause in traffic.causes
    ]
    return lines
