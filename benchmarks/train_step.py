"""Pairs per second of the full training step at base size: flip_jax against PyTorch, in one run.

    python benchmarks/train_step.py [--batch 8] [--steps 3] [--captions grammar full]

Both sides run the reference recipe in float32 on the CPU with the same weights and batch: two
towers, momentum twins, ITC against the batch and the queue, ITM with two hard negatives, AdamW.
The losses are compared first (without dropout, with given negatives); then the two are timed in
turns, so that a busy machine slows both. The peer is `torch_peer.py`. Needs the extra [torch].

`full` captions have 65 real tokens, the most there are. `grammar` captions have the lengths of
those that the grammar writes: flip_jax cuts them to the first of `BUCKETS` that holds the longest,
the peer pads them to 65 as the reference does; `pytorch, cut` is the peer on the same cut texts.
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
from typing import Any

import jax
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import torch_peer
from flip_jax import partition
from flip_jax.config import Config, MeshConfig
from flip_jax.convert import torch_flip
from flip_jax.data.captions import captions
from flip_jax.data.drawn_faces import draw_face
from flip_jax.data.text_buckets import crop_texts
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.train import Compiled

ALPHA = 0.4
BUCKETS = (32, 40, 48, 56)


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


def make_batch(lengths: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Random pixels and ids; caption b has lengths[b] real tokens of 65."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1000, 30_000, (len(lengths), 65)).astype(np.int32)
    ids[:, 0] = 101
    mask = np.arange(65) < lengths[:, None]
    return {
        "image": rng.normal(size=(len(lengths), 224, 224, 3)).astype(np.float32),
        "token_ids": np.where(mask, ids, 0),
        "token_mask": mask,
        "group": np.arange(len(lengths), dtype=np.int32),
    }


def grammar_lengths(batch: int, seed: int = 0) -> np.ndarray:
    """Tokens of captions that the grammar writes about drawn people, at most 65."""
    tokenizer = Tokenizer.load("grammar", 65)
    faces = (draw_face(seed, identity, picture=0, size=64) for identity in range(batch))
    texts = [captions(face.attributes, seed, count=1)[0] for face in faces]
    return tokenizer(texts)[1].sum(axis=1)


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


def assert_same_losses(ours_batch: dict, theirs_batch: dict) -> None:
    """One step of each side without dropout, with the same negatives."""
    size = len(ours_batch["group"])
    sides = Sides(size, dropout=0.0)
    drawn = (np.arange(size) + 1) % size
    ours = sides.ours(ours_batch | {"negatives": {"image": drawn, "text": drawn}})
    given = torch.from_numpy(drawn)
    theirs = sides.theirs(torch_batch(theirs_batch), negatives=(given, given))
    for name, value in ours.items():
        if abs(value - theirs[name]) > 1e-4:
            raise AssertionError(f"{name}: {value} here, {theirs[name]} in PyTorch")
    print(f"same losses: {ours}")


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(kind: str, size: int, steps: int) -> dict[str, Any]:
    """One row: the sides on captions of a kind, timed in turns."""
    lengths = grammar_lengths(size) if kind == "grammar" else np.full(size, 65)
    padded = make_batch(lengths)
    cut = crop_texts(padded, BUCKETS, lambda value: [value])
    assert_same_losses(cut, padded)
    sides = Sides(size, dropout=0.1)
    peer_padded, peer_cut = torch_batch(padded), torch_batch(cut)
    calls = {"flip_jax": lambda: sides.ours(cut), "pytorch": lambda: sides.theirs(peer_padded)}
    if kind == "grammar":
        calls["pytorch, cut"] = lambda: sides.theirs(peer_cut)
    first = {name: timed(call) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for _ in range(steps):
        for name, call in calls.items():
            times[name].append(timed(call))
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in median.items():
        ratio = seconds / median["flip_jax"]
        print(f"{kind:8} {name:13} {size / seconds:6.3f} pairs/s {seconds:6.2f} s {ratio:5.2f}")
    return {
        "captions": kind,
        "mean_tokens": float(lengths.mean()),
        "columns": cut["token_ids"].shape[1],
        "pairs_per_second": {name: size / seconds for name, seconds in median.items()},
        "ratio": {name: seconds / median["flip_jax"] for name, seconds in median.items()},
        "first_step_seconds": first,
        "seconds": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--captions", nargs="+", choices=("grammar", "full"), default=["grammar", "full"]
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side, in turns")
    args = parser.parse_args()
    rows = [compare(kind, args.batch, args.steps) for kind in args.captions]
    result = {
        "benchmark": "train_step",
        "batch": args.batch,
        "rows": rows,
        "jax": jax.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
