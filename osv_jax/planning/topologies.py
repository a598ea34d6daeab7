"""Devices that need not be there (TPU slices, GPU hosts, a CPU), and the mesh that a configuration lays over them."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import jax
import numpy as np
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from osv_jax.errors import UserError
from osv_jax.runtime import mesh
from osv_jax.runtime.ranges import Range

# Each is a CPU device with threads of its own.
_GPUS, _GIGABYTES = Range(1, 1024, whole=True), Range(1, 10_000, whole=True)


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
        return Chip(f"GPU of {gigabytes} GB", gigabytes * 1e9, None), jax.local_devices(backend="cpu")
    if kind in _TPUS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
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
