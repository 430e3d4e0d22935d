"""Time of the training step with masked patches against that on all patches, in one run.

    python benchmarks/masking.py [--recipes flip] [--batch 8] [--rounds 3] [--size half|base]

Two recipes, float32, captions of the lengths that the grammar writes, no dropout, which masking
does not touch:

flip, batches of 8: the whole recipe. Momentum twins see all patches, and ITM reads three texts of a
    pair, so that masking touches a part of the work only.
contrastive, batches of 24: the sigmoid loss alone, as in the papers on masking, whose work is the
    image tower. AdamW, which masking does not touch, would be much of a step of few pairs.

Each with all 196 patches, half and a quarter of them. `half` has half the width in both towers and
twelve layers: a quarter of the work, much the same shares. `work` is what
`metrics.model_flops_per_pair` counts: what the time would come to if all products ran equally fast
and nothing else took any. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flip_jax.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before what takes seconds to import

from benchmarks import steps
from benchmarks.result import print_result
from flip_jax.config import Config, LossConfig, LossWeights
from flip_jax.metrics import model_flops_per_pair

PATCHES = (196, 98, 49)


def contrastive(cfg: Config) -> Config:
    loss = LossConfig(contrastive="sigmoid", temperature=0.1, weights=LossWeights(itm=0.0))
    return replace(cfg, loss=loss, model=replace(cfg.model, logit_bias=-10.0))


RECIPES = {"flip": (lambda cfg: cfg, 8), "contrastive": (contrastive, 24)}  # what, batch


def masked(cfg: Config, keep: int) -> Config:
    vision = replace(cfg.model.vision, keep_patches=None if keep == PATCHES[0] else keep)
    return replace(cfg, model=replace(cfg.model, vision=vision))


def main() -> None:
    steps.keep_programs()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--batch", type=int, default=None, help="of all recipes")
    parser.add_argument("--rounds", type=int, default=3, help="of each step, in turns")
    parser.add_argument("--size", choices=steps.CONFIGS, default="half")
    args = parser.parse_args()
    rows = []
    for recipe in args.recipes:
        changed, size = RECIPES[recipe]
        size = args.batch or size
        batch = steps.cut(steps.make_batch(steps.grammar_lengths(size)))
        tokens = batch["token_ids"].shape[1]
        cfg = changed(steps.CONFIGS[args.size](size, dropout=0.0))
        configs = {keep: masked(cfg, keep) for keep in PATCHES}
        start = steps.Step(cfg).state
        calls = {keep: steps.Step(each, start=start) for keep, each in configs.items()}
        calls = {keep: lambda step=step, b=batch: step(b) for keep, step in calls.items()}
        seconds = steps.in_turns(calls, args.rounds)
        median = steps.medians(seconds)
        work = {keep: model_flops_per_pair(each, tokens) for keep, each in configs.items()}
        for keep in PATCHES:
            row = {
                "recipe": recipe,
                "batch": size,
                "columns": tokens,
                "patches": keep,
                "seconds": seconds[keep],
                "time": median[keep] / median[PATCHES[0]],
                "work": work[keep] / work[PATCHES[0]],
            }
            rows.append(row)
            print(
                f"{recipe:12} {keep:4} patches {median[keep]:6.2f} s, time {row['time']:.2f}, "
                f"work {row['work']:.2f}, spread {steps.spread(seconds[keep])}",
                flush=True,
            )
    print_result("masking", size=args.size, rows=rows)


if __name__ == "__main__":
    main()
