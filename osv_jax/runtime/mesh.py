"""Devices: the mesh, and which part of every array each device holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from osv_jax.errors import UserError

AXES = ("data", "fsdp", "context")
BATCH_AXES = ("data", "fsdp")
# A parameter with fewer elements than this is kept whole on every device: gathering it would cost more than it saves.
_MIN_SHARDED_ELEMENTS = 2**18


def make_mesh(data: int, fsdp: int, context: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices, of all processes; one of the three may be -1, which takes what is left.

    Args:
        data: groups of devices with a copy of all parameters each; they split the batch.
        fsdp: devices that share the parameters; they split the batch, too.
        context: devices that share every clip, each having a part of its height.
        devices: only these of this process.

    Raises:
        UserError: when the three do not multiply to the number of devices, or a clip would lie in several processes.
    """
    sizes = mesh_sizes(data, fsdp, context, jax.device_count() if devices is None else len(devices))
    if jax.local_device_count() % sizes[2]:
        raise UserError(
            f"config.mesh.context={sizes[2]} must divide the {jax.local_device_count()} devices of a process: a clip"
            " lies in one."
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def mesh_sizes(data: int, fsdp: int, context: int, devices: int) -> tuple[int, int, int]:
    """The sizes of the three axes, none of them -1.

    Raises:
        UserError: when they do not multiply to the number of devices.
    """
    sizes = [data, fsdp, context]
    asked = " x ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    if -1 in sizes:
        known = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = max(1, devices // known)
    if -1 in sizes or int(np.prod(sizes)) != devices:
        raise UserError(
            f"config.mesh asks for {asked} devices, but there are {devices}; make the product {devices}, or set one of"
            " them to -1."
        )
    return sizes[0], sizes[1], sizes[2]


def batch_shardings(mesh: Mesh, batch: Any) -> Any:
    """A batch's first axis is split over `data` and `fsdp`, and the height of clips (b f h w c) over `context`.

    Scalars, such as a key, are whole on every device.
    """
    specs = {0: PartitionSpec(), 5: PartitionSpec(BATCH_AXES, None, "context")}
    return jax.tree.map(lambda leaf: NamedSharding(mesh, specs.get(np.ndim(leaf), PartitionSpec(BATCH_AXES))), batch)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(mesh: Mesh, tree: Any) -> Any:
    """One rule for parameters, EMAs and optimizer states alike: see `parameter_spec`."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, parameter_spec(leaf.shape, mesh.shape["fsdp"])), tree)


def parameter_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Splits the largest dimension that `fsdp` divides; small arrays, and those without one, stay whole."""
    divisible = [i for i, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not divisible or np.prod(shape) < _MIN_SHARDED_ELEMENTS:
        return PartitionSpec()
    axis = max(divisible, key=lambda i: shape[i])
    return PartitionSpec(*[None] * axis, "fsdp")


def unsplit_parameters(tree: Any, fsdp: int) -> list[str]:
    """Names of the large parameters that `fsdp` devices cannot share, because it divides none of their dimensions."""
    if fsdp == 1:
        return []
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree.leaves_with_path(tree)
        if np.prod(leaf.shape) >= _MIN_SHARDED_ELEMENTS and parameter_spec(leaf.shape, fsdp) == PartitionSpec()
    ]


def global_batches(local_batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh) -> Iterable[dict[str, jax.Array]]:
    """Assembles each process's part into arrays over all devices, one batch ahead of the one in use."""
    ahead = None
    for local in local_batches:
        shardings = batch_shardings(mesh, local)
        placed = {name: jax.make_array_from_process_local_data(shardings[name], local[name]) for name in local}
        if ahead is not None:
            yield ahead
        ahead = placed
    if ahead is not None:
        yield ahead
