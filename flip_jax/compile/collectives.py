"""The collectives of a compiled step: how many run, how much they move, over which mesh axes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from flip_jax.compile.hlo import Instruction, Module

# What a chip sends in a ring of n chips, as a multiple of the bytes it puts in.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? *\{([^}]*)\}"
)
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},? ?)*)\}")
_SOURCE = re.compile(r'op_name="([^"]*)"')
# Between slices libtpu sends through the hosts, after the chips of a slice did their part.
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TRANSFERS = {
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_GATHER": "all-gather",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
SLICES = "slices"


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind over one set of devices, summed over a step on one chip.

    Attributes:
      kind: XLA's name.
      axes: mesh axes it runs over, joined by `+`; `slices` = over the network between slices.
      count: executions, loops counted out.
      exchanged_bytes: size of what is reduced, gathered or moved.
      sent_bytes: what a chip sends if those that take part form a ring.
      per_round: in a loop whose length depends on the data; all numbers are those of one round.
      what: of a single instruction: its type and the operation of the model that it stems from.
    """

    kind: str
    axes: str
    count: int
    exchanged_bytes: float
    sent_bytes: float
    per_round: bool = False
    what: str = ""


def instructions(module: Module, mesh_shape: dict[str, int], slices: int = 1) -> list[Collective]:
    """Each collective instruction of `module`, most bytes first.

    Args:
      module: after the compiler merged collectives; with several slices, of libtpu.
      mesh_shape: axis -> size in one slice, in the order in which devices are numbered.
      slices: joined by the data-centre network.
    """
    devices, found = math.prod(mesh_shape.values()), []
    for computation, instruction, times in module.executed():
        kind, axes, size = _kind(instruction, mesh_shape, devices, slices)
        if kind is None or size == 1:
            continue
        # libtpu fuses an all-reduce with the slice that each chip keeps of it.
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        put_in = module.operand_bytes(computation, instruction)
        exchanged = put_in * size if kind == "all-gather" else put_in
        sent = _SENT[kind](size) * put_in
        per_round, what = computation in module.in_unknown_loops, _what(instruction)
        found.append(
            Collective(kind, axes, times, times * exchanged, times * sent, per_round, what)
        )
    return sorted(found, key=lambda c: -c.sent_bytes)


def summed(found: Iterable[Collective]) -> list[Collective]:
    """Those of one kind over the same axes as one, most bytes first."""
    totals: dict[tuple[str, str, bool], list[float]] = {}
    for one in found:
        total = totals.setdefault((one.kind, one.axes, one.per_round), [0, 0.0, 0.0])
        for at, value in enumerate((one.count, one.exchanged_bytes, one.sent_bytes)):
            total[at] += value
    sums = [Collective(kind, axes, *t, per_round) for (kind, axes, per_round), t in totals.items()]
    return sorted(sums, key=lambda c: -c.sent_bytes)


def _what(instruction: Instruction) -> str:
    types = re.findall(r"\w+\[[\d,]*\]", instruction.type)
    more = f" and {len(types) - 1} more" if len(types) > 1 else ""
    source = _SOURCE.search(instruction.attributes)
    return f"{types[0]}{more}, {source[1] if source else 'of the compiler'}"


def _kind(
    instruction: Instruction, mesh_shape: dict[str, int], devices: int, slices: int
) -> tuple[str | None, str, int]:
    """(kind, axes, number that take part); kind None = no collective."""
    kind = instruction.op.removesuffix("-start")
    if kind in _SENT:
        members = groups(instruction.attributes, devices)
        return kind, _axes(members, mesh_shape), members.shape[1]
    if kind == "send" and (found := _TRANSFER.search(instruction.attributes)):
        return _TRANSFERS[found[1]], SLICES, slices
    return None, "", 1


def groups(attributes: str, devices: int) -> np.ndarray:
    """The devices that work together, int [groups, members]; pairs for a permutation.

    Reads the three ways in which XLA writes them: lists, a reshaped range, axes of a mesh.

    Raises:
      ValueError: none of the three.
    """
    if found := _MESH_GROUPS.search(attributes):
        sizes = [int(n) for n in re.findall(r"'=(\d+)", found[1])]
        names = re.findall(r"'([^']*)'=", found[1])
        return _mesh_groups(dict(zip(names, sizes, strict=True)), found[2], found[3], devices)
    if found := _IOTA_GROUPS.search(attributes):
        return _range(found[2]).reshape([int(n) for n in found[1].split(",")])
    if found := _LISTED_GROUPS.search(attributes):
        listed = [[int(n) for n in one.split(",")] for one in re.findall(r"\{([\d,]+)\}", found[1])]
        return np.array(listed or [range(devices)])
    raise ValueError(f"cannot read the groups of a collective: {attributes[:200]}")


def _mesh_groups(mesh: dict[str, int], order: str | None, axes: str, devices: int) -> np.ndarray:
    """Groups along `'a', 'b':(2)4`: whole axes, or the middle factor of (2, 4, rest) of one."""
    if order is None:
        ids = np.arange(devices)
    elif order.startswith("["):
        ids = _range(order).reshape(-1)
    else:
        ids = np.array([int(n) for n in order.split(",")])
    chosen = {}
    for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes):
        chosen.setdefault(name, []).append((int(before or 1), int(size or mesh[name])))
    shape, along = [], []
    for name, full in mesh.items():
        done = 1
        for before, size in sorted(chosen.get(name, [])):
            shape += [before // done, size]
            along.append(len(shape) - 1)
            done = before * size
        shape.append(full // done)
    grid = np.moveaxis(ids.reshape(shape), along, range(-len(along), 0))
    return grid.reshape(-1, int(np.prod([shape[i] for i in along])))


def _range(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: 0..7 in shape [4, 2], transposed."""
    dims, *order = re.findall(r"[\d,]+", text)
    ids = np.arange(np.prod(_ints(dims))).reshape(_ints(dims))
    return ids.transpose(_ints(order[0])) if order else ids


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _axes(members: np.ndarray, mesh_shape: dict[str, int]) -> str:
    """The axes along which the members of a group differ."""
    places = np.unravel_index(members, list(mesh_shape.values()))
    differ = [name for name, at in zip(mesh_shape, places, strict=True) if np.ptp(at, axis=1).any()]
    return "+".join(differ)
