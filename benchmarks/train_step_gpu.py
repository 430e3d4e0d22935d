"""The training step on one NVIDIA GPU: pairs per second, MFU and memory, against PyTorch.

    python benchmarks/train_step.py [--batch 80 320 1024] [--steps 10] [--captions grammar full]

`train_step.py` runs this where JAX and PyTorch both have a GPU; they must be of one CUDA, since
their libraries share folders: `jax[cuda13]` beside a PyTorch for CUDA 13. Both sides run the same
recipe as there at base size, in bfloat16: flip_jax with `model.remat=dots`; the peer,
`torch_peer.py`, under autocast with fused attention, fused AdamW and `torch.compile`. The losses of
the smallest batch are compared first, without dropout, with given negatives, in compiled layers.
Then each side is timed in a process of its own, which has all of the memory: medians of three times
--steps steps, of which we wait for the last alone. (Inside the peer's step `transformers` waits for
the mask of each text pass.) Rows are printed as they are measured. `torch.compile` needs a C
compiler and Python's headers.

`MFU` is what `metrics.model_flops_per_pair` counts, for both sides on flip_jax's columns, by the
rate of one large product in bfloat16 in the same run; the data sheet's rate is in the last line,
JSON. Memory is what XLA plans for the step and the most that PyTorch had allocated.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks import steps, torch_peer, train_step
from benchmarks.result import print_result
from flip_jax import config
from flip_jax.metrics import model_flops_per_pair, peak_flops

ROUNDS = 3
BATCHES = (80, 320, 1024)
OURS, PEER = "flip_jax", "pytorch"
LOSSES = "losses"  # the job that comes first: our side of the comparison
MOST = 0.05  # between losses of two sides in bfloat16
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "ALLOC_FAILED")


def main(args: argparse.Namespace) -> None:
    cfg = train_step.our_config(1, train_step.DROPOUT, "bfloat16")
    lengths = [
        (kind, size, train_step.lengths_of(kind, size).tolist())
        for size in sorted(args.batch or BATCHES)
        for kind in args.captions
    ]
    for size in args.batch or ():
        if cfg.loss.queue_size % size:
            raise SystemExit(f"--batch {size}: must divide the queue of {cfg.loss.queue_size}")
    name = steps.card()
    print(name, flush=True)
    result = measure(cfg, lengths, args.steps or 10)
    print_result("train_step_gpu", card=name, **result)


def measure(
    cfg: config.Config, lengths: Sequence[tuple[str, int, list[int]]], count: int
) -> dict[str, Any]:
    """Both sides, each in a process of its own.

    Args:
      cfg: its batch size is replaced.
      lengths: kind, size and tokens of each caption of a batch, smallest first.
      count: of steps that are timed together.

    Returns:
      `rows`, one for each batch, and the rates that the MFU is of.

    Raises:
      subprocess.CalledProcessError: a side failed, by something else than too little memory.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = {"config": config.to_dict(cfg), "lengths": lengths, "count": count}
        (folder / "plan.json").write_text(json.dumps(plan))
        for job in (LOSSES, PEER, OURS):
            command = [sys.executable, __file__, "--job", job, "--folder", name]
            subprocess.run(command, check=True, env=_environment(job))
        found = {side: json.loads((folder / f"{side}.json").read_text()) for side in (PEER, OURS)}
    rows = []
    for number, (kind, size, _) in enumerate(lengths):
        row = {"captions": kind, "batch": size}
        row |= {side: found[side]["rows"][number] for side in (OURS, PEER)}
        medians = [row[side].get("seconds") for side in (OURS, PEER)]
        row["ratio"] = None if None in medians else medians[1] / medians[0]
        rows.append(row)
    return {"rows": rows} | {k: v for k, v in found[OURS].items() if k != "rows"}


def _environment(job: str) -> dict[str, str]:
    """JAX leaves the GPU alone beside the peer, and may have nearly all of it otherwise."""
    if job == PEER:
        name = "PYTORCH_CUDA_ALLOC_CONF"  # else it can fail for want of one large piece
        own = {name: os.environ.get(name, "expandable_segments:True")}
        return os.environ | {"JAX_PLATFORMS": "cpu"} | own
    given = {n: v for n, v in os.environ.items() if n != "XLA_PYTHON_CLIENT_PREALLOCATE"}
    steps.take_gpu_memory(given)
    return given


class Job:
    """One of the three processes of a run."""

    def __init__(self, folder: Path):
        plan = json.loads((folder / "plan.json").read_text())
        self.folder, self.lengths, self.count = folder, plan["lengths"], plan["count"]
        self.cfg = config.from_dict(plan["config"])
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def batches(self, only: int | None = None) -> Iterator[tuple[str, int, dict[str, np.ndarray]]]:
        """Kind, size and what is in it; of one size or of all."""
        side = self.cfg.model.vision.image_size
        for kind, size, tokens in self.lengths:
            if only in (None, size):
                yield kind, size, steps.make_batch(np.asarray(tokens), side=side)

    def smallest(self) -> dict[str, dict[str, np.ndarray]]:
        """One of each kind, with negatives."""
        least = self.lengths[0][1]
        drawn = {"negatives": (np.arange(least) + 1) % least}
        return {kind: batch | drawn for kind, _, batch in self.batches(least)}

    def losses(self) -> None:
        """Writes the weights that both sides start with, and the losses of our steps on them."""
        text = dataclasses.replace(self.cfg.model.text, dropout=0.0)
        plain = dataclasses.replace(self.cfg, model=dataclasses.replace(self.cfg.model, text=text))
        found = {}
        for kind, batch in self.smallest().items():
            if not found:
                step = steps.Step(with_batch(plain, len(batch["group"])))
                weights = train_step.official_weights(step.state, self.cfg)
                save_file(weights, self.folder / "start.safetensors")
            drawn = batch.pop("negatives")
            batch = steps.cut(batch) | {"negatives": {"image": drawn, "text": drawn}}
            found[kind] = step(batch)
        (self.folder / "losses.json").write_text(json.dumps(found))

    def pytorch(self) -> None:
        """Compares the losses, then times the peer."""
        torch.set_float32_matmul_precision("high")  # of what autocast leaves in float32, as in XLA
        peer = torch_peer.TorchFlip(train_step.peer_config(self.cfg))
        peer.load_official(load_file(self.folder / "start.safetensors"))
        peer = peer.to(self.device)
        optimizer = torch_peer.make_optimizer(peer, lr=self.cfg.optim.lr)
        # On a CPU, where this is only tried out, nothing need be fast.
        backend = "inductor" if self.device == "cuda" else "eager"
        torch_peer.compile_layers(peer, backend)
        self._assert_same_losses(peer, optimizer)
        rows, compiled = [], self.lengths[0][1]
        for kind, size, padded in self.batches():
            batch = self._to_torch(padded)
            peer.ptr_queue.zero_()  # or another size of batch would wrap inside one
            if size != compiled:
                torch_peer.compile_layers(peer, backend)
                compiled = size
            gc.collect()
            torch.cuda.empty_cache()

            def several(batch: dict[str, torch.Tensor] = batch) -> None:
                for _ in range(self.count):
                    out = torch_peer.update(peer, optimizer, batch, steps.ALPHA, torch.bfloat16)
                out["loss_itm"].item()

            found = times(several, self.count, self._forget_peak)
            cuda = self.device == "cuda" and "error" not in found
            found["gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
            rows.append(self._row(PEER, kind, padded, found))
        (self.folder / f"{PEER}.json").write_text(json.dumps({"rows": rows}))

    def flip_jax(self) -> None:
        """Times our side."""
        rows = []
        for kind, size, padded in self.batches():
            step, batch = steps.Step(with_batch(self.cfg, size)), jax.device_put(steps.cut(padded))
            found = times(lambda step=step, batch=batch: step(batch, self.count), self.count)
            found["gib"] = None if "error" in found else step.memory(batch)["all"] / 2**10
            rows.append(self._row(OURS, kind, padded, found))
            del step, batch  # or two states would be there at a time
        result = {"rows": rows, "product_flops": self._rate()}
        result |= {"peak_flops": peak_flops(jax.devices()[0])}
        result |= {"jax": jax.__version__, "torch": torch.__version__}
        (self.folder / f"{OURS}.json").write_text(json.dumps(result))

    def _assert_same_losses(self, peer: Any, optimizer: Any) -> None:
        ours = json.loads((self.folder / "losses.json").read_text())
        train_step.set_dropout(peer, 0.0)
        for kind, batch in self.smallest().items():
            given = torch.from_numpy(batch.pop("negatives")).to(self.device)
            batch = self._to_torch(batch) | {"negatives": (given, given)}
            theirs = torch_peer.train_step(peer, optimizer, batch, steps.ALPHA, torch.bfloat16)
            for name, value in ours[kind].items():
                if not abs(value - theirs[name]) <= MOST:  # so is NaN
                    raise AssertionError(f"{kind}, {name}: {value}, PyTorch {theirs[name]}")
            print(f"{kind:8} same losses: {ours[kind]}", flush=True)
        train_step.set_dropout(peer, self.cfg.model.text.dropout)

    def _forget_peak(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _to_torch(self, batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {n: value.to(self.device) for n, value in train_step.torch_batch(batch).items()}

    def _rate(self) -> float:
        """FLOP/s of a large product, measured once in a run."""
        path = self.folder / "rate.json"
        if not path.exists():
            path.write_text(json.dumps(product_rate(8192 if self.device == "cuda" else 256)))
        return json.loads(path.read_text())

    def _row(
        self, side: str, kind: str, padded: dict[str, np.ndarray], found: dict[str, Any]
    ) -> dict[str, Any]:
        """Prints and returns what was `found` of a batch, with what follows from it."""
        size, columns = len(padded["group"]), steps.cut(padded)["token_ids"].shape[1]
        flops = model_flops_per_pair(with_batch(self.cfg, size), columns) * size
        row = {"side": side, "columns": columns} | _numbers(size, found, flops / self._rate())
        print(f"{kind:8} {size:5} {side:9} {_line(row)}\n{json.dumps(row)}", flush=True)
        return row


def times(
    several: Callable[[], object], count: int, warm: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """`all`, seconds of one of `count` steps in each round; or the `error`: out of memory.

    Args:
      several: does `count` steps.
      warm: called between a first round, which does not count, and the others.
    """
    try:
        several()
        warm()
        return {"all": [steps.timed(several) / count for _ in range(ROUNDS)]}
    except RuntimeError as error:  # of which those of JAX and PyTorch are kinds
        if not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        return {"error": f"out of memory: {str(error).splitlines()[0]}"}


def product_rate(side: int, count: int = 10) -> float:
    """FLOP/s of products of random bfloat16 matrices in PyTorch, the fastest of some rounds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = torch.randn(2, side, side, device=device).bfloat16()

    def several() -> None:
        for _ in range(count):
            last = left @ right
        last[0, 0].item()

    several()
    return 2 * side**3 * count / min(steps.timed(several) for _ in range(5))


def with_batch(cfg: config.Config, size: int) -> config.Config:
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=size))


def _numbers(size: int, found: dict[str, Any], least: float) -> dict[str, Any]:
    """`found` and more; `least` seconds if nothing but the model's products took any time."""
    numbers = found | {"gib_per_pair": found["gib"] and found["gib"] / size}
    if "error" in found:
        return numbers
    median = statistics.median(found["all"])
    return numbers | {
        "seconds": median,
        "pairs_per_second": size / median,
        "mfu": least / median,
    }


def _line(numbers: dict[str, Any]) -> str:
    memory = "" if numbers["gib"] is None else f", {numbers['gib']:.1f} GiB"
    if "error" in numbers:
        return numbers["error"] + memory
    speed = f"{numbers['pairs_per_second']:8.1f} pairs/s {numbers['seconds'] * 1e3:8.1f} ms"
    return f"{speed}, MFU {numbers['mfu']:.1%}{memory}, spread {steps.spread(numbers['all'])}"


def run_job() -> None:
    steps.keep_programs()
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", choices=(LOSSES, PEER, OURS), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    getattr(Job(args.folder), args.job)()


if __name__ == "__main__":
    run_job()
