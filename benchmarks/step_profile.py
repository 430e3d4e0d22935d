"""Where the time of a training step goes on the CPU, and what its matrix products alone would take.

    python benchmarks/step_profile.py [--size base|half] [--batch 8] [--remat dots] [--keep 49]
        [--bfloat16]

Runs the full recipe on grammar captions under XLA's profiler and sorts what it executed by kind.
Operations that run side by side count with their own times, so shares are of the sum. `limit` is
the step if nothing but its products were left, at the rate of one large product, timed in the same
run; products of several that run side by side can be a little faster.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flip_jax.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before what takes seconds to import

import jax
import jax.numpy as jnp

from benchmarks import steps
from benchmarks.masking import masked
from benchmarks.result import print_result
from flip_jax.compile.hlo import Instruction, Module

# Kind -> how the names of such operations start; the first that fits counts.
KINDS = {
    "stacks of layers: fill, cut, join": r"wrapped_(broadcast|slice|pad)|.*dynamic-(update-)?slice",
    "copies, other layouts, gathers": r"copy|transpose|wrapped_transpose|gather|concatenate",
}


@dataclasses.dataclass
class Found:
    """What was executed of one kind."""

    seconds: float = 0.0
    flops: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=steps.CONFIGS, default="base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    parser.add_argument("--keep", type=int, default=196, help="patches of 196, see masking.py")
    parser.add_argument("--bfloat16", action="store_true", help="products in it, not in float32")
    args = parser.parse_args()
    dtype = "bfloat16" if args.bfloat16 else "float32"
    cfg = steps.CONFIGS[args.size](args.batch)
    cfg = dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, remat=args.remat, dtype=dtype)
    )
    cfg = masked(cfg, args.keep)
    batch = steps.cut(steps.make_batch(steps.grammar_lengths(args.batch)))
    step = steps.Step(cfg)
    step(batch)
    seconds = steps.timed(lambda: step(batch))
    kinds = profile(lambda: step(batch), Module(step.text(batch)), kind)
    rate = product_rate(dtype=dtype)
    flops = sum(found.flops for found in kinds.values())
    print(f"step {seconds:.2f} s; limit {flops / rate:.2f} s: {flops / 1e12:.2f} TFLOP of products")
    print(f"at {rate / 1e9:.0f} GFLOP/s")
    print_result(
        "step_profile",
        size=args.size,
        batch=args.batch,
        remat=args.remat,
        keep=args.keep,
        dtype=dtype,
        kinds={name: dataclasses.asdict(found) for name, found in kinds.items()},
        step_seconds=seconds,
        product_flops_per_second=rate,
        limit_seconds=flops / rate,
        jax=jax.__version__,
    )


def profile(
    run: Callable[[], Any], module: Module, kind: Callable[[Instruction, float], str]
) -> dict[str, Found]:
    """What a compiled program executes, by kind; it is printed, too.

    Args:
      run: runs it, to its end.
      module: the program.
      kind: (an operation, FLOP of its products) -> in the words of the table.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        kinds = sort(module, executed(Path(folder)), kind)
    flops = sum(found.flops for found in kinds.values())
    if abs(flops / module.dot_flops() - 1) > 0.01:
        raise AssertionError(f"the trace has {flops:.4g} of {module.dot_flops():.4g} FLOP")
    total = sum(found.seconds for found in kinds.values())
    for name, found in sorted(kinds.items(), key=lambda item: -item[1].seconds):
        speed = f"{found.flops / found.seconds / 1e9:6.0f} GFLOP/s" if found.flops else ""
        print(f"{name:42} {found.seconds:7.2f} s {found.seconds / total:5.0%} {speed}")
    return kinds


def executed(folder: Path) -> dict[str, tuple[int, float]]:
    """Name of an operation -> (how often it ran, seconds in all), from a trace of the profiler."""
    (path,) = folder.rglob("*.xplane.pb")
    counts: collections.Counter[str] = collections.Counter()
    seconds: collections.Counter[str] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                counts[event.name] += 1
                seconds[event.name] += event.duration_ns / 1e9
    return {name: (counts[name], seconds[name]) for name in counts}


def sort(
    module: Module,
    events: dict[str, tuple[int, float]],
    kind: Callable[[Instruction, float], str],
) -> dict[str, Found]:
    """Adds up the operations of each kind; loops and calls count by what is in them."""
    kinds: dict[str, Found] = collections.defaultdict(Found)
    for name, instructions in module.computations.items():
        for instruction in instructions.values():
            if instruction.name not in events or instruction.op in ("while", "call", "conditional"):
                continue
            count, seconds = events[instruction.name]
            flops = product_flops(module, name, instruction)
            found = kinds[kind(instruction, flops)]
            found.seconds += seconds
            found.flops += count * flops
    return dict(kinds)


def shape(instruction: Instruction) -> list[int]:
    """Of the array that comes out."""
    return [int(n) for n in re.findall(r"\d+", instruction.type.split("{")[0].split("[")[-1])]


def kind(instruction: Instruction, flops: float) -> str:
    """Of a training step."""
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    source = source[1] if source else ""
    if flops:
        many = len(shape(instruction)) > 3
        return "products of attention" if many else "products with weights, and of ITC"
    if instruction.type.startswith(("u32", "(u32", "u16")):
        return "random numbers"
    for name, pattern in KINDS.items():
        if re.match(pattern, instruction.name):
            return name
    if "jvp(" not in source:
        return "AdamW, twins, queue"
    return "norms, activations, sums, softmax, dropout"


def product_flops(module: Module, computation: str, instruction: Instruction) -> float:
    """Of the matrix products in one operation, a fusion or a product itself."""
    if instruction.op == "dot":
        return module.flops_of_dot(computation, instruction)
    called = re.search(r"\bcalls=%?([\w.-]+)", instruction.attributes)
    if not called:
        return 0.0
    inside = module.computations[called[1]].values()
    return sum(module.flops_of_dot(called[1], one) for one in inside if one.op == "dot")


def product_rate(rounds: int = 50, dtype: str = "float32") -> float:
    """FLOP/s of a product of the size of the largest in the step, the fastest of some; what comes
    out is float32."""
    rows, inner, columns = 1576, 768, 3072
    left, right = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
    product = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(left, right))
    fastest = min(
        steps.timed(lambda: jax.block_until_ready(product(left, right))) for _ in range(rounds)
    )
    return 2 * rows * inner * columns / fastest


if __name__ == "__main__":
    main()
