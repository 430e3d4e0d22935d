"""ITM re-ranking of a gallery: flip_jax against the loop of the reference, in one run.

    python benchmarks/rerank.py [--gallery 1000] [--k 256] [--rounds 1]

Images and captions are as many (--gallery); each image looks for the best k captions, each caption
for the best k images. The model has the base size, random weights, the same on both sides, float32;
the embeddings that choose the pairs are random, a caption's near its image's. Captions have the
lengths of those that the grammar writes.

pytorch: the loop of the reference (`torch_peer.itm_scores`): query by query, k pairs in a batch,
    all captions padded to 65 tokens, keys and values of the image made for every pair, both
    directions one after the other. One query is timed, an image that looks for captions; the other
    direction is as much work.
flip_jax: `visit_pairs`. It plans the whole gallery; of the calls that it makes, one of each length
    of text is timed, and counts as often as there are such calls; so does what makes the keys and
    values of a block of images.

The scores of some rows of two of these calls are compared first. `ratio` is that of the seconds
for the gallery; a pair that both directions want is scored once here, which `per_pair` does not
count. Image tokens are made beforehand on both sides. `ratio_by_count` is that of the products in
what is timed, those of XLA's programs and of PyTorch's operators: what the ratio would come to if
all products ran equally fast and nothing else took any time. Where the time of one call goes is
printed as `step_profile.py` does it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flip_jax.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before what takes seconds to import

import jax
import numpy as np
import torch
from flax import nnx
from torch.utils import flop_counter

from benchmarks import step_profile, steps, torch_peer
from benchmarks.result import print_result
from benchmarks.train_step import official_weights, torch_texts
from flip_jax import partition
from flip_jax.compile.hlo import Instruction, Module
from flip_jax.config import MeshConfig
from flip_jax.downstream import pair_visits
from flip_jax.downstream.retrieval import score_tops, search
from flip_jax.models import flip

BLOCK = 16  # images, four times as many pairs in a call
COMPARED = 16  # rows of a call whose scores are compared
COSINE = 0.25  # of a caption and its image; others have 0 +- 1/16


class Gallery:
    """`image_batches` gives numbers in the place of pixels."""

    def __init__(self, images: int):
        self.images = images

    def image_batches(self, size: int):
        for start in range(0, self.images, size):
            numbers = np.minimum(np.arange(start, start + size), self.images - 1)
            yield {"image": numbers.astype(np.int32)}


def wanted_pairs(gallery: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images and captions of all pairs that a re-ranking scores, ascending; captions of each image,
    best first, [gallery, k]."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(gallery, 256)).astype(np.float32)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    noise = rng.normal(size=image.shape).astype(np.float32) / 16
    text = COSINE * image + np.sqrt(1 - COSINE**2) * noise
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    own = np.arange(gallery)
    t2i = search(text, image, own, own, k)["top"]
    i2t = search(image, text, own, own, k)["top"]
    asked = []

    def score(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        asked.append((images, texts))
        return np.zeros(len(images), np.float32)

    score_tops(score, t2i, i2t)
    return *asked[0], i2t


class Program:
    """One compiled, and what it is called with."""

    def __init__(self, lowered: jax.stages.Lowered, *arguments: Any):
        self.arguments, self._run = arguments, lowered.compile()
        self.module = Module(self._run.as_text())

    def __call__(self) -> Any:
        return jax.block_until_ready(self._run(*self.arguments))


class Ours:
    """What `visit_pairs` runs: `block`, the keys and values of a block of images, and the calls.
    All images are the one whose pixels are given."""

    def __init__(self, params: flip.Params, model, pixels: np.ndarray, batch: dict):
        graphdef = flip.build(model)
        self.mesh = partition.make_mesh(MeshConfig(), jax.devices()[:1])
        encode = jax.jit(lambda params, image: nnx.merge(graphdef, params).encode_image(image)[0])
        self.params, tokens = params, encode(params, np.repeat(pixels, BLOCK, axis=0))
        keys_values = pair_visits.keys_values_everywhere(graphdef, self.mesh).lower(params, tokens)
        self.block = Program(keys_values, params, tokens)
        self.keys_values = self.block()
        self.texts = batch["token_ids"], batch["token_mask"]

        def match(params, ids, mask, tokens, index):
            return nnx.merge(graphdef, params).match(ids, mask, tokens, index)[:, 1]

        self.match = jax.jit(match)

    def calls(self, pairs: tuple[np.ndarray, np.ndarray]) -> dict[int, tuple[int, Program]]:
        """Length of text -> how many calls have it, and the last one."""
        found: dict[int, tuple[int, tuple]] = {}

        def note(*call: jax.Array) -> np.ndarray:
            length = call[0].shape[1]
            found[length] = found.get(length, (0,))[0] + 1, call
            return np.zeros(len(call[0]))

        visits = pair_visits.visit_pairs(
            Gallery(1 + pairs[0].max()),
            self.texts,
            pairs,
            encode=lambda _: self.keys_values,
            match=note,
            size=BLOCK,
            mesh=self.mesh,
        )
        assert sum(len(rows) for rows, _ in visits) == len(pairs[0])
        return {
            length: (count, Program(self.match.lower(self.params, *call), self.params, *call))
            for length, (count, call) in found.items()
        }


class Theirs:
    def __init__(self, params: flip.Params, cfg, pixels: np.ndarray):
        self.peer = torch_peer.TorchFlip(torch_peer.PeerConfig(queue_size=cfg.loss.queue_size))
        queue = flip.init_queue(cfg.loss.queue_size, cfg.model.embed_dim, jax.random.key(1))
        state = {"params": params, "momentum": flip.twin_params(params), "queue": queue}
        self.peer.load_official(official_weights(state, cfg))
        self.peer.eval()
        with torch.no_grad():
            image = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
            self.tokens = self.peer.online.image_tokens(image)

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """Scores of the image and these texts, as `torch_peer.itm_scores` has a query."""
        given = torch_texts(batch)
        tokens = self.tokens[torch.zeros(len(given["ids"]), dtype=torch.long)]
        ids = self.peer.with_enc(given["ids"])
        states = self.peer.online.text_states(ids, given["mask"], tokens)
        return self.peer.itm_head(states[:, 0])[:, 1].numpy()

    def flops(self, batch: dict[str, np.ndarray]) -> float:
        """Of the matrix products of one call."""
        attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
        with flop_counter.FlopCounterMode(display=False, custom_mapping=attention) as counter:
            self(batch)
        return counter.get_total_flops()


def _attention_flops(query, key, value, *_, **__) -> int:
    return flop_counter.sdpa_flop_count(query, key, value)


def main() -> None:
    steps.keep_programs()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gallery", type=int, default=1000)
    parser.add_argument("--k", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1, help="of each side, in turns")
    args = parser.parse_args()
    images, texts, i2t = wanted_pairs(args.gallery, args.k)
    cfg = steps.our_config(args.gallery, dropout=0.0)
    lengths = steps.grammar_lengths(args.gallery)
    pixels, batch = steps.make_batch(lengths[:1])["image"], steps.make_texts(lengths)
    params = jax.jit(lambda key: flip.init_params(cfg.model, 0.07, key))(jax.random.key(0))
    ours, theirs = Ours(params, cfg.model, pixels, batch), Theirs(params, cfg, pixels)
    calls = ours.calls((images, texts))
    print({length: f"{count} calls" for length, (count, _) in sorted(calls.items())})
    for length in (min(calls), max(calls)):
        assert_same_scores(calls[length][1], theirs)
    query = {name: value[i2t[0]] for name, value in batch.items()}
    mine = calls | {"block": (-(-args.gallery // BLOCK), ours.block)}
    timed = {name: program for name, (_, program) in mine.items()}
    times = steps.in_turns(timed | {"pytorch": lambda: theirs(query)}, args.rounds)
    counts = [count for count, _ in mine.values()]
    rounds = zip(*(times[name] for name in mine), strict=True)
    seconds = {
        "flip_jax": [float(np.dot(counts, one_round)) for one_round in rounds],
        "pytorch": [2 * args.gallery * each for each in times["pytorch"]],
    }
    pairs = {"flip_jax": len(images), "pytorch": 2 * args.gallery * args.k}
    one = {name: value[:1] for name, value in query.items()}
    work = {
        "flip_jax": float(
            sum(count * program.module.dot_flops() for count, program in mine.values())
        ),
        "pytorch": float(pairs["pytorch"] * theirs.flops(one)),
    }
    whole = {name: statistics.median(each) for name, each in seconds.items()}
    per_pair = {name: whole[name] / pairs[name] for name in pairs}
    for name, each in seconds.items():
        print(
            f"{name:9} {1e3 * per_pair[name]:6.1f} ms per pair, {pairs[name]:,} pairs, "
            f"{whole[name] / 3600:5.2f} h for the gallery, spread {steps.spread(each)}; "
            f"{work[name] / pairs[name] / 1e9:.2f} GFLOP per pair"
        )
    commonest = max(calls, key=lambda length: calls[length][0])
    print_result(
        "rerank",
        gallery=args.gallery,
        k=args.k,
        mean_tokens=float(lengths.mean()),
        pairs=pairs,
        ratio=whole["pytorch"] / whole["flip_jax"],
        ratio_by_count=work["pytorch"] / work["flip_jax"],
        per_pair=per_pair["pytorch"] / per_pair["flip_jax"],
        gallery_seconds=seconds,
        profile=where_time_goes(calls[commonest][1], statistics.median(times[commonest])),
    )


def where_time_goes(call: Program, seconds: float) -> dict[str, Any]:
    """Prints it, of a call that takes so long, and how long its products would take at the rate of
    a large one."""
    rows, length = call.arguments[1].shape

    def kind(instruction: Instruction, flops: float) -> str:
        if not flops:
            return "norms, activations, sums, copies"
        of_attention = len(step_profile.shape(instruction)) > 3
        return "products of attention" if of_attention else "products with weights"

    print(f"one call of {rows} pairs, {length} tokens each:")
    kinds = step_profile.profile(call, call.module, kind)
    rate = step_profile.product_rate()
    limit = sum(found.flops for found in kinds.values()) / rate
    print(
        f"the call {seconds:.2f} s; limit {limit:.2f} s, its products at {rate / 1e9:.0f} GFLOP/s"
    )
    return {
        "kinds": {name: dataclasses.asdict(found) for name, found in kinds.items()},
        "call_seconds": seconds,
        "limit_seconds": limit,
    }


def assert_same_scores(call: Program, theirs: Theirs) -> None:
    """Of the first rows of a call of ours; the peer pads their texts to 65 tokens."""
    mine = np.asarray(call())[:COMPARED]
    _, ids, mask, *_ = call.arguments
    texts = {"token_ids": ids, "token_mask": mask}
    short = 65 - ids.shape[1]
    padded = {n: np.pad(np.asarray(v)[:COMPARED], ((0, 0), (0, short))) for n, v in texts.items()}
    peers = theirs(padded)
    difference, spread = float(np.abs(peers - mine).max()), float(np.std(peers))
    if difference > 1e-4 or spread < 100 * difference:
        raise AssertionError(f"scores differ by {difference}, their spread is {spread}")
    print(f"same scores of {len(mine)} pairs: largest difference {difference:.1e}", flush=True)


if __name__ == "__main__":
    main()
