"""What the kernels of a compiled program for GPUs read, write and multiply.

They run one after another, each from memory to memory, so that a step takes at least the sum of
what each of them takes.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass

from flip_jax.compile.hlo import Instruction, Module, arrays

_CALLED = re.compile(r"\bcalls=%?([\w.-]+)")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_CONFIG = re.compile(r"\bbackend_config=(\{.*\})")
# No kernels: names, constants, what is executed as its parts, and what `collectives` counts.
_NONE = re.compile(
    r"(all|collective|reduce-scatter|async|send|recv|copy-start|copy-done|partition-id|replica-id)"
    r"|(parameter|constant|get-tuple-element|tuple|bitcast|while|conditional|call|after-all"
    r"|optimization-barrier)$"
)
# A fusion that takes part of a parameter reads that part.
_PARTS = ("dynamic-slice", "slice", "gather")
_RENAMED = ("bitcast", "reshape", "copy")


@dataclass(frozen=True)
class Kernel:
    """One instruction, on one device and in one step, with all the times that it runs.

    Attributes:
      what: type and origin. count: how often it runs.
      bytes: read and written. flops: of the matrix products in it.
    """

    what: str
    count: int
    bytes: float
    flops: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """If nothing but the slower of the two took any time."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def kernels(module: Module) -> list[Kernel]:
    """The kernels of a module as `jax.stages.Compiled.as_text` of a GPU has it, most bytes first.

    cuDNN's attention counts by its bytes alone.
    """
    fused = {name for _, one, _ in module.executed() if (name := _fusion(one))}
    found = []
    for computation, instruction, times in module.executed():
        if computation in fused or _NONE.match(instruction.op):
            continue
        if '"AllocateBuffer"' in instruction.attributes:
            continue
        moved = _bytes(module, computation, instruction)
        flops = _flops(module, computation, instruction)
        source = _SOURCE.search(instruction.attributes)
        what = f"{instruction.type.split('{')[0].strip('(')} of {source[1] if source else '?'}"
        found.append(Kernel(what, times, times * moved, times * flops))
    return sorted(found, key=lambda kernel: -kernel.bytes)


def _fusion(instruction: Instruction) -> str | None:
    called = _CALLED.search(instruction.attributes)
    return called[1] if instruction.op == "fusion" and called else None


def _flops(module: Module, computation: str, instruction: Instruction) -> float:
    if instruction.op == "dot":
        return module.flops_of_dot(computation, instruction)
    if name := _fusion(instruction):
        return sum(_flops(module, name, one) for one in module.computations[name].values())
    config = _CONFIG.search(instruction.attributes)
    if instruction.op != "custom-call" or "__cublas$" not in instruction.attributes or not config:
        return 0.0
    dims = json.loads(config[1])["gemm_backend_config"]["dot_dimension_numbers"]
    (result, _), *_ = arrays(instruction.type)
    left = module.computations[computation][instruction.operands[0]]
    (shape, _), *_ = arrays(left.type)
    contracted = [shape[int(axis)] for axis in dims["lhs_contracting_dimensions"]]
    return 2.0 * math.prod(result) * math.prod(contracted)


def _bytes(module: Module, computation: str, instruction: Instruction) -> float:
    known = module.computations[computation]
    if name := _fusion(instruction):
        return _bytes_of_fusion(module, name)
    if instruction.op in _PARTS:
        return 2.0 * instruction.bytes
    if instruction.op == "dynamic-update-slice":
        return 2.0 * known[instruction.operands[1]].bytes
    written = instruction.bytes
    if "__cublas$" in instruction.attributes:  # the rest is workspace
        shape, size = arrays(instruction.type)[0]
        written = math.prod(shape) * size
    return written + module.operand_bytes(computation, instruction)


def _bytes_of_fusion(module: Module, name: str) -> float:
    inside, root = module.computations[name], module.root(name)
    users: dict[str, list[Instruction]] = defaultdict(list)
    for one in inside.values():
        for operand in one.operands if one.op not in ("parameter", "constant") else ():
            users[operand].append(one)

    def uses(value: str) -> list[tuple[str, Instruction]]:
        """(under which name, by whom) what a parameter holds is used."""
        found = []
        for user in users[value]:
            found += uses(user.name) if user.op in _RENAMED else [(value, user)]
        return found

    total = 0.0
    for one in inside.values():
        if one.op != "parameter":
            continue
        read = sum(_read(user, at, one) for at, user in uses(one.name))
        total += min(read, one.bytes)
    for result in [inside[name] for name in root.operands] if root.op == "tuple" else [root]:
        while result.op in _RENAMED and result.operands[0] in inside:
            result = inside[result.operands[0]]
        total += _written(result, inside)
    return total


def _written(result: Instruction, inside: dict[str, Instruction]) -> float:
    """Bytes of a result of a fusion; of one that is written into in place, what is written."""
    if result.op == "dynamic-update-slice":
        return inside[result.operands[1]].bytes
    if result.op == "scatter" and len(result.operands) == 3:  # adds: there and back
        return 2.0 * inside[result.operands[2]].bytes
    return result.bytes


def _read(user: Instruction, value: str, parameter: Instruction) -> float:
    """Bytes that `user` reads of the parameter that it knows as `value`."""
    if user.operands[0] == value:
        if user.op in _PARTS:
            return user.bytes
        if user.op in ("dynamic-update-slice", "scatter"):  # in place
            return 0.0
    return parameter.bytes
