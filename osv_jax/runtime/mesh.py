"""Devices: the mesh, and which part of every array each device holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from osv_jax.errors import UserError

# A parameter with fewer elements than this is kept whole on every device: gathering it would cost more than it saves.
_MIN_SHARDED_ELEMENTS = 2**18


def make_mesh(data: int, fsdp: int) -> Mesh:
    """The mesh with axes `data` (batch only) and `fsdp` (batch, and parameters split); -1 takes what is left.

    Raises:
        UserError: when the two do not multiply to the number of devices.
    """
    devices = jax.device_count()
    sizes = [data, fsdp]
    if -1 in sizes:
        known = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = max(1, devices // known)
    if -1 in sizes or int(np.prod(sizes)) != devices:
        raise UserError(
            f"config.mesh asks for data={data} x fsdp={fsdp} devices, but there are {devices}; make the product"
            f" {devices}, or set one of them to -1."
        )
    return jax.make_mesh(tuple(sizes), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(mesh: Mesh, tree: Any) -> Any:
    """One rule for parameters, averages and optimizer states alike: see `parameter_spec`."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, parameter_spec(leaf.shape, mesh.shape["fsdp"])), tree)


def parameter_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Splits the largest dimension that `fsdp` divides; small arrays, and those without one, stay whole."""
    divisible = [i for i, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not divisible or np.prod(shape) < _MIN_SHARDED_ELEMENTS:
        return PartitionSpec()
    axis = max(divisible, key=lambda i: shape[i])
    return PartitionSpec(*[None] * axis, "fsdp")


def global_batches(local_batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh) -> Iterable[dict[str, jax.Array]]:
    """Assembles each process's part into arrays over all devices, one batch ahead of the one in use."""
    sharding = batch_sharding(mesh)
    ahead = None
    for local in local_batches:
        placed = {name: jax.make_array_from_process_local_data(sharding, value) for name, value in local.items()}
        if ahead is not None:
            yield ahead
        ahead = placed
    if ahead is not None:
        yield ahead
