"""Speed and memory of curation: its stages, a whole local build, and a build of very many rows.

    python benchmarks/curate.py stages [--pictures 400]
    python benchmarks/curate.py build [--pictures 40000]
    python benchmarks/curate.py rows [--rows 1000000]
    python benchmarks/curate.py hashes --table faces.parquet --images photos --group-column person

`stages` gives pairs per second of each stage on one core, and captions per second of the grammar.
`build` makes a data set with one worker process and with two, twice in turns, takes the best times
and compares the shards.
`rows` is for the text: a build in which each picture is 16 x 16 pixels of noise, with its peak
memory. These draw their pictures, at 285 x 285 px, the mean of the paper's, where they matter.
`hashes` counts in how many bits perceptual hashes differ: of a picture and its copies, of pictures
of one person, of different people.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flip_jax.config import to_dict
from flip_jax.curate.config import (
    BeamConfig,
    CaptionsConfig,
    CurateConfig,
    FacesConfig,
    FetchConfig,
    InputConfig,
    OptOutConfig,
    OutputConfig,
)
from flip_jax.curate.fetch import fetch_chunk
from flip_jax.curate.optout import OptOut
from flip_jax.curate.parts import encode_candidate
from flip_jax.curate.pictures import perceptual_hash
from flip_jax.curate.stages import Place, Sample, Tally
from flip_jax.curate.storage import Work
from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.captions import captions
from flip_jax.data.drawn_faces import draw_face
from flip_jax.data.sources import read_table
from flip_jax.data.transforms import decode_image, encode_jpeg

SIZE = 285  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for run, option, default in (
        (stages, "--pictures", 400),
        (build, "--pictures", 40_000),
        (rows, "--rows", 1_000_000),
    ):
        command = commands.add_parser(run.__name__)
        command.add_argument(option, type=int, default=default, dest="number")
        command.set_defaults(run=run)
    command = commands.add_parser(hashes.__name__)
    command.add_argument("--table", type=Path, required=True)
    command.add_argument("--images", type=Path, required=True)
    command.add_argument("--image-column", default="file")
    command.add_argument("--group-column", required=True)
    command.set_defaults(run=None)
    args = parser.parse_args()
    if args.run is None:
        return hashes(args.table, args.images, args.image_column, args.group_column)
    with tempfile.TemporaryDirectory() as folder:
        args.run(args.number, Path(folder))


def draw(count: int, folder: Path) -> Path:
    """Writes faces as JPEG and a table of them; returns the table. A hundred are drawn, the others
    are these with noise: drawing takes far longer than curation."""
    rng = np.random.default_rng(0)
    faces = [draw_face(seed=0, identity=number, picture=0, size=SIZE) for number in range(100)]
    labels, names = [], []
    for number in range(count):
        face = faces[number % len(faces)]
        noise = rng.integers(-8, 9, (SIZE, SIZE, 1), np.int16)
        image = np.clip(face.image + noise, 0, 255).astype(np.uint8)
        names.append(f"{number:06d}.jpg")
        (folder / names[-1]).write_bytes(encode_jpeg(image, 90))
        labels.append(face.attributes)
    columns = dict(zip(ATTRIBUTES, np.stack(labels, axis=1), strict=True))
    pq.write_table(pa.table({"file": names, **columns}), folder / "faces.parquet")
    return folder / "faces.parquet"


def config(table: Path, out: Path, **input_fields) -> CurateConfig:
    return CurateConfig(
        input=InputConfig(paths=str(table), **input_fields),
        faces=FacesConfig(detector="whole", min_side=8),
        output=OutputConfig(path=str(out)),
    )


def stages(pictures: int, folder: Path) -> None:
    from flip_jax.curate.pipeline import make_stages

    table = pq.read_table(draw(pictures, folder))
    labels = np.stack([table[name].to_numpy() for name in ATTRIBUTES], axis=1).astype(np.int8)
    samples = [
        Sample(id=name, place=Place(str(folder / name)), attributes=labels[index])
        for index, name in enumerate(table["file"].to_pylist())
    ]
    print(f"pairs/s on one core, {pictures} pictures of {SIZE} x {SIZE} px, best of 5")
    total, tally = 0.0, Tally()
    work = Work(str(folder / "work"))
    cfg = config(folder, folder / "out", images=str(folder), file_column="file")
    seconds = fetch(table["file"].to_pylist(), folder, work)
    print(f"{len(samples) / seconds:12,.0f}  fetch, from a server on this machine")
    for stage in make_stages(cfg, work):
        stage.setup()
        seconds = best(partial(stage.process, samples, tally))
        samples, total = stage.process(samples, tally), total + seconds
        print(f"{len(samples) / seconds:12,.0f}  {stage.name}")
    seconds = best(lambda: [encode_candidate(sample) for sample in samples])
    print(f"{len(samples) / seconds:12,.0f}  encode record")
    print(f"{len(samples) / (total + seconds):12,.0f}  all of these but fetch")
    seconds = best(lambda: [captions(row, 0, 5) for row in labels])
    print(f"{5 * len(labels) / seconds:12,.0f}  captions/s of the grammar, five for each picture")


def fetch(names: list[str], folder: Path, work: Work) -> float:
    """CPU seconds of the client for all pictures."""
    cfg = FetchConfig(allow_private=True, per_host=32, host_delay_seconds=0.0)
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    server = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        place = re.search(r"http://[\d.:]+", server.stdout.readline()).group()
        urls = {number: f"{place}/{name}" for number, name in enumerate(names)}
        keys = iter(range(5))
        opt_out = OptOut(OptOutConfig())
        found = fetch_chunk(work, "all", urls, cfg, opt_out)
        assert all(isinstance(place, Place) for place in found.values()), found
        return best(lambda: fetch_chunk(work, str(next(keys)), urls, cfg, opt_out))
    finally:
        server.kill()
        server.wait()


def best(work: Callable[[], object], rounds: int = 5) -> float:
    """The fewest CPU seconds, which other processes on the machine disturb least."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def build(pictures: int, folder: Path) -> None:
    draw(pictures, folder)
    chunk = max(pictures // 40, 1)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    shards = []
    for turn in range(2):
        for workers in (1, 2):
            out = folder / f"{turn}-{workers}"
            cfg = config(folder / "faces.parquet", out, images=str(folder), file_column="file")
            cfg = replace(cfg, input=replace(cfg.input, chunk_rows=chunk))
            wall, cpu, _ = run(replace(cfg, beam=BeamConfig(workers=workers)))
            seconds[workers].append(wall)
            shards.append([file.read_bytes() for file in sorted(out.glob("*.array_record"))])
            print(f"{workers} workers: {wall:6.1f} s, {cpu:6.1f} s of CPU")
    assert all(each == shards[0] for each in shards), "shards differ"
    one, two = (min(seconds[workers]) for workers in (1, 2))
    print(f"{pictures / one:,.0f} pairs/s with one worker, {pictures / two:,.0f} with two")
    print(f"two workers against one: {one / two:.2f} x; the shards are the same")


def rows(number: int, folder: Path) -> None:
    for count in (number // 10, number):
        table = folder / f"{count}.parquet"
        noise_table(count, table)
        cfg = config(table, folder / f"out-{count}", image_column="image", id_column="id")
        cfg = replace(cfg, captions=CaptionsConfig(count=1))
        wall, cpu, memory = run(cfg)
        print(
            f"{count:,} rows: {wall:.0f} s, {count / wall:,.0f} rows/s, {cpu:.0f} s of CPU, "
            f"peak memory {memory / 2**20:.0f} MiB"
        )


def noise_table(count: int, path: Path) -> None:
    rng = np.random.default_rng(0)
    schema = pa.schema(
        [("id", pa.string()), ("image", pa.binary()), *((name, pa.int8()) for name in ATTRIBUTES)]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, 10_000):
            size = min(10_000, count - start)
            pixels = rng.integers(0, 256, (size, 16, 16, 3), np.uint8)
            labels = (rng.random((40, size)) < 0.3).astype(np.int8)
            columns = {
                "id": [f"{start + index:09d}" for index in range(size)],
                "image": [encode_jpeg(image, 50) for image in pixels],
                **dict(zip(ATTRIBUTES, labels, strict=True)),
            }
            writer.write_table(pa.table(columns, schema))


def hashes(table: Path, images: Path, image_column: str, group_column: str) -> None:
    rows = read_table(table)
    groups = np.unique(rows[group_column].to_pylist(), return_inverse=True)[1]
    bits, copies = [], {name: [] for name in COPIES}
    for number, name in enumerate(rows[image_column].to_pylist()):
        image = decode_image((images / name).read_bytes())
        bits.append(hash_bits(image))
        if number % 10 == 0:
            for kind, change in COPIES.items():
                copies[kind].append(int((hash_bits(change(image)) != bits[-1]).sum()))
    print(f"bits of 256 between a picture and its copy, {len(copies['grey'])} pictures")
    for kind, found in copies.items():
        print(f"{kind:>21}: median {np.median(found):.0f}, 95 % {np.percentile(found, 95):.0f}")
    signs = np.where(bits, np.float32(1), np.float32(-1))
    ends = (0, 4, 20, 32, 40, 48, 56, 64)
    counts = np.zeros((len(ends) - 1, 2), int)
    for row in range(1, len(signs)):
        distance = (256 - signs[:row] @ signs[row]) / 2
        same = groups[:row] == groups[row]
        for column, chosen in enumerate((same, ~same)):
            counts[:, column] += np.histogram(distance[chosen], ends)[0]
    print(f"pairs of {len(signs)} pictures by bits between them: of one group, of two")
    for low, high, (one, two) in zip(ends, ends[1:], counts, strict=False):
        print(f"{f'{low} to {high - 1}':>21}: {one:6,} {two:6,}")


def hash_bits(image: np.ndarray) -> np.ndarray:
    return np.unpackbits(np.frombuffer(perceptual_hash(image), np.uint8)).astype(bool)


def shrink(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return cv2.resize(image, (width // 2, height // 2), interpolation=cv2.INTER_AREA)


def cut(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return image[height // 50 : -height // 50, width // 50 : -width // 50]


COPIES = {
    "half the size": shrink,
    "JPEG quality 40": lambda image: decode_image(encode_jpeg(image, 40)),
    "grey": lambda image: cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB),
    "20 % brighter": lambda image: cv2.convertScaleAbs(image, alpha=1.2),
    "2 % cut off all round": lambda image: np.ascontiguousarray(cut(image)),
}


def run(cfg: CurateConfig) -> tuple[float, float, int]:
    """Builds in a process of its own; returns seconds, CPU seconds and the peak memory of the
    largest process, in bytes."""
    command = [sys.executable, "-c", _BUILD, json.dumps(to_dict(cfg))]
    start = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the build failed; run it yourself: {cfg}")
    wall = time.monotonic() - start
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


_BUILD = """
import json, sys
from flip_jax.config import from_dict
from flip_jax.curate.config import CurateConfig
from flip_jax.curate.pipeline import build
build(from_dict(json.loads(sys.argv[1]), CurateConfig))
"""


if __name__ == "__main__":
    main()
