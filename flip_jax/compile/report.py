"""What is known of a compiled step, as text for people and as plain values for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from flip_jax.compile.cost import Bounds, Estimate
from flip_jax.compile.memory import Memory
from flip_jax.compile.step import CompiledStep

GIB = 2**30


def verdict(memory: Memory) -> str:
    """`fits`, `does not fit`, or `unknown` where the memory of the device is not known."""
    return {True: "fits", False: "does not fit", None: "unknown"}[memory.fits]


def to_dict(step: CompiledStep, estimate: Estimate | None) -> dict[str, Any]:
    """All of it, ready for JSON; sizes in bytes, times in seconds unless the name says hours."""
    values = dataclasses.asdict(step)
    del values["hlo"]
    return values | {
        "chips": step.chips,
        "verdict": verdict(step.memory),
        "estimate": estimate and dataclasses.asdict(estimate),
    }


def table(step: CompiledStep, estimate: Estimate | None, run: str) -> str:
    """The text that the command prints.

    Args:
      run: what the hours are of, in words.
    """
    lines = ["", *_memory_lines(step)]
    if step.dot_flops is not None:
        lines += ["", *_flop_lines(step)]
    if step.collectives is not None:
        lines += ["", *_collective_lines(step)]
    if estimate is not None:
        lines += ["", *_estimate_lines(step, estimate, run)]
    return "\n".join(lines)


def _memory_lines(step: CompiledStep) -> Iterator[str]:
    memory = step.memory
    unit, name = (GIB, "GiB") if memory.total >= GIB / 10 else (2**20, "MiB")
    yield f"{'memory of one chip':40}{name:>10}"
    for part, size in memory.parts.items():
        yield _row(f"  {part}", size / unit)
    if padding := memory.arguments - sum(memory.parts.values()):
        yield _row("  padding", padding / unit)
    yield _row("arguments", memory.arguments / unit)
    if memory.temporaries is None:
        yield f"{'temporaries':40}{'-':>10}  not compiled: the arguments alone are too much"
    else:
        yield _row("temporaries (activations, gradients)", memory.temporaries / unit)
        yield _row("outputs that replace no argument", memory.outputs / unit)
    of = "" if memory.capacity is None else f"  of {memory.capacity / unit:.2f}: {verdict(memory)}"
    yield _row("peak", memory.total / unit) + of
    if memory.largest:
        largest = (f"{size / unit:.2f} {kind}" for size, kind in memory.largest)
        yield f"largest temporaries: {', '.join(largest)}"
    if step.advice:
        yield "to make it fit:"
        yield from (f"  {line}" for line in step.advice)


def _flop_lines(step: CompiledStep) -> Iterator[str]:
    unit, name = (1e12, "TFLOP") if step.model_flops >= 1e11 else (1e9, "GFLOP")
    yield f"{'work of one chip and step':40}{name:>10}"
    yield _row("model (metrics.model_flops_per_pair)", step.model_flops / unit)
    more = f"  {step.dot_flops / step.model_flops:.2f} x the model, recomputation included"
    yield _row("matrix products as compiled", step.dot_flops / unit) + more
    if step.xla_flops is not None:
        yield _row("XLA's own count", step.xla_flops / unit) + "  the body of a loop counts once"


def _collective_lines(step: CompiledStep) -> Iterator[str]:
    yield f"{'collectives of one chip and step':34}{'count':>8}{'MB':>10}{'MB sent':>10}"
    for one in step.collectives:
        name = f"{one.kind} over {one.axes}{' *' if one.per_round else ''}"
        sizes = f"{one.exchanged_bytes / 1e6:>10.2f}{one.sent_bytes / 1e6:>10.2f}"
        yield f"  {name:32}{one.count:>8}{sizes}"
    sent = sum(one.sent_bytes for one in step.collectives) / 1e6
    yield f"{'in all':34}{sum(one.count for one in step.collectives):>8}{'':10}{sent:>10.2f}"
    if step.unknown_loops:
        yield f"* one round of {step.unknown_loops} loops whose length depends on the data"
    for one in step.heaviest:
        yield f"  {one.sent_bytes / 1e6:.2f} MB: {one.count} x {one.kind} of {one.what}"


def _estimate_lines(step: CompiledStep, estimate: Estimate, run: str) -> Iterator[str]:
    chip = step.chip
    yield "estimate, not a measurement; it assumes"
    yield (
        f"  matrix products at {estimate.efficiency:.0%} of {step.peak / 1e12:.0f} TFLOP/s: "
        f"{_milliseconds(estimate.compute)}"
    )
    rate = f"at {chip.hbm_bandwidth / 1e9:.0f} GB/s: {_milliseconds(estimate.hbm)}"
    if step.kernels is None:
        yield f"  their operands, and the state twice, {rate}"
    else:
        size, count = (sum(getattr(k, n) for k in step.kernels) for n in ("bytes", "count"))
        yield f"  the {size / 1e9:.3g} GB that {count:,} kernels read and write, {rate}"
        together = _milliseconds(estimate.kernels)
        yield f"  kernel after kernel, each the longer of the two: {together}"
        for one in step.kernels[:5]:
            yield f"    {one.bytes / 1e9:.2f} GB: {one.count} x {one.what}"
    yield (
        f"  rings over all links of a chip at {chip.ici_bandwidth / 1e9:.0f} GB/s: "
        f"{_milliseconds(estimate.ici)}"
    )
    if step.slices > 1:
        rate = "not published" if chip.dcn_bandwidth is None else f"{chip.dcn_bandwidth / 1e9:.1f}"
        between = "left out" if estimate.dcn is None else _milliseconds(estimate.dcn)
        yield f"  between slices at {rate} GB/s a chip: {between}"
    yield f"{'':26}{'all overlaps':>16}{'nothing does':>16}"
    yield _bounds("seconds per step", estimate.step, "{:.3g}")
    yield _bounds("MFU", estimate.mfu, "{:.1%}")
    yield _bounds("pairs/s", estimate.pairs_per_second, "{:,.0f}")
    yield _bounds("hours", estimate.hours, "{:,.2f}") + f"  {run}"
    yield _bounds("chip-hours", estimate.chip_hours, "{:,.1f}")
    if estimate.price is not None:
        yield _bounds("price", estimate.price, "{:,.2f}")


def _row(name: str, value: float) -> str:
    return f"{name:40}{value:>10.2f}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _bounds(name: str, bounds: Bounds, form: str) -> str:
    return f"{name:26}{form.format(bounds.best):>16}{form.format(bounds.worst):>16}"
