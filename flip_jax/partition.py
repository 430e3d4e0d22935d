"""The mesh, and where every array lives on it.

Axes: `data` and `fsdp`, both over the rows of a batch; parameters, optimizer state and momentum
twins are cut over `fsdp` by one table of path rules, everything else is replicated.
"""

from __future__ import annotations

import re
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


def make_mesh(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp) mesh over all devices.

    Raises:
      ValueError: if `mesh.data * mesh.fsdp` is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    data = count // cfg.fsdp if cfg.data == -1 else cfg.data
    if data * cfg.fsdp != count or data < 1:
        raise ValueError(
            f"mesh.data={cfg.data} x mesh.fsdp={cfg.fsdp} does not make the {count} devices there "
            f"are; set mesh.data=-1 and mesh.fsdp to a divisor of {count}"
        )
    grid = np.asarray(devices).reshape(data, cfg.fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


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
    return NamedSharding(mesh, P(("data", "fsdp")))


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global device arrays, rows over all devices."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
