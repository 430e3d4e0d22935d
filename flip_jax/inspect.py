"""`python -m flip_jax.inspect CHECKPOINT`: what is in it, from its meta alone.

No array is read and no device is needed, so a checkpoint of any size and any number of devices
can be looked at on a laptop.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flip_jax.checkpoint import read_meta  # with JAX it brings bfloat16 to numpy


def describe(meta: Mapping[str, Any], *, with_config: bool = True) -> str:
    """The text that the command prints.

    Args:
      meta: of a step, from `checkpoint.read_meta`.
      with_config: add the config, a field per line.
    """
    lines = [
        f"step {meta['step']}, layout version {meta['layout_version']}, "
        + ", ".join(f"{name} {version}" for name, version in meta["versions"].items()),
        f"vocabulary {meta['config']['data']['tokenizer']}, hash {meta['vocab_hash']}"
        if meta["vocab_hash"]
        else "no vocabulary",
        f"data hash {meta['data_hash']}",
    ]
    lines += [f"{name} {value:.6g}" for name, value in meta["metrics"].items()]
    if "source" in meta:
        lines.append(f"imported from {meta['source']['name']} ({meta['source']['format']})")
    for item, arrays in meta["arrays"].items():
        lines += ["", *_item_lines(item, arrays)]
    if with_config:
        lines += ["", "config"]
        lines += [f"  {name} = {value!r}" for name, value in _fields(meta["config"])]
    return "\n".join(lines)


def _item_lines(item: str, arrays: Mapping[str, Any]) -> Iterator[str]:
    width = max((len(name) for name in arrays), default=0)
    sizes = {name: _bytes(array) for name, array in arrays.items()}
    yield f"{item}: {_total(arrays, sizes)}"
    for name, array in arrays.items():
        shape = "x".join(map(str, array["shape"])) or "scalar"
        yield f"  {name:<{width}}  {array['dtype']:<9} {shape:<18} {_readable(sizes[name])}"
    modules = collections.defaultdict(dict)
    for name in arrays:
        # Of twins and moments the part of the model below them counts.
        depth = 1 if item == "params" else 2
        modules["/".join(name.split("/")[:depth])][name] = arrays[name]
    for module, parts in modules.items():
        yield f"  total {module}: {_total(parts, sizes)}"


def _total(arrays: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    values = sum(math.prod(array["shape"]) for array in arrays.values())
    plural = "array" if len(arrays) == 1 else "arrays"
    return f"{len(arrays)} {plural}, {values:,} values, {_readable(sum(sizes[n] for n in arrays))}"


def _bytes(array: Mapping[str, Any]) -> int:
    return math.prod(array["shape"]) * np.dtype(array["dtype"]).itemsize


def _readable(size: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def _fields(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 no readable checkpoint there."""
    parser = argparse.ArgumentParser(
        "python -m flip_jax.inspect", description="What is in a checkpoint.", allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, help="a workdir (newest step) or a step's folder")
    parser.add_argument("--step", type=int, help="of a workdir; default: the newest complete one")
    parser.add_argument("--json", action="store_true", help="print the stored meta as JSON")
    args = parser.parse_args(argv)
    try:
        meta = read_meta(args.checkpoint, args.step)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        print(json.dumps(meta, indent=2) if args.json else describe(meta), flush=True)
    except BrokenPipeError:  # of `| head`; the interpreter would write to it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
