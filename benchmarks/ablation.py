"""What each lever of the training step gives: the step without it, against the step with all.

    python benchmarks/ablation.py [--batch 4] [--rounds 2] [--size half|base] [--trials]
        [--only "keys per text" padded]

The whole recipe, captions of the lengths that the grammar writes, no dropout and given negatives,
so that the losses of all variants can be compared before they are timed in turns. On a CPU half the
width of base in float32 without recomputation, batches of 4; on a GPU base in bfloat16 with
`remat=dots`, batches of 128.

keys per text: cross-attention keys and values made anew for each of the three texts that look at an
    image, as the reference does.
all tokens: the last layer computes all tokens where only the first one is read.
padded: captions of 65 columns, not of the first of `steps.BUCKETS` that holds the longest.
dense ITC: all similarities of the batch to batch and queue at once, not in chunks.
copied state: the step's old state is not given up for the new one.
remat none, dots, full: how much the backward pass recomputes, which saves memory and not time.
float32, flash: matrix products in float32, whose losses differ; the fused kernel for attention
    among patches. Both on a GPU.

With --trials, or by name, also more of them, and what was tried and is not in the step:

three passes: ITM of own pairs, of texts with their negative images and of images with their
    negative texts in a pass each, with keys and values of its own, as the reference does.
twins after: momentum twins wait for the online towers, so that none of them run side by side.
bfloat16: matrix products in it, on a CPU, which may be faster than float32. Its losses differ.
filled patches: attention of the image tower on 208 tokens, a multiple of the width of vectors, of
    which 11 are masked, not on 197.
fused QKV: queries, keys and values of the image tower from one product with their weights side by
    side, not from three.

`time` is the ratio to the step with all levers, `temp` the MiB that XLA plans for intermediate
results, `all` those with the state, old and new. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flip_jax.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before what takes seconds to import

import jax
import numpy as np

from benchmarks import steps
from benchmarks.result import print_result
from flip_jax.config import Config
from flip_jax.losses import flip as flip_losses
from flip_jax.losses.itc import grouped_itc_loss
from flip_jax.models import attention
from flip_jax.models.bert import Bert, of_each_text
from flip_jax.models.vit import VisionBlock, VisionTransformer


@contextmanager
def keys_per_text() -> Iterator[None]:
    plain = Bert.__call__

    def call(self, token_ids, token_mask, image_tokens=None, image_index=None, *rest, **options):
        if image_tokens is not None:
            image_tokens, image_index = of_each_text(image_tokens, image_index), None
        return plain(self, token_ids, token_mask, image_tokens, image_index, *rest, **options)

    with patch.object(Bert, "__call__", call):
        yield


@contextmanager
def all_tokens() -> Iterator[None]:
    def without(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(self, *arguments, first_only: bool = False, **options):
            found = plain(self, *arguments, **options)
            return found[:, :1] if first_only else found

        return call

    with (
        patch.object(Bert, "__call__", without(Bert.__call__)),
        patch.object(VisionTransformer, "__call__", without(VisionTransformer.__call__)),
    ):
        yield


@contextmanager
def dense_itc() -> Iterator[None]:
    def loss(*arguments):
        *arguments, _mesh = arguments
        return grouped_itc_loss(*arguments)

    with patch.object(flip_losses, "sharded_itc_loss", loss):
        yield


@contextmanager
def three_passes() -> Iterator[None]:
    def logits(match, ids, mask, images, negatives, key, **_):
        other = negatives["text"]
        own, negative = (match(ids, mask, images, i, key) for i in (None, negatives["image"]))
        text = match(ids[other], mask[other], images, None, key)
        return jax.numpy.stack([own, negative, text], axis=1)

    with patch.object(flip_losses, "itm_logits", logits):
        yield


@contextmanager
def twins_after() -> Iterator[None]:
    plain, online = flip_losses.in_parts, []

    def in_parts(encode, parts):
        def call(keys, image, texts):
            if encode.__name__ == "encode_twin":
                # No compiler may take 0 * x for 0: x could be NaN.
                wait = 0 * sum(map(jax.numpy.sum, jax.tree.leaves(online.pop())))
                image, texts = image + wait, (texts[0] + wait.astype(texts[0].dtype), texts[1])
            found = plain(encode, parts)(keys, image, texts)
            online.append(found)
            return found

        return call

    with patch.object(flip_losses, "in_parts", in_parts):
        yield


@contextmanager
def filled_patches() -> Iterator[None]:
    plain = attention.attend

    def attend(query, key, value, mask=None, **options):
        tokens = query.shape[2]
        if mask is not None or query.shape != key.shape:
            return plain(query, key, value, mask, **options)
        fill = ((0, 0), (0, 0), (0, -tokens % 16), (0, 0))
        query, key, value = (jax.numpy.pad(x, fill) for x in (query, key, value))
        mask = jax.numpy.broadcast_to(np.arange(key.shape[2]) < tokens, key.shape[::2])
        return plain(query, key, value, mask, **options)[:, :, :tokens]

    with patch.object(attention, "attend", attend):
        yield


@contextmanager
def fused_qkv() -> Iterator[None]:
    plain = VisionBlock.__call__

    def call(self, x, *, first_only: bool = False):
        if first_only:
            return plain(self, x, first_only=True)
        attn, h = self.attn, self.ln_attn(x)
        linear = attn.query, attn.key, attn.value
        kernel = jax.numpy.concatenate([part.kernel[...] for part in linear], axis=1)
        bias = jax.numpy.concatenate([part.bias[...] for part in linear])
        projected = jax.numpy.split(h @ kernel.astype(h.dtype) + bias.astype(h.dtype), 3, axis=-1)
        heads = attention.attend(*(attn._split(part) for part in projected))
        x = x + attn.out(heads.swapaxes(1, 2).reshape(x.shape))
        return x + self.mlp(self.ln_mlp(x))

    with patch.object(VisionBlock, "__call__", call):
        yield


@contextmanager
def copied_state() -> Iterator[None]:
    jit = jax.jit
    with patch.object(jax, "jit", lambda f, donate_argnums=(), **options: jit(f, **options)):
        yield


def with_model(cfg: Config, **fields: Any) -> Config:
    return replace(cfg, model=replace(cfg.model, **fields))


def variants(cfg: Config, gpu: bool) -> dict[str, tuple[Config, Callable[[], Any], bool]]:
    """Name -> config, what is changed while the step is traced, whether texts are padded."""
    remats = [remat for remat in ("none", "dots", "full") if remat != cfg.model.remat]
    vision = replace(cfg.model.vision, attention="flash")
    of_gpu = {
        "float32": (with_model(cfg, dtype="float32"), nullcontext, False),
        "flash": (with_model(cfg, vision=vision), nullcontext, False),
    }
    return {
        "all levers": (cfg, nullcontext, False),
        "keys per text": (cfg, keys_per_text, False),
        "all tokens": (cfg, all_tokens, False),
        "padded": (cfg, nullcontext, True),
        "dense ITC": (cfg, dense_itc, False),
        "copied state": (cfg, copied_state, False),
        **{f"remat {each}": (with_model(cfg, remat=each), nullcontext, False) for each in remats},
        **(of_gpu if gpu else {}),
    }


def trials(cfg: Config, gpu: bool) -> dict[str, tuple[Config, Callable[[], Any], bool]]:
    """As `variants`, those that are not measured unless asked for."""
    of_cpu = {"bfloat16": (with_model(cfg, dtype="bfloat16"), nullcontext, False)}
    return {
        "three passes": (cfg, three_passes, False),
        "twins after": (cfg, twins_after, False),
        **({} if gpu else of_cpu),
        "filled patches": (cfg, filled_patches, False),
        "fused QKV": (cfg, fused_qkv, False),
    }


def main() -> None:
    steps.keep_programs()
    steps.take_gpu_memory(os.environ)  # each variant has a state of its own
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = jax.default_backend() == "gpu"
    parser.add_argument("--batch", type=int, default=128 if gpu else 4)
    parser.add_argument("--rounds", type=int, default=10 if gpu else 2, help="of each, in turns")
    parser.add_argument("--size", choices=steps.CONFIGS, default="base" if gpu else "half")
    parser.add_argument("--trials", action="store_true", help="what is listed last above, too")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of what is listed above")
    args = parser.parse_args()
    cfg = steps.CONFIGS[args.size](args.batch, dropout=0.0)
    if gpu:
        cfg = with_model(cfg, dtype="bfloat16", remat="dots")
    padded = steps.make_batch(steps.grammar_lengths(args.batch))
    drawn = (np.arange(args.batch) + 1) % args.batch
    padded["negatives"] = {"image": drawn, "text": drawn}
    padded, cut = jax.device_put((padded, steps.cut(padded)))

    tried = trials(cfg, gpu) if args.trials or args.only else {}
    chosen = chosen_of(variants(cfg, gpu) | tried, args.only)
    calls, memory, losses = compiled(cfg, chosen, padded, cut)
    seconds = steps.in_turns(calls, args.rounds)
    median = steps.medians(seconds)
    rows = []
    for name in calls:
        row = {"variant": name, "time": median[name] / median["all levers"]}
        mib = {f"{part}_mib": round(memory[name][part]) for part in ("temp", "all")}
        rows.append(row | {"seconds": seconds[name]} | mib)
        print(
            f"{name:14} {median[name]:7.3f} s, time {row['time']:.2f}, temp {mib['temp_mib']:5} MiB"
            f", all {mib['all_mib']:5} MiB, spread {steps.spread(seconds[name])}, {losses[name]}"
        )
    sizes = {"size": args.size, "batch": args.batch, "columns": cut["token_ids"].shape[1]}
    print_result("ablation", **sizes, **({"card": steps.card()} if gpu else {}), rows=rows)


def chosen_of(variants: dict[str, Any], only: list[str] | None) -> dict[str, Any]:
    """All variants, or those of the names and the step that they are compared with."""
    unknown = sorted(set(only or ()) - set(variants))
    if unknown:
        raise SystemExit(f"--only: there is no {unknown}; there are {list(variants)}")
    names = variants if only is None else ("all levers", *only)
    return {name: each for name, each in variants.items() if name in names}


def compiled(
    cfg: Config, chosen: dict[str, Any], padded: dict[str, Any], cut: dict[str, Any]
) -> tuple[dict[str, Callable[[], None]], dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Steps of the variants, which begin with the same state.

    Returns:
      a call of each, whose first one, which is not timed, compares losses with those of all levers;
      memory of each; losses of first calls, empty until then.
    """
    start = steps.Step(cfg).state
    calls, memory, losses = {}, {}, {}

    def call(name: str, step: steps.Step, batch: dict[str, Any], most: float) -> None:
        found = step(batch)
        if name not in losses:
            losses[name] = found
            assert_same(name, found, losses["all levers"], most)

    for name, (each, changed, whole) in chosen.items():
        batch = padded if whole else cut
        with changed():
            step = steps.Step(each, start=start)
            memory[name] = step.memory(batch)
        print(f"compiled: {name}", flush=True)
        exact = each.model.dtype == cfg.model.dtype == "float32"
        calls[name] = partial(call, name, step, batch, 1e-4 if exact else 0.05)
    return calls, memory, losses


def assert_same(name: str, found: dict[str, float], wanted: dict[str, float], most: float) -> None:
    for part, value in wanted.items():
        if not abs(found[part] - value) <= most:  # so is NaN
            raise AssertionError(f"{name}: {part} is {found[part]}, with all levers {value}")


if __name__ == "__main__":
    main()
