"""Speed and memory of curation: its stages, a whole local build, and a build of very many rows.

    python benchmarks/curate.py stages [--pictures 400]
    python benchmarks/curate.py build [--pictures 8000]
    python benchmarks/curate.py rows [--rows 100000 1000000]
    python benchmarks/curate.py search [--rows 100000 1000000]
    python benchmarks/curate.py hashes --table faces.parquet --images photos --group-column person

`stages` gives pairs per CPU second of each stage, and captions per CPU second of the grammar.
`build` makes a data set with one worker process and with two, twice in turns, and compares the
shards.
`rows` is for the text: builds of some numbers of rows, in which each picture is 16 x 16 pixels of
noise, with the peak memory of each.
`search` is for what comes after the pictures, on tables of random hashes, a tenth of them copies:
the searches for equal pictures and for near duplicates (a quarter of them), groups and order, with
the peak memory before and after.
These draw their pictures: 615 x 615 px, the mean of LAION-Face, with a face of 285 x 285 px, the
mean of the paper's crops. The last line that they print is JSON, with the command to repeat it and
the load of the machine; CPU seconds, unlike the clock, mean much the same on a busy one.
`hashes` counts in how many bits perceptual hashes differ: of a picture and its copies, of pictures
of one person, of different people.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flip_jax.config import to_dict
from flip_jax.curate.align import ARCFACE_POINTS
from flip_jax.curate.config import (
    AttributesConfig,
    BeamConfig,
    CaptionsConfig,
    CurateConfig,
    FacesConfig,
    FetchConfig,
    InputConfig,
    OptOutConfig,
    OutputConfig,
)
from flip_jax.curate.faces import FaceStage
from flip_jax.curate.fetch import fetch_chunk
from flip_jax.curate.groups import kept_name
from flip_jax.curate.inputs import read_chunk, split_input
from flip_jax.curate.optout import OptOut
from flip_jax.curate.parts import Part, encode_candidate
from flip_jax.curate.pictures import perceptual_hash
from flip_jax.curate.stages import Place, Sample, Tally
from flip_jax.curate.storage import Work
from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.captions import captions
from flip_jax.data.drawn_faces import draw_face
from flip_jax.data.tables import read_table
from flip_jax.data.transforms import decode_image, encode_jpeg

SCENE, FACE = 615, 285  # pixels
RANDOM_ROWS = 10_000  # of a part of `search`
NOISE = 4  # grey levels, to tell pictures apart


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for run, option, default in (
        (stages, "--pictures", 400),
        (build, "--pictures", 8000),
        (rows, "--rows", [100_000, 1_000_000]),
        (search, "--rows", [100_000, 1_000_000]),
    ):
        command = commands.add_parser(run.__name__)
        several = "+" if isinstance(default, list) else None
        command.add_argument(option, type=int, default=default, dest="number", nargs=several)
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
        found = args.run(args.number, Path(folder))
    machine = {
        "cores": os.cpu_count(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "repeat": f"python benchmarks/curate.py {' '.join(sys.argv[1:])}",
    }
    print(json.dumps({"benchmark": f"curate {args.run.__name__}", **found, **machine}))


def draw(count: int, folder: Path) -> Path:
    """Writes photographs as JPEG and a table of them; returns the table. A hundred faces are drawn,
    the others are these with noise: drawing takes far longer than curation."""
    rng = np.random.default_rng(0)
    faces = [draw_face(seed=0, identity=number, picture=0, size=FACE) for number in range(100)]
    corner = (SCENE - FACE) // 2
    scene = cv2.resize(rng.integers(0, 256, (20, 20, 3), np.uint8), (SCENE, SCENE))
    labels, names = [], []
    for number in range(count):
        face = faces[number % len(faces)]
        scene[corner : corner + FACE, corner : corner + FACE] = face.image
        noise = rng.integers(-NOISE, NOISE + 1, (SCENE, SCENE, 1), np.int16)
        names.append(f"{number:06d}.jpg")
        image = np.clip(scene + noise, 0, 255).astype(np.uint8)
        (folder / names[-1]).write_bytes(encode_jpeg(image, 90))
        labels.append(face.attributes)
    columns = dict(zip(ATTRIBUTES, np.stack(labels, axis=1), strict=True))
    box = [[corner, corner, corner + FACE, corner + FACE]] * count
    pq.write_table(pa.table({"file": names, "box": box, **columns}), folder / "faces.parquet")
    return folder / "faces.parquet"


def config(table: Path, out: Path, faces: FacesConfig, **input_fields) -> CurateConfig:
    return CurateConfig(
        input=InputConfig(paths=str(table), **input_fields),
        faces=faces,
        attributes=AttributesConfig(min_labels=-1),
        output=OutputConfig(path=str(out)),
    )


def photographs(folder: Path, out: Path, chunk_rows: int) -> CurateConfig:
    """Boxes and labels are given, as in published data sets."""
    return config(
        folder / "faces.parquet",
        out,
        FacesConfig(detector="given"),
        images=str(folder),
        file_column="file",
        box_column="box",
        chunk_rows=chunk_rows,
    )


def stages(pictures: int, folder: Path) -> dict[str, Any]:
    from flip_jax.curate.pipeline import make_stages

    table = pq.read_table(draw(pictures, folder))
    names = table["file"].to_pylist()
    labels = np.stack([table[name].to_numpy() for name in ATTRIBUTES], axis=1).astype(np.int8)
    work, cfg = Work(str(folder / "work")), photographs(folder, folder / "out", 1000)
    rates: dict[str, float] = {}
    total, tally = 0.0, Tally()

    def told(name: str, seconds: float, count: int = pictures) -> float:
        rates[name] = round(count / seconds, -1 if count / seconds > 100 else 0)
        print(f"{rates[name]:12,.0f}  {name}", flush=True)
        return seconds

    size = np.mean([(folder / name).stat().st_size for name in names])
    print(
        f"per CPU second, {pictures} pictures of {SCENE} x {SCENE} px, {size:,.0f} bytes; best of 5"
    )
    told("fetch, from a server on this machine", fetch(names, folder, work))
    (chunk,) = split_input(work, str(folder / "faces.parquet"), 0, "", cfg.input)
    read = partial(read_chunk, work, chunk, cfg.batch_rows, {}, tally)
    total += told("input", best(lambda: list(read())))
    samples = [sample for batch in read() for sample in batch]
    for stage in make_stages(cfg, work):
        stage.setup()
        if stage.name == "faces":
            detectors(samples, told)
        total += told(stage.name, best(partial(stage.process, samples, tally)))
        samples = stage.process(samples, tally)
    assert len(samples) == pictures, tally.counts
    total += told("encode record", best(lambda: [encode_candidate(sample) for sample in samples]))
    told("all from input to record, without fetch", total)
    grammar = best(lambda: [captions(row, 0, 5) for row in labels])
    told("captions of the grammar, five for each picture", grammar, 5 * pictures)
    return {"pictures": pictures, "picture_bytes": round(size), "per_cpu_second": rates}


def detectors(samples: list[Sample], told: Callable[[str, float], float]) -> None:
    """What crops cost that are not of given boxes alone."""
    # The eyes, nose and mouth of a face that is a little turned.
    points = (ARCFACE_POINTS / 112 * FACE + (SCENE - FACE) / 2) @ np.array([[1, 0.1], [-0.1, 1]])
    aligned = [replace(sample, landmarks=points.astype(np.float32)) for sample in samples]
    for name, faces, some in (
        ("faces: aligned by five given points", FacesConfig(detector="given"), aligned),
        ("faces: found by OpenCV's cascade", FacesConfig(detector="opencv"), samples),
    ):
        stage = FaceStage(faces)
        stage.setup()
        told(name, best(partial(stage.process, some, Tally()), rounds=2))


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


def build(pictures: int, folder: Path) -> dict[str, Any]:
    draw(pictures, folder)
    runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    shards = []
    for turn in range(2):
        for workers in (1, 2):
            out = folder / f"{turn}-{workers}"
            cfg = photographs(folder, out, max(pictures // 40, 1))
            runs[workers].append(run(replace(cfg, beam=BeamConfig(workers=workers))))
            print(f"{workers} workers: {json.dumps(runs[workers][-1])}", flush=True)
            shards.append([file.read_bytes() for file in sorted(out.glob("*.array_record"))])
    assert shards[0] and all(each == shards[0] for each in shards), "shards differ"
    wall, cpu = (
        {workers: min(each[kind] for each in found) for workers, found in runs.items()}
        for kind in ("wall_s", "cpu_s")
    )
    rates = {str(workers): round(pictures / seconds) for workers, seconds in wall.items()}
    return {
        "pictures": pictures,
        "pairs_per_second": rates,
        "pairs_per_cpu_second": {str(n): round(pictures / seconds) for n, seconds in cpu.items()},
        "two_workers_against_one": round(wall[1] / wall[2], 2),
        "runs": {str(workers): found for workers, found in runs.items()},
        "shards": "the same in all runs",
    }


def rows(numbers: list[int], folder: Path) -> dict[str, Any]:
    found = {}
    for count in numbers:
        table = folder / f"{count}.parquet"
        noise_table(count, table)
        out = folder / f"out-{count}"
        whole = FacesConfig(detector="whole", min_side=8)
        cfg = config(table, out, whole, image_column="image", id_column="id")
        # As many records in a shard as there are of whole crops in one of the usual size.
        output = replace(cfg.output, shard_bytes=8 * 2**20)
        found[str(count)] = run(replace(cfg, captions=CaptionsConfig(count=1), output=output))
        found[str(count)]["rows_per_cpu_second"] = round(count / found[str(count)]["cpu_s"])
        print(f"{count:,} rows: {json.dumps(found[str(count)])}", flush=True)
    return {"rows": found}


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


def search(numbers: list[int], folder: Path) -> dict[str, Any]:
    found = {}
    for count in numbers:
        place = folder / str(count)
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            found[str(count)] = process.submit(search_rows, count, place).result()
        print(f"{count:,} rows: {json.dumps(found[str(count)])}", flush=True)
    return {"rows": found}


def search_rows(count: int, folder: Path) -> dict[str, float]:
    from flip_jax.curate import groups, links, order

    work, cfg = Work(str(folder)), CurateConfig()
    parts = [random_part(work, number) for number in range(count // RANDOM_ROWS)]
    start, before = time.process_time(), peak_mib()
    found = [links.search(work, parts, cfg.dedupe, which) for which in (links.COPIES, 0)]
    groups.join(work, parts, found)
    assert len(list(order.order(work, parts, {"train": max(count // 9000, 1)})))
    order.count_groups(work, parts)
    seconds = time.process_time() - start
    return {"start_mib": before, "peak_mib": peak_mib(), "cpu_s": round(seconds, 1)}


def peak_mib() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def random_part(work: Work, place: int) -> Part:
    """The tables of a finished part without its pictures."""
    rng = np.random.default_rng(place)
    number = rng.integers(0, 2**64, RANDOM_ROWS, np.uint64)
    node = number >> np.uint64(1) | np.uint64(1 << 63)
    index = np.arange(RANDOM_ROWS, dtype=np.uint64)
    pixels, looks = (rng.integers(0, 256, (RANDOM_ROWS, 32), np.uint8) for _ in range(2))
    pixels[9::10], looks[9::10] = pixels[8::10], looks[8::10]
    part = Part(f"{place:064x}", "", (0, place), RANDOM_ROWS)
    columns = {
        "number": number,
        "node": node,
        "group": pa.nulls(RANDOM_ROWS, pa.string()),
        "pixel_hash": pa.array([row.tobytes() for row in pixels], pa.binary(32)),
        "perceptual_hash": pa.array([row.tobytes() for row in looks], pa.binary(32)),
    }
    with work.scratch() as scratch:
        pq.write_table(pa.table(columns), scratch / "table")
        work.publish(scratch / "table", part.table)
    kept = [number, 0 * index, 10 * index, 0 * index + 10, node, number]
    work.write_rows(kept_name(part), [np.stack(kept, axis=1)])
    return part


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


def run(cfg: CurateConfig) -> dict[str, float]:
    """Builds in a process of its own; seconds, CPU seconds of it and its workers, and the peak
    memory of the largest process."""
    command = [sys.executable, "-c", _BUILD, json.dumps(to_dict(cfg))]
    start = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the build failed; run it yourself: {cfg}")
    return {
        "wall_s": round(time.monotonic() - start, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "load": round(os.getloadavg()[0], 1),
    }


_BUILD = """
import json, sys
from flip_jax.config import from_dict
from flip_jax.curate.config import CurateConfig
from flip_jax.curate.pipeline import build
build(from_dict(json.loads(sys.argv[1]), CurateConfig))
"""


if __name__ == "__main__":
    main()
