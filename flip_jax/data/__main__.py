"""`python -m flip_jax.data`: build, read, draw, show, verify and time a data set."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flip_jax.config import DataConfig, DrawnConfig
from flip_jax.data import transforms
from flip_jax.data.published import write_published
from flip_jax.data.readers import READERS
from flip_jax.data.records import BadRecord, RecordSource, load_manifest
from flip_jax.data.sources import BuildConfig, build, write_drawn


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status, 2 for input that cannot be used."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flip_jax.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        name = run.__name__.strip("_")
        out = commands.add_parser(name, help=run.__doc__.splitlines()[0], description=run.__doc__)
        out.set_defaults(run=run)
        return out

    _add_build(command(_build))
    _add_read(command(_read))
    _add_draw(command(_draw))
    show = command(_show)
    show.add_argument("path", type=Path, metavar="DIR")
    show.add_argument("--split", default="test")
    show.add_argument("--count", type=int, default=12, help="pictures on the sheet")
    show.add_argument("--out", type=Path, help="contact sheet to write, .png or .jpg")
    verify = command(_verify)
    verify.add_argument("path", type=Path, metavar="DIR")
    verify.add_argument("--threads", type=int, default=2)
    _add_bench(command(_bench))
    return parser


def _add_build(parser: argparse.ArgumentParser) -> None:
    defaults = BuildConfig()
    parser.add_argument(
        "--table", type=Path, action="append", required=True, help=".parquet, .csv or .jsonl"
    )
    parser.add_argument(
        "--images", type=Path, action="append", required=True, help="folder of the table's pictures"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    add = parser.add_argument
    add("--image-column", default=defaults.image_column)
    add("--group-column", help="the person of a picture; without it each picture is its own")
    add("--group-prefix", default="", help="put before the group, e.g. celeba:")
    add("--split-column")
    add("--split", default=defaults.split, help="split of all rows where no --split-column is")
    add("--caption-column", help="a sentence or a list of sentences")
    add("--captions", type=int, default=0, help="captions to make from the attribute columns")
    add("--caption-seed", type=int, default=0)
    add("--max-side", type=int, help="pixels; larger pictures are shrunk")
    add("--quality", type=int, default=defaults.quality, help="of JPEGs encoded again")
    add("--max-bad-fraction", type=float, default=defaults.max_bad_fraction)


def _add_read(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", choices=READERS, metavar="NAME", help=", ".join(READERS))
    add("--root", type=Path, required=True, help="folder of the unpacked data set")
    add("--out", type=Path, required=True)
    add("--overwrite", action="store_true")
    add("--threads", type=int, default=2)
    add("--captions", type=int, default=5, help="to make from the labels, if it has no captions")
    add("--max-bad-fraction", type=float, default=BuildConfig.max_bad_fraction)


def _add_draw(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--processes", type=int)
    for field in dataclasses.fields(DrawnConfig):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(
            flag, type=int, default=field.default, required=field.name == "train_identities"
        )


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="DIR")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--max-length", type=int, default=65, help="tokens")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each measurement")
    defaults = DataConfig(tokenizer="grammar", batch_size=64)
    for name in ("tokenizer", "batch_size", "threads", "workers", "prefetch"):
        default = getattr(defaults, name)
        parser.add_argument(
            "--" + name.replace("_", "-"), type=type(default), default=default, help="as data.*"
        )


def _at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')}={value}: must be at least {least}")


def _given(args: argparse.Namespace, kind: type) -> dict:
    """The arguments that are fields of a config dataclass."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in vars(args).items() if name in names}


def _build(args: argparse.Namespace) -> int:
    """Makes a data set from tables beside folders of pictures."""
    if len(args.table) != len(args.images):
        raise ValueError(
            f"{len(args.table)} --table and {len(args.images)} --images; give them in pairs"
        )
    report = build(
        list(zip(args.table, args.images, strict=True)),
        args.out,
        BuildConfig(**_given(args, BuildConfig)),
        overwrite=args.overwrite,
        threads=args.threads,
    )
    print(report)
    print(summary(args.out))
    return 0


def _read(args: argparse.Namespace) -> int:
    """Makes a data set from a published one, in the layout of its publisher."""
    report = write_published(
        args.name,
        args.root,
        args.out,
        captions=args.captions,
        max_bad_fraction=args.max_bad_fraction,
        overwrite=args.overwrite,
        threads=args.threads,
    )
    print(report)
    print(summary(args.out))
    return 0


def _draw(args: argparse.Namespace) -> int:
    """Makes a data set of drawn faces."""
    cfg = DrawnConfig(**_given(args, DrawnConfig))
    write_drawn(cfg, args.out, overwrite=args.overwrite, processes=args.processes)
    print(summary(args.out))
    return 0


def summary(path: Path) -> str:
    """Returns the manifest in words."""
    manifest = load_manifest(path)
    lines = [f"{path}: schema {manifest.schema_version}, by {manifest.created_by}"]
    lines.append(f"  from {manifest.source}")
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        height, width, words = split.image_height, split.image_width, split.words_per_caption
        lines.append(
            f"  {name}: {split.records:,} records of {split.groups:,} groups, {split.captions:,} "
            f"captions of {words.least:.0f}..{words.greatest:.0f} words (mean {words.mean:.1f}), "
            f"pictures {width.least:.0f}..{width.greatest:.0f} x "
            f"{height.least:.0f}..{height.greatest:.0f} px, {size / 1e6:.1f} MB in "
            f"{len(split.shards)} shards"
        )
    if manifest.groups_in_several_splits:
        lines.append(
            f"  WARNING: {manifest.groups_in_several_splits} groups are in more than one split"
        )
    return "\n".join(lines)


def _show(args: argparse.Namespace) -> int:
    """Prints what a data set holds and draws a contact sheet."""
    _at_least(args, 1, "count")
    print(summary(args.path))
    source = RecordSource(args.path, args.split)
    count = min(args.count, len(source))
    for number in range(count):
        record = source[number]
        print(f"{number}: {record.id} ({record.group_id})")
        for caption in record.captions:
            print(textwrap.indent(textwrap.fill(caption, 92), "    "))
    if args.out:
        contact_sheet(source, range(count)).save(args.out)
    return 0


def contact_sheet(source: RecordSource, numbers: range, side: int = 192) -> Image.Image:
    """Draws pictures, four in a row, each with its first caption below."""
    text_height, columns = 124, 4
    rows = -(-len(numbers) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + text_height)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for cell, number in enumerate(numbers):
        record = source[number]
        left, top = cell % columns * (side + 8) + 4, cell // columns * (side + text_height) + 4
        picture = Image.fromarray(transforms.decode_image(record.image))
        sheet.paste(transforms.contain(picture, side), (left, top))
        caption = record.captions[0] if record.captions else "(no caption)"
        text = textwrap.fill(caption, 30, max_lines=8)
        draw.text((left, top + side + 4), text, fill="black", font=font)
    return sheet


def _verify(args: argparse.Namespace) -> int:
    """Checks every checksum and decodes every picture; exit status 1 if any is bad."""
    from flip_jax.data.pipeline import read_record  # costs a second, drawing processes included

    _at_least(args, 1, "threads")
    bad = 0
    for split in load_manifest(args.path).splits:
        source = RecordSource(args.path, split, check=False)

        def check(number: int, source: RecordSource = source) -> str | None:
            try:
                read_record(source, number, need_caption=False)
            except (BadRecord, OSError) as error:  # the latter: of the whole shard
                return str(error)
            return None

        complaints = dict.fromkeys(source.damaged_shards())  # a set in order
        good, numbers = 0, iter(range(len(source)))
        with ThreadPoolExecutor(args.threads) as pool:
            # In chunks: the pool keeps a result for all that it was given at once.
            while chunk := list(islice(numbers, 64 * args.threads)):
                found = [text for text in pool.map(check, chunk) if text]
                good += len(chunk) - len(found)
                complaints |= dict.fromkeys(found)
        bad += len(complaints)
        print(f"{split}: {good:,} of {len(source):,} records are good")
        for text in complaints:
            print(f"  {text}")
    return 1 if bad else 0


def _bench(args: argparse.Namespace) -> int:
    """Times the training input, stage by stage and as a whole, in pictures per second."""
    from flip_jax.data.pipeline import TrainPipeline
    from flip_jax.data.tokenizer import Tokenizer

    cfg = DataConfig(**_given(args, DataConfig))
    _at_least(args, 1, "batch_size", "image_size", "prefetch")
    _at_least(args, 0, "threads", "workers")
    if not 0 < args.seconds < math.inf:
        raise ValueError(f"--seconds={args.seconds}: must be above 0")
    source = RecordSource(args.path, args.split)
    tokenizer = Tokenizer.load(cfg.tokenizer, args.max_length)
    pipeline = TrainPipeline(source, tokenizer, cfg, args.image_size, seed=0)
    rng = np.random.default_rng(0)
    numbers = rng.integers(len(source), size=64).tolist()
    records = [source[number] for number in numbers]
    small = [transforms.load_image(record.image, args.image_size) for record in records]
    texts = [record.captions[0] for record in records if record.captions]

    def augment() -> None:
        for image in small:
            flipped = transforms.random_flip(image, rng)
            transforms.rand_augment(flipped, rng, cfg.randaugment_ops, cfg.randaugment_level)

    stages = {
        "read": lambda: [source[number] for number in numbers],
        "decode and resize": lambda: [
            transforms.load_image(record.image, args.image_size) for record in records
        ],
        "flip and augment": augment,
        "tokenize": lambda: tokenizer(texts),
    }
    rates = {name: _rate(stage, len(numbers), args.seconds) for name, stage in stages.items()}
    print(f"{args.path}, split {args.split}, to {args.image_size} px; pictures/s:")
    for name, rate in rates.items():
        print(f"  {name:17}{rate:9.0f}  one thread")
    together = 1 / sum(1 / rate for rate in rates.values())
    print(f"  {'all stages':17}{together:9.0f}  one thread, slowest: {min(rates, key=rates.get)}")
    with pipeline.batches() as stream:
        next(stream)  # threads and processes are up
        rate = _rate(lambda: next(stream), cfg.batch_size, args.seconds)
    print(
        f"  {'pipeline':17}{rate:9.0f}  batches of {cfg.batch_size}, {cfg.threads} threads, "
        f"{cfg.workers} worker processes"
    )
    return 0


def _rate(work: Callable[[], object], pictures: int, seconds: float) -> float:
    """Repeats `work` for a while; returns pictures per second."""
    work()
    start, rounds = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        work()
        rounds += 1
    return rounds * pictures / elapsed


if __name__ == "__main__":
    sys.exit(main())
