"""The mesh, and where every array lives on it.

Axes: `data` and `fsdp`, both over the rows of a batch; parameters, optimizer state and momentum
twins are cut over `fsdp` by one table of path rules, everything else is replicated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flip_jax.config import MeshConfig

# Path of a leaf (names joined by `/`) -> axes of its last dimensions; the first match counts.
RULES = (
    (r"(query|key|value|up|patch_embed|image_proj|text_proj)/kernel$", ("fsdp", None)),
    (r"(out|down)/kernel$", (None, "fsdp")),
    (r"(word_embed|position_embed)$", (None, "fsdp")),
)


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp) mesh over all devices.

    Devices stand slice by slice and host by host, so that each host's rows of a batch are one
    stretch and the slow links between slices run along `data`.

    Raises:
      ValueError: if `mesh.data * mesh.fsdp` is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    data = count // cfg.fsdp if cfg.data == -1 else cfg.data
    if data * cfg.fsdp != count or data < 1:
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        raise ValueError(
            f"mesh.data={cfg.data} x mesh.fsdp={cfg.fsdp} does not make the {count} devices there "
            f"are; set mesh.data=-1 and mesh.fsdp to one of {', '.join(map(str, divisors))}"
        )
    ordered = sorted(devices, key=lambda d: (getattr(d, "slice_index", 0), d.process_index, d.id))
    grid = np.asarray(ordered).reshape(data, cfg.fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def host_slice(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Which of how many equal stretches of a batch's rows a process holds: (index, count).

    Args:
      process: None = this one.

    Raises:
      ValueError: if the rows of the mesh's processes are not equal stretches, or the process has
        no device of the mesh.
    """
    process = jax.process_index() if process is None else process
    owners = [device.process_index for device in mesh.devices.flat]
    order = list(dict.fromkeys(owners))
    each = len(owners) // len(order)
    if owners != [owner for owner in order for _ in range(each)]:
        raise ValueError(f"the processes of the mesh's devices, {owners}, are not equal stretches")
    if process not in order:
        raise ValueError(f"process {process} has no device of the mesh, only {order} have")
    return order.index(process), len(order)


def leaf_path(path: tuple) -> str:
    """`params/vit/blocks/attn/query/kernel` from a JAX key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def partition_spec(path: str, shape: tuple[int, ...], fsdp: int) -> P:
    """Spec of one leaf; a dimension that `fsdp` does not divide stays whole."""
    for pattern, axes in RULES:
        if re.search(pattern, path) and len(shape) >= len(axes):
            lead = len(shape) - len(axes)
            if all(a is None or shape[lead + i] % fsdp == 0 for i, a in enumerate(axes)):
                return P(*(None,) * lead, *axes)
    return P()


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """NamedSharding for every leaf of a (possibly abstract) train state."""

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(leaf_path(path), leaf.shape, mesh.shape["fsdp"]))

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all devices."""
    return NamedSharding(mesh, P(mesh.axis_names))


def sharding_table(state: Any) -> str:
    """One line per leaf of an abstract state: path, type, spec, MiB on each device; then totals.

    Args:
      state: tree of `jax.ShapeDtypeStruct` with shardings.
    """
    rows, totals = [], {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = leaf_path(path)
        size = leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) / 2**20
        part = name.split("/")[0]
        totals[part] = totals.get(part, 0.0) + size
        kind = f"{leaf.dtype}{list(leaf.shape)}"
        rows.append(f"{name:62} {kind:26} {tuple(leaf.sharding.spec)!s:24} {size:9.2f}")
    rows += [f"{part:114} {size:9.2f}" for part, size in totals.items()]
    rows.append(f"{'MiB on each device':114} {sum(totals.values()):9.2f}")
    return "\n".join(rows)


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global device arrays, rows over all devices."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def replicated(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process has, or abstract ones, whole on every device."""
    sharding = NamedSharding(mesh, P())

    def place(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(place, tree)
