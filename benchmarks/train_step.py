"""Pairs per second of the full training step at base size: flip_jax against PyTorch, in one run.

    python benchmarks/train_step.py [--batch 8] [--steps 3] [--rounds 2]

Both sides run the reference recipe in float32 on the CPU with the same weights and batch: two
towers, momentum twins, ITC against the batch and the queue, ITM with two hard negatives, AdamW.
The losses are compared first (without dropout, with given negatives); then the two are timed in
turns, so that a busy machine slows both. The peer is `torch_peer.py`. Needs the extra [torch].
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import torch_peer
from flip_jax import partition
from flip_jax.config import Config, MeshConfig
from flip_jax.convert import torch_flip
from flip_jax.train import Compiled

ALPHA = 0.4


def our_config(batch: int, dropout: float) -> Config:
    """The reference recipe in float32, all of the batch as local candidates."""
    cfg = Config()
    text = dataclasses.replace(cfg.model.text, dropout=dropout)
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, text=text, dtype="float32"),
        loss=dataclasses.replace(
            cfg.loss, candidates="global", queue_size=61_440, alpha=ALPHA, alpha_ramp_epochs=0.0
        ),
        optim=dataclasses.replace(cfg.optim, schedule="constant", warmup_steps=0),
        data=dataclasses.replace(cfg.data, batch_size=batch),
    )


def make_batch(batch: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random pixels and ids; every caption has `length` real tokens of 65."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1000, 30_000, (batch, 65)).astype(np.int32)
    ids[:, 0] = 101
    mask = np.tile(np.arange(65) < length, (batch, 1))
    return {
        "image": rng.normal(size=(batch, 224, 224, 3)).astype(np.float32),
        "token_ids": np.where(mask, ids, 0),
        "token_mask": mask,
        "group": np.arange(batch, dtype=np.int32),
    }


def torch_batch(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {
        "image": torch.from_numpy(batch["image"].transpose(0, 3, 1, 2).copy()),
        "ids": torch.from_numpy(batch["token_ids"]).long(),
        "mask": torch.from_numpy(batch["token_mask"]).long(),
        "idx": torch.from_numpy(batch["group"]).long(),
    }


class Sides:
    """Both implementations, with the same weights, ready to step."""

    def __init__(self, batch: int, dropout: float):
        self.cfg = our_config(batch, dropout)
        mesh = partition.make_mesh(MeshConfig(), jax.devices()[:1])
        self.compiled = Compiled(self.cfg, mesh, steps_per_epoch=1000, steps=1000)
        self.state = self.compiled.init()
        self.peer = torch_peer.TorchFlip(torch_peer.PeerConfig(dropout=dropout))
        model = self.cfg.model
        official = torch_flip.params_to_official(self.state["params"], model)
        official |= torch_flip.params_to_official(self.state["momentum"], model, twin=True)
        official |= torch_flip.queue_to_official(self.state["queue"])
        self.peer.load_official({n: torch.from_numpy(np.array(v)) for n, v in official.items()})
        self.optimizer = torch_peer.make_optimizer(self.peer, lr=self.cfg.optim.lr)

    def ours(self, batch: dict[str, np.ndarray]) -> dict[str, float]:
        self.state, metrics = self.compiled.step(self.state, batch)
        jax.block_until_ready(self.state)
        return {name: float(metrics[name]) for name in ("loss_itc", "loss_itm")}

    def theirs(self, batch: dict[str, torch.Tensor], negatives=None) -> dict[str, float]:
        extra = {} if negatives is None else {"negatives": negatives}
        return torch_peer.train_step(self.peer, self.optimizer, batch | extra, ALPHA)


def assert_same_losses(batch: dict[str, np.ndarray]) -> None:
    """One step of each side without dropout, with the same negatives."""
    size = len(batch["group"])
    sides = Sides(size, dropout=0.0)
    drawn = (np.arange(size) + 1) % size
    ours = sides.ours(batch | {"negatives": {"image": drawn, "text": drawn}})
    given = torch.from_numpy(drawn)
    theirs = sides.theirs(torch_batch(batch), negatives=(given, given))
    for name, value in ours.items():
        if abs(value - theirs[name]) > 1e-4:
            raise AssertionError(f"{name}: {value} here, {theirs[name]} in PyTorch")
    print(f"same losses: {ours}")


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=65, help="real tokens per caption")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side, in turns")
    args = parser.parse_args()
    batch = make_batch(args.batch, args.length)
    assert_same_losses(batch)
    sides = Sides(args.batch, dropout=0.1)
    peer_batch = torch_batch(batch)
    compile_seconds = timed(lambda: sides.ours(batch))
    sides.theirs(peer_batch)
    times = {"flip_jax": [], "pytorch": []}
    for _ in range(args.steps):
        times["flip_jax"].append(timed(lambda: sides.ours(batch)))
        times["pytorch"].append(timed(lambda: sides.theirs(peer_batch)))
    median = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "benchmark": "train_step",
        "batch": args.batch,
        "tokens": args.length,
        "flip_jax_pairs_per_second": args.batch / median["flip_jax"],
        "pytorch_pairs_per_second": args.batch / median["pytorch"],
        "ratio": median["pytorch"] / median["flip_jax"],
        "first_step_seconds": compile_seconds,
        "seconds": times,
        "jax": jax.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
