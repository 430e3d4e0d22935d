"""Speed and recall of search: of the index alone, and of the whole server.

    python benchmarks/search.py index [--vectors 100000] [--dim 256] [--kind surface]
    python benchmarks/search.py server --index index --checkpoint runs/demo [--faces 100000]

`index` makes unit vectors, builds the graph and asks one query at a time on one thread: recall@10
against comparing with all, queries per second and 95th percentile, without a filter and under
filters that leave 50, 10 and 1 %, the last of which nearly every query contradicts.
`--kind surface`: near a curved surface of 40 dimensions, queries beside it, as the texts of a model
lie beside its pictures; `--kind sphere`: no structure at all, the hardest there is.
`server` starts the server of an index in a process of its own, the index blown up to --faces with
copies of its vectors that are moved a little; so many users send descriptions, one after the other
each.

Both print JSON. `cpu_ms` is CPU time per query: on a busy machine it says more than the clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flip_jax.search import index as index_module
from flip_jax.search.index import (
    FaceIndex,
    Manifest,
    compare,
    least_effort,
    new_graph,
    recall,
    write_index,
)

QUERIES = 1000
COUNT = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("index")
    command.add_argument("--vectors", type=int, default=100_000)
    command.add_argument("--dim", type=int, default=256)
    command.add_argument("--kind", choices=["surface", "sphere"], default="surface")
    command.set_defaults(run=bench_index)
    command = commands.add_parser("server")
    command.add_argument("--index", type=Path, required=True)
    command.add_argument("--checkpoint", type=Path, required=True)
    command.add_argument("--faces", type=int, default=100_000)
    command.add_argument("--users", type=int, default=50)
    command.add_argument("--seconds", type=float, default=20.0)
    command.set_defaults(run=bench_server)
    args = vars(parser.parse_args())
    args.pop("run")(**args)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def make_vectors(kind: str, count: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors [count, dim], queries [QUERIES, dim], and a coordinate [count] that filters cut."""
    rng = np.random.default_rng(0)
    if kind == "sphere":
        rows = unit(rng.normal(size=(count, dim)))
        return rows, unit(rng.normal(size=(QUERIES, dim))), rows[:, 0]
    first, second = rng.normal(size=(40, 128)), rng.normal(size=(128, dim))
    aside = 6 * rng.normal(size=dim)
    latent = rng.normal(size=(count, 40))
    asked = latent[rng.integers(count, size=QUERIES)] + 0.5 * rng.normal(size=(QUERIES, 40))

    def surface(points: np.ndarray) -> np.ndarray:
        noise = 2 * rng.normal(size=(len(points), dim))
        return np.tanh(points @ first / 6) @ second + noise

    return unit(surface(latent)), unit(surface(asked) + aside), latent[:, 0]


def timed(ask: Callable[[np.ndarray], np.ndarray], queries: np.ndarray) -> tuple[dict, np.ndarray]:
    """Speed of `ask`, one query at a time, and what it found [Q, COUNT]."""
    found, spent, cpu = [], [], time.process_time()
    for query in queries:
        start = time.perf_counter()
        found.append(ask(query))
        spent.append(time.perf_counter() - start)
    cpu = time.process_time() - cpu
    speed = {
        "queries_per_s": round(len(spent) / sum(spent), 1),
        "p95_ms": round(1e3 * float(np.quantile(spent, 0.95)), 2),
        "cpu_ms": round(1e3 * cpu / len(spent), 3),
    }
    return speed, np.stack(found)


def bench_index(vectors: int, dim: int, kind: str) -> None:
    rows, queries, coordinate = make_vectors(kind, vectors, dim)
    report = {"vectors": vectors, "dim": dim, "kind": kind, "faiss": faiss.__version__}
    with tempfile.TemporaryDirectory() as kept:
        start, cpu = time.perf_counter(), time.process_time()
        graph = new_graph(dim)
        graph.add(rows)
        report["build_s"] = round(time.perf_counter() - start, 1)
        report["build_cpu_s"] = round(time.process_time() - cpu, 1)
        effort = least_effort(graph, queries[: QUERIES // 5])
        folder = Path(kept, "index")
        write_index(folder, graph, *_labels(rows, coordinate), _manifest(vectors, dim, effort))
        index = FaceIndex(folder)
    report["effort"] = index.manifest.effort
    faiss.omp_set_num_threads(1)
    # Not those that the effort was chosen with.
    asked = queries[QUERIES // 5 :]
    exact, nearest = timed(lambda q: compare(index._graph, q[None], COUNT)[1][0], asked[:200])
    report["exact"] = exact
    speed, found = timed(lambda q: index.search(q, COUNT)[0], asked)
    nearest = compare(index._graph, asked, COUNT)[1]
    report["all"] = speed | {"recall@10": round(recall(found, nearest), 4)}
    for name, allowed in _filters(index).items():
        report[name] = _filtered(index, asked, allowed)
    print(json.dumps(report))


def _labels(rows: np.ndarray, coordinate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    attributes = np.zeros((40, len(rows)), np.int8)
    for place, share in enumerate((0.5, 0.1, 0.01)):
        attributes[place] = coordinate > np.quantile(coordinate, 1 - share)
    return attributes, np.arange(len(rows))


def _filters(index: FaceIndex) -> dict[str, np.ndarray]:
    names = ("50 %", "10 %", "1 %")
    return {name: index.attributes[place] == 1 for place, name in enumerate(names)}


def _filtered(index: FaceIndex, queries: np.ndarray, allowed: np.ndarray) -> dict:
    """Under a filter, as it is; and with a walk wherever there is a choice."""
    selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
    nearest = compare(index._graph, queries, COUNT, selector)[1]
    speed, found = timed(lambda q: index.search(q, COUNT, allowed)[0], queries)
    assert allowed[found].all(), "a face that the filter excludes"
    kept, index_module.EXACT_FILTERED = index_module.EXACT_FILTERED, 0
    walked, by_walk = timed(lambda q: index.search(q, COUNT, allowed)[0], queries)
    index_module.EXACT_FILTERED = kept
    assert allowed[by_walk].all(), "a face that the filter excludes"
    return speed | {
        "recall@10": round(recall(found, nearest), 4),
        "if walked": walked | {"recall@10": round(recall(by_walk, nearest), 4)},
    }


def _manifest(vectors: int, dim: int, effort: int) -> Manifest:
    return Manifest(
        checkpoint="none",
        checkpoint_step=0,
        checkpoint_digest="none",
        data="none",
        data_hash="none",
        split="none",
        faces=vectors,
        effort=effort,
        left_out=0,
        embed_dim=dim,
        examples=index_module.Examples(),
    )


def blow_up(index: Path, faces: int, target: Path) -> Manifest:
    """Writes an index of `faces` vectors that are those of `index` and others beside them."""
    small = FaceIndex(index)
    rng = np.random.default_rng(0)
    vectors = np.stack([small.vector(face) for face in range(len(small))])
    source = np.arange(faces) % len(small)
    moved = (
        0.05 * rng.normal(size=(faces, vectors.shape[1])) * (source != np.arange(faces))[:, None]
    )
    graph = new_graph(vectors.shape[1])
    graph.add(unit(vectors[source] + moved))
    manifest = small.manifest
    manifest.faces, manifest.effort = faces, least_effort(graph, vectors[:200])
    write_index(target, graph, small.attributes[:, source], small.records[source], manifest)
    return manifest


def bench_server(index: Path, checkpoint: Path, faces: int, users: int, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manifest = blow_up(index, faces, Path(folder, "index"))
        _bench_server(Path(folder, "index"), manifest, checkpoint, users, seconds)


def _bench_server(
    index: Path, manifest: Manifest, checkpoint: Path, users: int, seconds: float
) -> None:
    command = [sys.executable, "-m", "flip_jax.search", "serve", "--port", "0"]
    command += ["--index", str(index), "--checkpoint", str(checkpoint)]
    report = {"faces": manifest.faces, "dim": manifest.embed_dim, "users": users}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            captions = manifest.examples.captions
            if not captions:
                raise SystemExit("error: --index: its faces have no captions to ask for")
            address = _address(process)
            for name, rerank in (("cosine", False), ("re-ranked", True)):
                before = _cpu_seconds(process.pid)
                asking = _ask_all(address, captions, users, seconds, rerank)
                start = time.perf_counter()
                spent = sorted(asyncio.run(asking))
                passed = time.perf_counter() - start  # until the last of them was answered
                cpu = _cpu_seconds(process.pid) - before
                report[name] = {
                    "queries_per_s": round(len(spent) / passed, 1),
                    "p95_ms": round(1e3 * spent[int(0.95 * len(spent))], 1),
                    "cpu_ms": round(1e3 * cpu / len(spent), 2),
                }
        finally:
            process.terminate()
    print(json.dumps(report))


def _address(server: subprocess.Popen) -> str:
    """Where it listens, which it prints."""
    for line in server.stdout:
        if found := re.search(r"http://\S+/", line):
            return found[0]
    raise SystemExit(f"error: the server ended with exit status {server.wait()} before it listened")


async def _ask_all(
    address: str, captions: list[str], users: int, seconds: float, rerank: bool
) -> list[float]:
    """Seconds that each query took."""
    from aiohttp import ClientSession, TCPConnector

    spent, deadline = [], time.perf_counter() + seconds

    async def user(session: ClientSession, number: int) -> None:
        while (start := time.perf_counter()) < deadline:
            query = {"text": captions[number % len(captions)], "rerank": rerank}
            async with session.post(address + "api/search", json=query) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()
            spent.append(time.perf_counter() - start)
            number += 1

    async with ClientSession(connector=TCPConnector(limit=0)) as session:
        await asyncio.gather(*(user(session, number) for number in range(users)))
    return spent


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
