"""Speed and memory of the quality report.

    python benchmarks/quality.py pictures DATA [--sample 200] [--clip FOLDER]
    python benchmarks/quality.py captions [--captions 1000000] [--kind random]

`pictures` gives CPU seconds per 1,000 pictures of each part of a report on a data set, and BRISQUE
beside the same formula written down plainly with SciPy (`plain_brisque`, the oracle of its test).
`captions` counts words, 4-grams and captions of made-up texts: `random` ones of 30
words of 200,000, in which next to nothing repeats, or those of the `grammar`; it prints the peak
memory of the process. CPU seconds, unlike the clock, mean much the same on a busy machine.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy.signal import convolve2d
from scipy.special import gamma

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flip_jax.curate.pictures import perceptual_hash
from flip_jax.curate.quality import brisque as fast
from flip_jax.curate.quality.clip_iqa import ClipIqa
from flip_jax.curate.quality.survey import survey
from flip_jax.curate.quality.words import WordCounts
from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.captions import captions as grammar
from flip_jax.data.records import RecordSource, load_manifest
from flip_jax.data.transforms import decode_image

_BATCH, _WORDS, _VOCABULARY = 2000, 30, 200_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("pictures")
    command.add_argument("data", type=Path)
    command.add_argument("--sample", type=int, default=200)
    command.add_argument("--clip", type=Path)
    command.set_defaults(run=pictures)
    command = commands.add_parser("captions")
    command.add_argument("--captions", type=int, default=1_000_000)
    command.add_argument("--kind", choices=["random", "grammar"], default="random")
    command.set_defaults(run=captions)
    args = parser.parse_args()
    args.run(args)


def pictures(args: argparse.Namespace) -> None:
    sources = {name: RecordSource(args.data, name) for name in load_manifest(args.data).splits}
    total = sum(map(len, sources.values()))
    start = time.process_time()
    found = survey(sources, args.sample)
    parts = {"one pass over all records": (time.process_time() - start) / total}
    files = [sources[split][number].image for split, number in found.sample]
    images = [decode_image(data) for data in files]
    parts["decode"] = _seconds(decode_image, files)
    parts["BRISQUE"] = _seconds(fast.brisque, images)
    parts["BRISQUE, plain"] = _seconds(plain_brisque, images[: len(images) // 5 + 1])
    parts["perceptual hash"] = _seconds(perceptual_hash, images)
    if args.clip is not None:
        clip = ClipIqa(args.clip)
        parts["CLIP-IQA type"] = _seconds(
            lambda image: clip.scores(clip.prepare(image)[None]), images[:32]
        )
    sides = [min(image.shape[:2]) for image in images]
    print(f"{total:,} records; shorter side of the sample: median {np.median(sides):.0f} px")
    for name, seconds in parts.items():
        print(f"{1000 * seconds:10.2f} CPU seconds per 1,000  {name}")
    print(f"BRISQUE is {parts['BRISQUE, plain'] / parts['BRISQUE']:.0f} times as fast as plainly")


def _seconds(work: Callable[..., object], items: list) -> float:
    work(items[0])
    start = time.process_time()
    for item in items:
        work(item)
    return (time.process_time() - start) / len(items)


def captions(args: argparse.Namespace) -> None:
    counts, seconds = WordCounts(), 0.0
    rng = np.random.default_rng(0)
    batches = _random_texts(rng) if args.kind == "random" else _grammar_texts(rng)
    for _ in range(args.captions // _BATCH):
        texts, tenths = next(batches), rng.integers(10, size=_BATCH)
        start = time.process_time()
        counts.add(texts, tenths)
        seconds += time.process_time() - start
    start = time.process_time()
    found = counts.summary()
    seconds += time.process_time() - start
    print(found)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rate = found["captions"] / seconds
    print(f"{rate:,.0f} captions per CPU second; peak memory of the process {memory:.2f} GiB")


def _random_texts(rng: np.random.Generator) -> Iterator[list[str]]:
    words = np.array([f"word{number:x}" for number in range(_VOCABULARY)], object)
    while True:
        drawn = words[rng.integers(_VOCABULARY, size=(_BATCH, _WORDS))]
        yield [" ".join(row) for row in drawn]


def _grammar_texts(rng: np.random.Generator) -> Iterator[list[str]]:
    while True:
        labels = (rng.random((_BATCH // 5, len(ATTRIBUTES))) < 0.25).astype(np.int8)
        yield [text for row in labels for text in grammar(row, 0, 5)]


def plain_brisque(image: np.ndarray) -> float:
    """The score of uint8 [H, W, 3], as the formulas stand; see `flip_jax.curate.quality.brisque`.

    Rounding in flat areas, which it counts as contrasts like MATLAB does, is where they differ.
    """
    grey = np.round(image @ np.array([0.298936, 0.587043, 0.114021]))
    found = []
    for _ in range(2):
        found += _plain_features(grey)
        grey = _half(grey.shape[0]) @ grey @ _half(grey.shape[1]).T
    with np.load(Path(fast.__file__).with_name("brisque_live.npz")) as model:
        least, greatest = model["least"], model["greatest"]
        scaled = -1 + 2 * (np.array(found) - least) / (greatest - least)
        kernel = np.exp(-0.05 * np.sum((model["vectors"] - scaled) ** 2, axis=1))
        return float(kernel @ model["weights"] + 153.591)


def _plain_features(grey: np.ndarray) -> list[float]:
    bell = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
    window = np.outer(bell, bell) / bell.sum() ** 2
    mean = convolve2d(grey, window, "same")
    deviation = np.sqrt(np.abs(convolve2d(grey**2, window, "same") - mean**2))
    contrast = (grey - mean) / (deviation + 1)
    shapes = np.arange(0.2, 10.001, 0.001)
    table = gamma(1 / shapes) * gamma(3 / shapes) / gamma(2 / shapes) ** 2
    ratio = np.mean(contrast**2) / np.mean(np.abs(contrast)) ** 2
    found = [shapes[np.argmin(np.abs(table - ratio))], np.mean(contrast**2)]
    for shift in ((0, 1), (1, 0), (1, 1), (-1, 1)):
        product = contrast * np.roll(contrast, shift, (0, 1))
        left = np.sqrt(np.mean(product[product < 0] ** 2))
        right = np.sqrt(np.mean(product[product > 0] ** 2))
        skew = left / right
        ratio = np.mean(np.abs(product)) ** 2 / np.mean(product**2)
        ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
        shape = shapes[np.argmin(np.abs(1 / table - ratio))]
        mean = (right - left) * gamma(2 / shape) / np.sqrt(gamma(1 / shape) * gamma(3 / shape))
        found += [shape, mean, left**2, right**2]
    return found


def _half(size: int) -> np.ndarray:
    """[ceil(size / 2), size]: MATLAB's imresize by a half along one side, bicubic, antialiased."""
    centres = 2 * np.arange(-(-size // 2)) + 0.5
    offsets = np.arange(-4 * 2, size + 4 * 2)
    x = np.abs(centres[:, None] - offsets) / 2
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x <= 1, near, np.where(x <= 2, far, 0))
    weights /= weights.sum(axis=1, keepdims=True)
    mirrored = np.concatenate([np.arange(size), np.arange(size)[::-1]])[offsets % (2 * size)]
    out = np.zeros((len(centres), size))
    np.add.at(out.T, mirrored, weights.T)
    return out


if __name__ == "__main__":
    main()
