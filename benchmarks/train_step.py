"""Pairs per second of the full training step at base size: flip_jax against PyTorch, in one run.

    python benchmarks/train_step.py [--batch 4] [--steps 2] [--captions grammar full] [--cut]
        [--bfloat16]

Both sides run the reference recipe in float32 on the CPU with the same weights and batch: two
towers, momentum twins, ITC against the batch and the queue, ITM with two hard negatives, AdamW.
The losses are compared first (without dropout, with given negatives); then the two are timed in
turns, so that a busy machine slows both. The peer is `torch_peer.py`. Needs the extra [torch].
Where JAX and PyTorch both have a GPU it is `train_step_gpu.py` that runs.

`full` captions have 65 real tokens, the most there are. `grammar` captions have the lengths of
those that the grammar writes: flip_jax cuts them to the first of `steps.BUCKETS` that holds the
longest, the peer pads them to 65 as the reference does; with --cut, `pytorch, cut` is the peer on
the same cut texts. With --bfloat16 both also run with matrix products in bfloat16
(`torch.autocast` there); the losses of these are compared within 0.05.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flip_jax.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before what takes seconds to import

import jax
import numpy as np
import torch

from benchmarks import steps, torch_peer
from benchmarks.result import print_result
from benchmarks.steps import ALPHA
from flip_jax.config import Config
from flip_jax.convert import torch_flip

DROPOUT = 0.1


def our_config(batch: int, dropout: float, dtype: str = "float32") -> Config:
    """With the `remat` to train with where memory is short: without it a step takes 0.97 of the
    time."""
    cfg = steps.our_config(batch, dropout)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat="dots", dtype=dtype))


def peer_config(cfg: Config) -> torch_peer.PeerConfig:
    """The peer's sizes and dropout."""
    vision, text = cfg.model.vision, cfg.model.text
    sizes = {
        f"{name}_{field}": getattr(tower, field + ("_width" if field == "mlp" else ""))
        for name, tower in (("vision", vision), ("text", text))
        for field in ("width", "depth", "heads", "mlp")
    }
    return torch_peer.PeerConfig(
        **sizes,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        vocab_size=text.vocab_size,
        positions=text.positions,
        enc_id=text.enc_id,
        dropout=text.dropout,
        embed_dim=cfg.model.embed_dim,
        queue_size=cfg.loss.queue_size,
    )


def official_weights(state: Any, cfg: Config) -> dict[str, torch.Tensor]:
    """`params`, `momentum` and `queue` of a train state, for `TorchFlip.load_official`."""
    official = torch_flip.params_to_official(state["params"], cfg.model)
    official |= torch_flip.params_to_official(state["momentum"], cfg.model, twin=True)
    official |= torch_flip.queue_to_official(state["queue"])
    return {n: torch.from_numpy(np.require(v, requirements="W")) for n, v in official.items()}


def set_dropout(peer: torch.nn.Module, rate: float) -> None:
    for module in peer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate


def torch_batch(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return torch_texts(batch) | {
        "image": torch.from_numpy(batch["image"].transpose(0, 3, 1, 2).copy()),
        "idx": torch.from_numpy(batch["group"]).long(),
    }


def torch_texts(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {
        "ids": torch.from_numpy(batch["token_ids"]).long(),
        "mask": torch.from_numpy(batch["token_mask"]).long(),
    }


class Sides:
    """Both implementations, with the same weights, ready to step.

    Attributes:
      ours: by type of the matrix products.
    """

    def __init__(self, batch: int, dtypes: Sequence[str]):
        cfg = our_config(batch, DROPOUT)
        self.ours = {"float32": steps.Step(cfg)}
        state = self.ours["float32"].state
        for dtype in dtypes[1:]:
            self.ours[dtype] = steps.Step(our_config(batch, DROPOUT, dtype), start=state)
        self.peer = torch_peer.TorchFlip(peer_config(cfg))
        self.peer.load_official(official_weights(state, cfg))
        self.optimizer = torch_peer.make_optimizer(self.peer, lr=cfg.optim.lr)

    def theirs(
        self, batch: dict[str, torch.Tensor], negatives=None, dtype: str = "float32"
    ) -> dict[str, float]:
        extra = {} if negatives is None else {"negatives": negatives}
        cast = None if dtype == "float32" else getattr(torch, dtype)
        return torch_peer.train_step(self.peer, self.optimizer, batch | extra, ALPHA, cast)


def lengths_of(kind: str, size: int) -> np.ndarray:
    """Tokens of each caption of a batch."""
    return steps.grammar_lengths(size) if kind == "grammar" else np.full(size, 65)


def assert_same_losses(sides: Sides, batches: Mapping[str, dict[str, np.ndarray]]) -> None:
    """One step of each side on each kind of batch, without dropout, with the same negatives.

    The peer keeps the weights of these steps, ours are steps of a copy.
    """
    size = len(next(iter(batches.values()))["group"])
    set_dropout(sides.peer, 0.0)
    drawn = (np.arange(size) + 1) % size
    given = torch.from_numpy(drawn)
    theirs = {
        kind: sides.theirs(torch_batch(padded), negatives=(given, given))
        for kind, padded in batches.items()
    }
    for dtype in sides.ours:  # one after the other: a state of base size is 4 GB
        plain = steps.Step(our_config(size, 0.0, dtype), start=sides.ours["float32"].state)
        for kind, padded in batches.items():
            ours = plain(steps.cut(padded) | {"negatives": {"image": drawn, "text": drawn}})
            for name, value in ours.items():
                most = 1e-4 if dtype == "float32" else 0.05
                if not abs(value - theirs[kind][name]) <= most:  # so is NaN
                    raise AssertionError(f"{kind}, {name}: {value}, PyTorch {theirs[kind][name]}")
            print(f"{kind:8} same losses, {dtype}: {ours}", flush=True)
    set_dropout(sides.peer, DROPOUT)


def compare(
    sides: Sides, kind: str, padded: dict[str, Any], rounds: int, peer_on_cut: bool
) -> dict[str, Any]:
    """One row: the sides on captions of a kind, timed in turns."""
    size, cut = len(padded["group"]), steps.cut(padded)
    peer_padded = torch_batch(padded)
    calls = {}
    for dtype, step in sides.ours.items():
        note = "" if dtype == "float32" else f", {dtype}"
        calls["flip_jax" + note] = lambda step=step: step(cut)
        calls["pytorch" + note] = lambda d=dtype: sides.theirs(peer_padded, dtype=d)
    if peer_on_cut and kind == "grammar":
        peer_cut = torch_batch(cut)
        calls["pytorch, cut"] = lambda: sides.theirs(peer_cut)
    times = steps.in_turns(calls, rounds)
    median = steps.medians(times)
    for name, seconds in median.items():
        ratio = seconds / median["flip_jax"]
        print(
            f"{kind:8} {name:18} {size / seconds:6.3f} pairs/s {seconds:6.2f} s {ratio:5.2f}, "
            f"spread {steps.spread(times[name])}"
        )
    return {
        "batch": size,
        "captions": kind,
        "mean_tokens": float(padded["token_mask"].sum(axis=1).mean()),
        "columns": cut["token_ids"].shape[1],
        "pairs_per_second": {name: size / seconds for name, seconds in median.items()},
        "ratio": {name: seconds / median["flip_jax"] for name, seconds in median.items()},
        "seconds": times,
    }


def main() -> None:
    steps.keep_programs()
    # Of a GPU only what is needed: the processes that measure have all the rest.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", help="4; on a GPU 80 320 1024")
    parser.add_argument(
        "--captions", nargs="+", choices=("grammar", "full"), default=["grammar", "full"]
    )
    parser.add_argument("--steps", type=int, help="timed steps of each side: 2; on a GPU 10")
    parser.add_argument("--cut", action="store_true", help="on a CPU the peer on cut texts, too")
    parser.add_argument("--bfloat16", action="store_true", help="on a CPU in bfloat16, too")
    args = parser.parse_args()
    if jax.default_backend() == "gpu":
        if not torch.cuda.is_available():
            raise SystemExit("JAX has a GPU here, PyTorch has none; JAX_PLATFORMS=cpu for the CPU")
        from benchmarks import train_step_gpu

        return train_step_gpu.main(args)
    rows = []
    for size in args.batch or [4]:
        batches = {kind: steps.make_batch(lengths_of(kind, size)) for kind in args.captions}
        sides = Sides(size, ["float32", "bfloat16"] if args.bfloat16 else ["float32"])
        assert_same_losses(sides, batches)
        for kind, batch in batches.items():
            rows.append(compare(sides, kind, batch, args.steps or 2, args.cut))
    versions = {"jax": jax.__version__, "torch": torch.__version__}
    print_result("train_step", rows=rows, **versions, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
