"""Reads the compiler's text (HLO): what one device executes in a step, loops counted out.

Works on any module text of XLA, before or after optimisation. Loops of a known length multiply
what is in them; the length is read from the condition (counter < constant), the start and the
increment of the counter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_ASSIGNMENT = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.-]+))"
)
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Results that are their operand under another name or layout.
_SAME_VALUE = ("bitcast", "convert", "copy", "reshape", "optimization-barrier")


@dataclass(frozen=True)
class Instruction:
    name: str
    op: str
    type: str  # of the result: `f32[8,16]{1,0}` or a tuple of such
    inside: str  # what stands between the parentheses: operands, or a literal
    attributes: str

    @property
    def operands(self) -> list[str]:
        # Before the compiler has changed it a module is written without `%`, and without types.
        marked = re.findall(r"%([\w.-]+)", self.inside)
        return marked or [name.strip() for name in self.inside.split(",") if name.strip()]

    @property
    def bytes(self) -> int:
        """Of the result."""
        return sum(math.prod(shape) * size for shape, size in arrays(self.type))

    def integers(self, attribute: str) -> list[int]:
        """`[1, 2]` of `attribute={1,2}`; empty if it is absent."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return [int(n) for n in found[1].split(",") if n] if found else []


def arrays(type_text: str) -> list[tuple[tuple[int, ...], float]]:
    """(shape, bytes of an element) of each array in a type."""
    found = []
    for kind, dims in _ARRAY.findall(type_text):
        bits = re.search(r"\d+", kind)
        size = 1 if kind == "pred" else int(bits[0]) / 8 if bits else 0
        found.append((tuple(int(n) for n in dims.split(",") if n), size))
    return found


class Module:
    """A parsed module.

    Attributes:
      computations: name -> {instruction name: Instruction}, in the order of the text.
      unknown_loops: names of loops that run an unknown number of times; they count once.
      in_unknown_loops: computations that are inside them.

    Raises:
      ValueError: the text has no entry computation.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self._roots: dict[str, Instruction] = {}
        self._entry = None
        self._read(text)
        if self._entry is None:
            raise ValueError("no ENTRY computation: this is not the text of an HLO module")
        self.unknown_loops: set[str] = set()
        self.in_unknown_loops: set[str] = set()
        self._times: dict[str, int] = {}
        self._visit(self._entry, 1, True)

    def executed(self) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, how often it runs in one step on one device)."""
        for name, times in self._times.items():
            for instruction in self.computations[name].values():
                yield name, instruction, times

    def root(self, computation: str) -> Instruction:
        """What a computation results in."""
        return self._roots[computation]

    def operand_bytes(self, computation: str, instruction: Instruction) -> float:
        known = self.computations[computation]
        return sum(known[name].bytes for name in instruction.operands)

    def flops_of_dot(self, computation: str, dot: Instruction) -> float:
        """Floating-point operations of one matrix product: 2 m n k."""
        (result, _), *_ = arrays(dot.type)
        (left, _), *_ = arrays(self.computations[computation][dot.operands[0]].type)
        contracted = [left[i] for i in dot.integers("lhs_contracting_dims")]
        return 2.0 * math.prod(result) * math.prod(contracted)

    def dot_flops(self) -> float:
        """Of all matrix products, times loop lengths."""
        return sum(
            times * self.flops_of_dot(computation, instruction)
            for computation, instruction, times in self.executed()
            if instruction.op == "dot"
        )

    def dot_bytes(self) -> float:
        """Bytes of operands and results of all matrix products, times loop lengths."""
        return sum(
            times * (instruction.bytes + self.operand_bytes(computation, instruction))
            for computation, instruction, times in self.executed()
            if instruction.op == "dot"
        )

    def _read(self, text: str) -> None:
        current = None
        for line in text.splitlines():
            if line.rstrip() == "}":  # a kernel's call may have lines that start so
                current = None
            elif current is None:
                if header := _HEADER.match(line):
                    current = header[2]
                    self.computations[current] = {}
                    if header[1]:
                        self._entry = current
            elif found := _ASSIGNMENT.match(line):
                instruction = _instruction(found[2], _COMMENT.sub("", line[found.end() :]))
                self.computations[current][instruction.name] = instruction
                if found[1]:
                    self._roots[current] = instruction

    def _visit(self, name: str, times: int, known: bool) -> None:
        self._times[name] = self._times.get(name, 0) + times
        if not known:
            self.in_unknown_loops.add(name)
        for instruction in self.computations[name].values():
            called = dict(_CALLED.findall(instruction.attributes))
            if instruction.op == "while":
                trips = self._trips(name, instruction, called["condition"], called["body"])
                if trips is None:
                    self.unknown_loops.add(instruction.name)
                    self._visit(called["body"], times, False)
                else:
                    self._visit(called["body"], times * trips, known)
            elif instruction.op in ("call", "fusion", "async-start"):
                self._visit(called.get("calls") or called["to_apply"], times, known)
            elif instruction.op == "conditional":  # which branch runs is not known: all count
                for several, one in _BRANCHES.findall(instruction.attributes):
                    for branch in (several or one).replace("%", "").split(","):
                        self._visit(branch.strip(), times, known)

    def _trips(self, where: str, loop: Instruction, condition: str, body: str) -> int | None:
        """How often a loop runs; None if its text does not say."""
        if known := _KNOWN_TRIPS.search(loop.attributes):
            return int(known[1])
        test = self._value(condition, self._roots[condition].name)
        if test.op != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, limit = (self._value(condition, name) for name in test.operands)
        if counter.op != "get-tuple-element" or limit.op != "constant":
            return None
        index = _index(counter)
        start = self._value(where, self._element(where, loop.operands[0], index))
        step = self._step(body, index)
        if start.op != "constant" or not step:
            return None
        return max(math.ceil((int(limit.inside) - int(start.inside)) / step), 0)

    def _step(self, body: str, index: int) -> int | None:
        """What a loop adds to element `index` of its state in each round."""
        total, value = 0, self._value(body, self._element(body, self._roots[body].name, index))
        while value.op == "add":
            first, second = (self._value(body, name) for name in value.operands)
            value, constant = (second, first) if first.op == "constant" else (first, second)
            if constant.op != "constant":
                return None
            total += int(constant.inside)
        return total if value.op == "get-tuple-element" and _index(value) == index else None

    def _element(self, computation: str, name: str, index: int) -> str:
        """The name of what stands at `index` of a tuple."""
        value = self._value(computation, name)
        return value.operands[index] if value.op == "tuple" else name

    def _value(self, computation: str, name: str) -> Instruction:
        """The instruction that makes a value, without copies and casts."""
        known = self.computations[computation]
        while known[name].op in _SAME_VALUE:
            name = known[name].operands[0]
        return known[name]


def _index(element: Instruction) -> int:
    return int(re.search(r"\bindex=(\d+)", element.attributes)[1])


def _instruction(name: str, text: str) -> Instruction:
    """`f32[2]{0} add(%a, %b), metadata={}` in parts."""
    end = _closing(text) if text.startswith("(") else text.index(" ")
    kind, rest = text[:end].strip(), text[end:].strip()
    start = rest.index("(")
    end = start + _closing(rest[start:])
    return Instruction(name, rest[:start], kind, rest[start + 1 : end - 1], rest[end:])


def _closing(text: str) -> int:
    """Just after the parenthesis that closes the one at the start."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return at + 1
    raise ValueError(f"unbalanced parentheses: {text[:80]}")
