"""Devices that need not be there (TPU slices, GPU hosts, a CPU), and the mesh that a configuration lays over them."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Any

import jax
import numpy as np
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from osv_jax.errors import UserError
from osv_jax.planning.chips import CPU, TPUS, Chip, gpu, gpu_names, nearest_gpu
from osv_jax.runtime import mesh
from osv_jax.runtime.ranges import Range

_DEVICES, _GIGABYTES = Range(1, 1024, whole=True), Range(1, 10_000, whole=True)
_FORMS = (
    f"a TPU slice ({', '.join(TPUS)}; v5e:4x4), GPUs of one machine or of several ({', '.join(gpu_names())}; h100:8,"
    " h100:2x8), or of a size (gpu:8x80GB), or cpu"
)


def devices_of(topology: str) -> tuple[Chip, list[Any]]:
    """The kind and the devices of a topology.

    Raises:
        UserError: an unknown name, a shape without devices, or no compiler for them.
    """
    kind, _, shape = topology.partition(":")
    if kind == "gpu" and (match := re.fullmatch(r"(\d+)x(\d+)GB", shape)):
        kind, shape = nearest_gpu(_within(topology, match[2], _GIGABYTES, "memory of each GPU [GB]")), match[1]
    if kind == "cpu" and re.fullmatch(r"\d*", shape):
        return CPU, _cpus(topology, shape or "1")
    if kind in gpu_names() and (match := re.fullmatch(r"(?:(\d+)x)?(\d+)", shape)):
        machines = _within(topology, match[1] or "1", _DEVICES, "number of machines")
        count = _within(topology, match[2], _DEVICES, "number of GPUs")
        _within(topology, str(machines * count), _DEVICES, "number of GPUs")
        return gpu(kind), _gpus(kind, machines, count)
    if kind in TPUS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        # Or libtpu would be one process's alone, as chips are.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        # Without a TPU machine libtpu asks the network who else there is.
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        try:
            # libtpu takes every host for one with four chips, but single chips are rented, too.
            single = {"chips_per_host_bounds": (1, 1, 1)} if re.fullmatch(r"1(x1)*", shape) else {}
            described = get_topology_desc(topology, platform="tpu", **single)
        except Exception as error:  # libtpu's own; JAX names no type for them
            raise UserError(
                f"--topology={topology} cannot be compiled for: {str(error).splitlines()[0]}; give a shape that exists,"
                " such as v5e:4x4, and install libtpu (pip install 'jax[tpu]')."
            ) from error
        return TPUS[kind], list(described.devices)
    raise UserError(f"--topology={topology} is unknown; give {_FORMS}.")


def _within(topology: str, number: str, allowed: Range, what: str) -> int:
    if int(number) not in allowed:
        raise UserError(f"--topology={topology} must have {allowed} for the {what}.")
    return int(number)


def _gpus(kind: str, machines: int, count: int) -> list[Any]:
    # The extra's, or that of a machine with GPUs.
    if not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        raise UserError(
            "The compiler for GPUs is not installed: pip install -c constraints.txt -e '.[plan-gpu]', or plan with"
            " --topology=cpu:8 for as many parts of this machine."
        )
    # It would look for libraries that a GPU's programs need and its compiler does not.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    # Machines without fast links to one another: partitions of one host.
    shape = f"{machines}x1x{count}"
    described = get_topology_desc(kind, platform="cuda", target_config=gpu(kind).target, topology=shape)
    return list(described.devices)


def _cpus(topology: str, number: str) -> list[Any]:
    """This machine, several times: each device is some threads of it."""
    count = _within(topology, number, _DEVICES, "number of devices")
    if count > 1:
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError as error:
            raise UserError(f"--topology={topology} must be chosen before devices are used.") from error
    return jax.local_devices(backend="cpu")[:count]


def layout(config: ConfigDict, available: list[Any]) -> Mesh:
    """The mesh of a configuration on these devices.

    Raises:
        UserError: when it does not multiply to their number.
    """
    sizes = mesh.mesh_sizes(config.mesh.data, config.mesh.fsdp, config.mesh.context, len(available))
    return Mesh(np.asarray(available).reshape(sizes), mesh.AXES, axis_types=(AxisType.Auto,) * 3)
