"""Sorting in files against sorting in memory, and the searches of a build within a bound of it."""

import gc
import json
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("apache_beam", reason="curation needs the extra `curate`")

from flip_jax.curate import links as links_module
from flip_jax.curate import storage
from flip_jax.curate.config import CurateConfig, DedupeConfig
from flip_jax.curate.groups import Groups, join, kept_name, settle
from flip_jax.curate.links import search, searches
from flip_jax.curate.order import SHARD_COLUMNS, count_groups, order, order_name
from flip_jax.curate.parts import TABLE, Part, id_number, node_number
from flip_jax.curate.sorter import Sorter, Spool, firsts
from flip_jax.curate.split import split_of
from flip_jax.curate.storage import Work

SEED = 0


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**64 - 1), st.integers(0, 2))),
    st.integers(1, 9),
    st.data(),
)
def test_sorting_in_files_is_sorting(tmp_path_factory, rows, limit, data):
    array = np.array(rows, np.uint64).reshape(-1, 3)
    sorter = Sorter(tmp_path_factory.mktemp("sort"), 3, limit)
    cut = data.draw(st.integers(0, len(rows)))
    sorter.add(array[:cut])
    sorter.add(array[cut:])
    blocks = list(sorter.sorted())
    assert [tuple(row) for block in blocks for row in block.tolist()] == sorted(rows)
    assert all(len(block) for block in blocks)


@pytest.mark.parametrize("kind", ["random", "equal", "descending"])
def test_runs_of_runs_are_merged(tmp_path, kind):
    """More runs than are merged at a time, of 10 rows each; a block is never larger."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2**64, (3000, 2), np.uint64)
    if kind == "equal":
        rows[:] = rows[0]
    elif kind == "descending":
        rows = np.sort(rows, axis=0)[::-1]
    sorter = Sorter(tmp_path, 2, limit=10)
    sorter.add(rows)
    blocks = list(sorter.sorted())
    np.testing.assert_array_equal(np.concatenate(blocks), rows[np.lexsort(rows.T[::-1])])
    assert max(map(len, blocks)) <= 10


def test_firsts_go_on_across_blocks():
    rows = np.array([[1, 5], [1, 6], [1, 7], [2, 1], [2, 1], [3, 0]], np.uint64)
    for cuts in ([], [1], [2, 3], [1, 2, 3, 4, 5]):
        found = list(firsts(np.split(rows, cuts), 1))
        new = np.concatenate([each for _, each, _ in found])
        first = np.concatenate([each for _, _, each in found])
        assert new.tolist() == [True, False, False, True, False, True]
        assert first.tolist() == rows[[0, 0, 0, 3, 3, 5]].tolist()


def test_a_spool_gives_back_its_rows(tmp_path):
    spool = Spool(tmp_path, 2)
    rows = np.arange(20, dtype=np.uint64).reshape(10, 2)
    spool.add(rows[:3])
    assert spool.read(1, 3).tolist() == rows[1:3].tolist()
    spool.add(rows[3:])
    assert [len(block) for block in spool.blocks(4)] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(list(spool.blocks(4))), rows)


def parts_of(work: Work, rows: list[dict], chunk: int) -> list[Part]:
    """Writes finished parts without their records."""
    parts = []
    for number, start in enumerate(range(0, len(rows), chunk)):
        some = rows[start : start + chunk]
        key = f"{number:064x}"
        table = pa.Table.from_pylist(some, TABLE)
        facts = json.dumps({"records": len(some), "counts": {}})
        with work.scratch() as folder:
            pq.write_table(table.replace_schema_metadata({"facts": facts}), folder / "table")
            work.publish(folder / "table", f"parts/{key}.parquet")
        parts.append(Part(key, key, (0, number), len(some)))
    return parts


def planted_rows(count: int) -> list[dict]:
    """Random hashes with repeated ids, copies, near copies, and persons under two names."""
    rng = np.random.default_rng(SEED)
    rows = []
    for index in range(count):
        pixels, looks = rng.bytes(32), rng.bytes(32)
        name = f"row {index}"
        if index > 10:
            other = rows[rng.integers(len(rows))]
            kind = rng.integers(6)
            if kind == 0:
                pixels, looks = other["pixel_hash"], other["perceptual_hash"]
            elif kind == 1:
                bits = np.unpackbits(np.frombuffer(other["perceptual_hash"], np.uint8))
                bits[rng.choice(256, 5, replace=False)] ^= 1
                looks = np.packbits(bits).tobytes()
            elif kind == 2:
                looks = other["perceptual_hash"]
            elif kind == 3 and index % 5 == 0:
                name = other["id"]
        group = f"p{rng.integers(count // 3)}" if rng.random() < 0.4 else None
        number = id_number(name)
        rows.append(
            {
                "id": name,
                "group": group,
                "number": number,
                "node": node_number(group or "", number),
                "pixel_hash": pixels,
                "perceptual_hash": looks,
                "offset": index % 100 * 10,
                "size": 10,
            }
        )
    return rows


def plain(rows: list[dict], max_distance: int) -> list[tuple[str | None, str]]:
    """The reason and the group of each row, by comparing each with each."""
    reasons: list[str | None] = [None] * len(rows)
    parent: dict[int, int] = {}

    def root(node: int) -> int:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    def union(first: dict, second: dict) -> None:
        low, high = sorted((root(first["node"]), root(second["node"])))
        if low != high:
            parent[high] = low

    seen, best = set(), {}
    for index, row in enumerate(rows):
        if row["id"] in seen:
            reasons[index] = "repeated id"
            continue
        seen.add(row["id"])
        before = best.get(row["pixel_hash"])
        if before is None or row["number"] < rows[before]["number"]:
            best[row["pixel_hash"]] = index
    for index, row in enumerate(rows):
        if reasons[index] is None and best[row["pixel_hash"]] != index:
            reasons[index] = "equal picture"
            union(row, rows[best[row["pixel_hash"]]])
    bits = np.unpackbits(
        np.array([np.frombuffer(row["perceptual_hash"], np.uint8) for row in rows]), axis=1
    )
    for index, row in enumerate(rows):
        for other in np.flatnonzero((bits[:index] != bits[index]).sum(axis=1) <= max_distance):
            union(row, rows[other])
    names = {row["node"]: row["group"] for row in rows if row["group"]}
    sizes: dict[int, set[int]] = {}
    for row in rows:
        sizes.setdefault(root(row["node"]), set()).add(row["node"])
    groups = []
    for row in rows:
        smallest = root(row["node"])
        if len(sizes[smallest]) == 1:
            groups.append(row["group"] or row["id"])
        else:
            groups.append(names.get(smallest) or f"same:{smallest:016x}")
    return list(zip(reasons, groups, strict=True))


@pytest.mark.parametrize("limit", [40, 100_000])
def test_searches_groups_and_order_are_those_of_plain_comparison(tmp_path, limit):
    work, rows = Work(str(tmp_path)), planted_rows(400)
    parts = parts_of(work, rows, 70)
    cfg = CurateConfig(dedupe=DedupeConfig(max_distance=12))
    found = [search(work, parts, cfg.dedupe, which, limit) for which in searches(cfg.dedupe)]
    wanted = plain(rows, 12)
    sizes = {"train": 0, "val": 0, "test": 0}
    with Groups(work, join(work, parts[::-1], found, limit)) as groups:
        for part in parts:
            for split, size in settle(work, part, groups, cfg).sizes.items():
                sizes[split] += size
    told = [
        (row["reason"], row["group"])
        for part in parts
        for row in pq.read_table(
            work.path("status/{:05d}-{:06d}.parquet".format(*part.place))
        ).to_pylist()
    ]
    assert told == wanted
    assert {reason for reason, _ in told} == {None, "repeated id", "equal picture"}
    assert sum(group.startswith("same:") for _, group in told) > 10
    kept = [
        (split_of(group, cfg.split), row["number"], index // 70, row["offset"], row["size"])
        for index, (row, (reason, group)) in enumerate(zip(rows, wanted, strict=True))
        if reason is None
    ]
    assert sum(sizes.values()) == 10 * len(kept)
    shards = {"train": 7, "val": 2, "test": 1}
    names = list(order(work, parts, shards, limit))
    assert names == sorted(names, key=lambda name: ("train val test".index(name[:2]), name))
    ordered = []
    for name in names:
        split, _, place = name.rpartition("-")
        for block in work.rows(order_name(name), SHARD_COLUMNS):
            for row in block:
                number, offset, size = (int(row[column]) for column in (0, 5, 6))
                assert number * shards[split] >> 64 == int(place)
                part = int(row[1:5].tobytes().hex(), 16)
                ordered.append((split, number, part, offset, size))
    places = {"train": 0, "val": 1, "test": 2}
    assert ordered == sorted(kept, key=lambda each: (places[each[0]], each[1]))
    split_groups = {(split_of(group, cfg.split), group) for reason, group in wanted if not reason}
    assert count_groups(work, parts, limit) == {
        split: count
        for split in places
        if (count := sum(each == split for each, _ in split_groups))
    }


def test_a_search_that_was_finished_is_not_done_again(tmp_path, monkeypatch):
    """What a kill leaves of the searches is found, and only where parts and settings are equal."""
    work = Work(str(tmp_path))
    parts, cfg = parts_of(work, planted_rows(100), 30), DedupeConfig()
    first = [search(work, parts, cfg, which) for which in searches(cfg)]
    name = join(work, parts, first)
    read = links_module._columns
    asked = []
    monkeypatch.setattr(links_module, "_columns", lambda *given: asked.append(1) or read(*given))
    assert [search(work, parts[::-1], cfg, which) for which in searches(cfg)] == first
    assert not asked
    before = work.read(name)
    assert join(work, parts, first[::-1]) == name and work.read(name) == before
    assert search(work, parts, DedupeConfig(max_distance=3), 0) not in first
    assert search(work, parts[:2], cfg, 0) not in first
    assert len(asked) == 2
    work.remove(first[2].edges)  # killed before this one was done
    assert search(work, parts, cfg, searches(cfg)[2]) == first[2]
    assert len(asked) == 3


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    """Peak bytes held by each of the searches, the groups and the order, for N and for 3 N rows,
    many of them copies; numpy's arrays count."""
    monkeypatch.setattr(storage, "_ROWS_AT_A_TIME", 500)
    peaks = {}
    for count in (4_000, 8_000, 24_000):  # the first one imports what is imported late
        work = Work(str(tmp_path / str(count)))
        parts = random_parts(work, count)
        peaks[count] = dict(_peaks(work, parts))
    growth = {name: peaks[24_000][name] - peaks[8_000][name] for name in peaks[8_000]}
    # 8 bytes for each of the 16,000 rows more would be 128,000.
    assert max(growth.values()) < 64_000, (peaks, growth)


def _peaks(work: Work, parts: list[Part]) -> Iterator[tuple[str, int]]:
    cfg, found = DedupeConfig(max_distance=2), []
    shards = {"train": len(parts), "val": 1, "test": 1}
    for name, call in {
        "copies": lambda: found.append(search(work, parts, cfg, -1, 500)),
        "near": lambda: found.append(search(work, parts, cfg, 0, 500)),
        "join": lambda: join(work, parts, found, 500),
        "order": lambda: list(order(work, parts, shards, 500)),
        "count": lambda: count_groups(work, parts, 500),
    }.items():
        gc.collect()
        tracemalloc.start()
        call()
        yield name, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


def random_parts(work: Work, count: int, chunk: int = 1000) -> list[Part]:
    """Parts as those of `parts_of`, made fast: every fourth row is a copy of the one before.

    Small ones: how much of a file is held at a time hangs on the threads of its reader.
    """
    rng = np.random.default_rng(SEED)
    parts = []
    for number in range(count // chunk):
        names = [f"{number * chunk + index}" for index in range(chunk)]
        numbers = rng.integers(0, 2**64, chunk, np.uint64)
        pixels, looks = (rng.integers(0, 256, (chunk, 32), np.uint8) for _ in range(2))
        pixels[3::4], looks[3::4] = pixels[2::4], looks[2::4]
        columns = {name: [None] * chunk for name in TABLE.names} | {
            "id": names,
            "number": numbers,
            "node": numbers >> np.uint64(1) | np.uint64(1 << 63),
            "pixel_hash": [row.tobytes() for row in pixels],
            "perceptual_hash": [row.tobytes() for row in looks],
            "offset": np.arange(chunk, dtype=np.uint64) * np.uint64(10),
            "size": np.full(chunk, 10, np.uint64),
        }
        key = f"{number:064x}"
        with work.scratch() as folder:
            pq.write_table(pa.table(columns, TABLE), folder / "table")
            work.publish(folder / "table", f"parts/{key}.parquet")
        parts.append(Part(key, key, (0, number), chunk))
        node = columns["node"]
        kept = [numbers, numbers % np.uint64(2), columns["offset"], columns["size"], node, node]
        work.write_rows(kept_name(parts[-1]), [np.stack(kept, axis=1).astype(np.uint64)])
    return parts
