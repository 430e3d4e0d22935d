"""Pictures per CPU second of the training input against the chain of the reference, in one run.

    python benchmarks/input.py [--pictures 64] [--rounds 11]

Both sides take the same JPEG files (quality 90, 4:2:0) of drawn faces, 178 x 218 px as in CelebA
and 512 x 512 px, one thread each, and are timed in turns.

reference: Pillow decodes, antialiased bicubic to 224 x 224, mirror, RandAugment(2, 5), float32,
    normalised, channels first, as `data/dataset.py` of the reference does. Its RandAugment is ours,
    which is faster than the one published: the ratio is a lower bound.
flip_jax: `load_image`, mirror, RandAugment; uint8 goes to the device, which normalises there.

`PSNR` compares pictures before augmentation with those of the reference, mean over the pictures.
`pipeline` is all of it, records, captions and tokens included, in batches of 64 by two threads and
by two worker processes, of 4,096 records that hold these files again and again (in a set of 64
Grain's shuffle alone would take 0.4 ms for each): pictures per second of the clock, and the share
of its time that a device would wait whose steps take no CPU (they sleep). `captions`: drawn by the
grammar, and tokenised a second time, per CPU second. The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.result import print_result
from flip_jax.config import DataConfig
from flip_jax.data.captions import captions
from flip_jax.data.drawn_faces import DrawnFace, draw_face
from flip_jax.data.pipeline import TrainPipeline
from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import Record, RecordSource
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.data.transforms import (
    decode_image,
    load_image,
    rand_augment,
    random_flip,
    resize_image,
)

SIZE = 224
RECORDS = 4096
PACE = 1200  # pairs/s, the most that XLA plans for an H200 (docs/performance.md)
SHAPES = ((218, 178), (512, 512))  # height, width
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def reference_picture(data: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def reference(data: bytes, rng: np.random.Generator) -> np.ndarray:
    picture = rand_augment(random_flip(reference_picture(data), rng), rng)
    scaled = picture.transpose(2, 0, 1).astype(np.float32) / 255
    return (scaled - MEAN[:, None, None]) / STD[:, None, None]


def ours(data: bytes, rng: np.random.Generator) -> np.ndarray:
    return rand_augment(random_flip(load_image(data, SIZE), rng), rng)


def exact(data: bytes, rng: np.random.Generator) -> np.ndarray:
    """As `ours`, at the quality of evaluation."""
    picture = resize_image(decode_image(data), SIZE)
    return rand_augment(random_flip(picture, rng), rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=11, help="of each side, in turns")
    args = parser.parse_args()
    faces = [draw_face(0, identity, picture=0, size=512) for identity in range(args.pictures)]
    rows = [compare(shape, faces, args.rounds) for shape in SHAPES]
    rates = text_rates(faces)
    print_result("input", pictures=args.pictures, rows=rows, captions_per_cpu_second=rates)


def compare(shape: tuple[int, int], faces: list[DrawnFace], rounds: int) -> dict[str, Any]:
    height, width = shape
    resize = dict(dsize=(width, height), interpolation=cv2.INTER_AREA)
    files = [jpeg(cv2.resize(face.image, **resize)) for face in faces]
    sides = {"reference": reference, "exact": exact, "flip_jax": ours}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            rng = np.random.default_rng(turn)  # all sides draw the same augmentations
            spent = cpu_seconds(lambda side=side, rng=rng: [side(data, rng) for data in files])
            if turn:  # the first one warms up
                seconds[name].append(spent)
    rates = {name: len(files) / statistics.median(spent) for name, spent in seconds.items()}
    decoded = {"exact": lambda data: resize_image(decode_image(data), SIZE)}
    decoded["flip_jax"] = lambda data: load_image(data, SIZE)
    quality = {
        name: float(np.mean([psnr(decode(data), reference_picture(data)) for data in files]))
        for name, decode in decoded.items()
    }
    bytes_each = round(float(np.mean([len(data) for data in files])))
    print(f"{width} x {height} px, {bytes_each:,} bytes:")
    for name, rate in rates.items():
        spread = max(seconds[name]) / min(seconds[name]) - 1
        print(
            f"  {name:10} {rate:6.0f} pictures per CPU second, ratio "
            f"{rate / rates['reference']:.2f}, spread {spread:.0%}"
            + (f", PSNR {quality[name]:.1f} dB" if name in quality else "")
        )
    whole = pipelines(files, faces)
    for kind, found in whole.items():
        print(
            f"  pipeline, two {kind}: {found['rate']:.0f} pictures per second, {found['wait']:.1%} "
            f"waited for at {PACE} pairs/s",
            flush=True,
        )
    return {
        "shape": shape,
        "bytes": bytes_each,
        "pictures_per_cpu_second": rates,
        "ratio": {name: rate / rates["reference"] for name, rate in rates.items()},
        "psnr_db": quality,
        "pipeline": whole,
        "cpu_seconds": seconds,
    }


def jpeg(picture: np.ndarray) -> bytes:
    """As cameras and data sets have it: colour at half the resolution."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=90, subsampling="4:2:0")
    return out.getvalue()


def pipelines(files: list[bytes], faces: list[DrawnFace]) -> dict[str, dict[str, float]]:
    """The whole input, by threads and by worker processes (Grain's)."""
    with tempfile.TemporaryDirectory() as folder:
        texts = [captions(face.attributes, number, 5) for number, face in enumerate(faces)]
        with RecordWriter(Path(folder, "data"), "drawn") as writer:
            for number in range(RECORDS):
                face = number % len(faces)
                record = Record(
                    id=f"{number}",
                    group_id=f"drawn:{number}",
                    image=files[face],
                    captions=texts[face],
                    attributes=faces[face].attributes,
                )
                writer.write("train", record)
        source = RecordSource(Path(folder, "data"), "train")
        tokenizer = Tokenizer.load("grammar", 65)
        cfg = replace(DataConfig(), batch_size=64, tokenizer="grammar")
        each = {"threads": {"threads": 2}, "processes": {"threads": 1, "workers": 2}}
        return {
            kind: measure(TrainPipeline(source, tokenizer, replace(cfg, **fields), SIZE, seed=0))
            for kind, fields in each.items()
        }


def measure(pipeline: TrainPipeline, batches: int = 10) -> dict[str, float]:
    """Pictures per second, best of three; share of the time that a device of `PACE` waits."""
    size = pipeline.cfg.batch_size

    def seconds(step: float = 0.0) -> float:
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
            time.sleep(step)
        return time.perf_counter() - start

    with pipeline.batches() as stream:
        for _ in range(8):  # those that waited ready
            next(stream)
        rate = batches * size / min(seconds() for _ in range(3))
        seconds(size / PACE)  # until batches wait ready again
        whole = seconds(size / PACE)
    return {"rate": rate, "wait": 1 - batches * size / PACE / whole}


def text_rates(faces: list[DrawnFace]) -> dict[str, float]:
    tokenizer = Tokenizer.load("grammar", 65)
    texts = [text for face in faces for text in captions(face.attributes, 0, 5)]
    drawn = cpu_seconds(lambda: [captions(face.attributes, 0, 5) for face in faces])
    tokenizer(texts)  # words met before, as nearly all are
    read = cpu_seconds(lambda: tokenizer(texts))
    rates = {"grammar": len(texts) / drawn, "tokenizer": len(texts) / read}
    print(", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()), "captions/CPU s")
    return rates


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    error = np.mean((found.astype(np.float64) - wanted) ** 2)
    return 10 * np.log10(255**2 / error) if error else np.inf


if __name__ == "__main__":
    main()
