"""The training step on one NVIDIA GPU: pairs per second, MFU and memory, against PyTorch.

    python benchmarks/train_step.py [--batch 80 320 1024] [--steps 10] [--captions grammar full]

`train_step.py` runs this where JAX and PyTorch both have a GPU. Both sides run the reference recipe
at base size in bfloat16 with the same weights and batches: flip_jax as `configs/base.py` has it,
with `model.remat=dots`; the peer, `torch_peer.py`, under autocast with fused attention, fused AdamW
and `torch.compile`. The losses of the smallest batch are compared first, without dropout, with
given negatives. Then each side is timed alone, so that the other one's memory does not count:
medians of three times --steps steps, of which only the last is waited for.

`MFU` is what `metrics.model_flops_per_pair` counts, for both sides on flip_jax's columns, by the
rate of one large product in bfloat16 in the same run; the data sheet's rate is in the last line,
JSON. Memory is what XLA plans for the step and the most that PyTorch had allocated.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import steps, torch_peer, train_step
from flip_jax.config import Config
from flip_jax.metrics import model_flops_per_pair, peak_flops

ROUNDS = 3
BATCHES = (80, 320, 1024)
OURS, PEER = "flip_jax", "pytorch"


def main(args: argparse.Namespace) -> None:
    torch.set_float32_matmul_precision("high")  # of what autocast leaves in float32, as in XLA
    cfg = train_step.our_config(1, train_step.DROPOUT, "bfloat16")
    batches = {
        (kind, size): train_step.padded_batch(kind, size)
        for size in sorted(args.batch or BATCHES)
        for kind in args.captions
    }
    result = {"benchmark": "train_step_gpu", "card": card(), "product_flops": product_rate()}
    result["peak_flops"] = peak_flops(jax.devices()[0])
    print(f"{result['card']}; a large product {result['product_flops'] / 1e12:.0f} TFLOP/s")
    result["rows"] = measure(cfg, batches, args.steps or 10, result["product_flops"], "cuda")
    print(json.dumps(result | {"jax": jax.__version__, "torch": torch.__version__}))


def card() -> str:
    """As `nvidia-smi` names the first one: its name, driver and memory."""
    fields = "--query-gpu=name,driver_version,memory.total"
    command = ["nvidia-smi", "--id=0", fields, "--format=csv,noheader"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def product_rate(side: int = 8192, count: int = 10) -> float:
    """FLOP/s of products of random bfloat16 matrices, the fastest of some rounds."""
    left, right = jax.random.normal(jax.random.key(0), (2, side, side), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    product(left, right).block_until_ready()

    def several() -> None:
        for _ in range(count):
            last = product(left, right)
        last.block_until_ready()

    return 2 * side**3 * count / min(steps.timed(several) for _ in range(5))


def measure(
    cfg: Config,
    batches: dict[tuple[str, int], dict[str, np.ndarray]],
    count: int,
    rate: float,
    device: str,
) -> list[dict[str, Any]]:
    """One row for each kind and size of a batch.

    Args:
      cfg: its batch size is replaced.
      batches: smallest first; captions at full width.
      count: of steps that are timed together.
      rate: FLOP/s, for the MFU.
      device: of PyTorch.
    """
    first = steps.Step(with_batch(cfg, next(iter(batches))[1]))
    start = jax.device_get(first.state)
    del first
    found = {PEER: peer_times(cfg, start, batches, count, device)}
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    found[OURS] = our_times(cfg, start, batches, count)
    rows = []
    for kind, size in batches:
        columns = steps.cut(batches[kind, size])["token_ids"].shape[1]
        flops = model_flops_per_pair(with_batch(cfg, size), columns) * size
        sides = {side: found[side][kind, size] for side in (OURS, PEER)}
        row = {"captions": kind, "batch": size, "columns": columns, "flops": flops}
        for side, (seconds, memory) in sides.items():
            row[side] = _numbers(size, seconds, memory, flops / rate)
            print(f"{kind:8} {size:5} {side:9} {_line(row[side])}", flush=True)
        medians = [row[side].get("seconds") for side in (OURS, PEER)]
        row["ratio"] = None if None in medians else medians[1] / medians[0]
        rows.append(row)
    return rows


def peer_times(
    cfg: Config, start: Any, batches: dict, count: int, device: str
) -> dict[tuple[str, int], tuple[list[float] | None, float | None]]:
    """(seconds of a step, GiB) by batch; None = it did not fit. Compares the losses first."""
    peer = train_step.peer_of(start, cfg).to(device)
    optimizer = torch_peer.make_optimizer(peer, lr=cfg.optim.lr)
    smallest = next(iter(batches))[1]
    same = {kind: batch for (kind, size), batch in batches.items() if size == smallest}
    assert_same_losses(cfg, start, peer, optimizer, same, device)
    found = {}
    for key, padded in batches.items():
        batch = _to(device, train_step.torch_batch(padded))
        torch_peer.compile_layers(peer)

        def several(batch: dict[str, torch.Tensor] = batch) -> None:
            for _ in range(count):
                out = torch_peer.update(peer, optimizer, batch, steps.ALPHA, torch.bfloat16)
            out["loss_itm"].item()

        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = times(several, count)
        memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
        found[key] = seconds, memory
    return found


def our_times(
    cfg: Config, start: Any, batches: dict, count: int
) -> dict[tuple[str, int], tuple[list[float] | None, float | None]]:
    """As `peer_times`. The largest come first: JAX keeps what it has taken."""
    found = {}
    for (kind, size), padded in reversed(batches.items()):
        step, batch = steps.Step(with_batch(cfg, size), start=start), steps.cut(padded)
        batch = jax.device_put(batch)
        memory = step.memory(batch)["all"] / 2**10
        found[kind, size] = times(lambda s=step, b=batch: s(b, count), count), memory
    return found


def times(several: Callable[[], object], count: int) -> list[float] | None:
    """Seconds of one of `count` steps in each round, after a first one; None: out of memory."""
    try:
        several()
        return [steps.timed(several) / count for _ in range(ROUNDS)]
    except torch.OutOfMemoryError:
        return None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def assert_same_losses(
    cfg: Config, start: Any, peer: Any, optimizer: Any, batches: dict, device: str
) -> None:
    """One step of each side on each kind of batch, without dropout, with the same negatives."""
    train_step.set_dropout(peer, 0.0)
    text = dataclasses.replace(cfg.model.text, dropout=0.0)
    plain = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, text=text))
    size = len(next(iter(batches.values()))["group"])
    step = steps.Step(with_batch(plain, size), start=start)
    drawn = (np.arange(size) + 1) % size
    given = torch.from_numpy(drawn).to(device)
    for kind, padded in batches.items():
        ours = step(steps.cut(padded) | {"negatives": {"image": drawn, "text": drawn}})
        batch = _to(device, train_step.torch_batch(padded)) | {"negatives": (given, given)}
        theirs = torch_peer.train_step(peer, optimizer, batch, steps.ALPHA, torch.bfloat16)
        for name, value in ours.items():
            if abs(value - theirs[name]) > 0.05:
                raise AssertionError(f"{kind}, {name}: {value}, PyTorch {theirs[name]}")
        print(f"{kind:8} same losses: {ours}", flush=True)
    train_step.set_dropout(peer, cfg.model.text.dropout)


def with_batch(cfg: Config, size: int) -> Config:
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=size))


def _to(device: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def _numbers(
    size: int, seconds: Sequence[float] | None, memory: float | None, least: float
) -> dict[str, Any]:
    """Of one side; `least` seconds if nothing but the model's products took any time."""
    numbers = {"gib": memory, "gib_per_pair": memory and memory / size}
    if seconds is None:
        return numbers | {"error": "out of memory"}
    median = statistics.median(seconds)
    rates = {"pairs_per_second": size / median, "mfu": least / median}
    return numbers | {"seconds": median, "all": seconds} | rates


def _line(numbers: dict[str, Any]) -> str:
    if "error" in numbers:
        return numbers["error"]
    memory = "" if numbers["gib"] is None else f" {numbers['gib']:6.1f} GiB"
    speed = f"{numbers['pairs_per_second']:8.1f} pairs/s {numbers['seconds'] * 1e3:8.1f} ms"
    return f"{speed}, MFU {numbers['mfu']:5.1%},{memory} spread {steps.spread(numbers['all'])}"
