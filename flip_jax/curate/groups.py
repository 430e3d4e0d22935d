"""From finished parts to who is left out, who is in one group, and which split that is in."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flip_jax.curate.config import CurateConfig, DedupeConfig
from flip_jax.curate.dedupe import components, copies, near_pairs
from flip_jax.curate.parts import Part
from flip_jax.curate.split import split_of
from flip_jax.curate.storage import Work

STAGE = "dedupe"
KEPT = "kept"  # stage of a record in the status files
_PERSONS = 1 << 63  # nodes below are persons that the input names
# Words of a hash that are looked at: half of a SHA-256 tells a billion billion pictures apart.
_WORDS = {"pixel_hash": (2,), "perceptual_hash": (4,)}
SPLITS = ("train", "val", "test")

STATUS = pa.schema(
    [
        ("id", pa.string()),
        ("url", pa.string()),
        ("licence", pa.string()),
        ("source", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("pixel_sha256", pa.string()),
    ]
)


@dataclass
class Links:
    """What ties records together, or leaves them out.

    Attributes:
      dropped: int64, rows of a part by its place and the reason.
      edges: uint64 [E, 2], nodes of one group.
      names: of the persons among these nodes.
    """

    dropped: dict[tuple[int, int], dict[str, np.ndarray]]
    edges: np.ndarray
    names: dict[int, str]


@dataclass(frozen=True)
class Groups:
    """All links of a build. Every worker gets them: 16 bytes for each node, not an object.

    Attributes:
      dropped: as in `Links`.
      nodes: uint64 [M], those that are not alone, ascending.
      group: uint64 [M], the node that their group is named after.
      names: of the persons among these.
    """

    dropped: dict[tuple[int, int], dict[str, np.ndarray]]
    nodes: np.ndarray
    group: np.ndarray
    names: dict[int, str]

    def named(self, nodes: np.ndarray) -> list[str | None]:
        """The names of the groups of uint64 nodes; None where a node is alone."""
        if not len(self.nodes):
            return [None] * len(nodes)
        place = np.minimum(np.searchsorted(self.nodes, nodes), len(self.nodes) - 1)
        joined = (self.nodes[place] == nodes).tolist()
        groups = self.group[place].tolist()
        return [
            (self.names[group] if group < _PERSONS else f"same:{group:016x}") if found else None
            for found, group in zip(joined, groups, strict=True)
        ]


@dataclass(frozen=True)
class Settled:
    """The records of a part that stay, with their split; arrays have one row each.

    Attributes:
      part: its key.
      number: uint64, the order of the output.
      split: uint8, of `SPLITS`.
      offset, size: int64, in bytes, of the candidate in the part's file.
      groups: new group ids, by offset.
      counts: for the figures of the build.
    """

    part: str
    number: np.ndarray
    split: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    groups: dict[int, str]
    counts: dict[str, int]


class _Rows:
    """Columns of all records of a build, in the order of the input."""

    def __init__(self, work: Work, parts: Sequence[Part]):
        self.work = work
        self.parts = sorted(parts, key=lambda part: part.place)
        self.starts = np.cumsum([0, *(part.records for part in self.parts)])

    def numbers(self, *names: str) -> list[np.ndarray]:
        """Columns of numbers, uint64 [N], or of hashes, uint64 [N, words]."""
        found = [
            np.empty((int(self.starts[-1]), *_WORDS.get(name, ())), np.uint64) for name in names
        ]
        for part, start in zip(self.parts, self.starts.tolist(), strict=False):
            table = self.work.table(part.table, list(names)).slice(0, part.records)
            for name, array in zip(names, found, strict=True):
                values = array[start : start + part.records]
                if name in _WORDS:
                    data = b"".join(table[name].to_pylist())
                    words = np.frombuffer(data, "<u8").reshape(part.records, 4)
                    values[:] = words[:, : values.shape[1]]
                else:
                    values[:] = table[name].to_numpy()
        return found

    def by_part(self, rows: np.ndarray) -> Iterator[tuple[Part, np.ndarray]]:
        """Yields the parts of some rows, with the rows' numbers in them."""
        rows = np.sort(rows)
        parts = np.searchsorted(self.starts, rows, "right") - 1
        for part in np.unique(parts).tolist():
            yield self.parts[part], rows[parts == part] - self.starts[part]

    def links(
        self, nodes: np.ndarray, pairs: np.ndarray, dropped: dict[str, np.ndarray] | None = None
    ) -> Links:
        """Edges between the nodes of pairs of rows; `dropped` has rows by reason."""
        pairs = pairs[nodes[pairs[:, 0]] != nodes[pairs[:, 1]]]
        _, some = np.unique(nodes[pairs.ravel()], return_index=True)  # a row of each node
        rows = pairs.ravel()[some]
        names: dict[int, str] = {}
        for part, here in self.by_part(rows[nodes[rows] < _PERSONS]):
            table = self.work.table(part.table, ["node", "group"]).take(here)
            names.update(zip(*table.to_pydict().values(), strict=True))
        reasons: dict[tuple[int, int], dict[str, np.ndarray]] = defaultdict(dict)
        for reason, rows in (dropped or {}).items():
            for part, here in self.by_part(rows):
                reasons[part.place][reason] = here
        return Links(dict(reasons), np.unique(nodes[pairs], axis=0), names)


def find_copies(work: Work, parts: Sequence[Part], cfg: DedupeConfig) -> Links:
    """Ids that were there before, and equal pictures."""
    rows = _Rows(work, parts)
    number, pixel_hash, nodes = rows.numbers("number", "pixel_hash", "node")
    again, stays = copies(number, pixel_hash)
    equal = np.flatnonzero((stays >= 0) & (stays != np.arange(len(stays))))
    dropped = {"repeated id": np.flatnonzero(again)}
    if cfg.exact:
        dropped["equal picture"] = equal
    return rows.links(nodes, np.stack([equal, stays[equal]], axis=1), dropped)


def find_near(work: Work, parts: Sequence[Part], cfg: DedupeConfig, bands: Iterable[int]) -> Links:
    """Near duplicates that agree in one of some bands of their perceptual hashes."""
    rows = _Rows(work, parts)
    hashes, nodes = rows.numbers("perceptual_hash", "node")
    pairs = [near_pairs(hashes, band, cfg.max_distance) for band in bands]
    return rows.links(nodes, np.concatenate(pairs))


def join(found: Iterable[Links]) -> Groups:
    """Makes groups of links. A group with persons in it has the name of one of them, the same
    whatever the order of the input; one without is named by a hash."""
    dropped: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    names: dict[int, str] = {}
    edges = [np.zeros((0, 2), np.uint64)]
    for links in found:
        dropped |= links.dropped  # one of them alone has any
        names |= links.names
        edges.append(links.edges)
    nodes, group = components(np.concatenate(edges))
    persons = np.unique(group[group < _PERSONS]).tolist()
    return Groups(dropped, nodes, group, {person: names[person] for person in persons})


def settle(work: Work, part: Part, groups: Groups, cfg: CurateConfig) -> Settled:
    """Decides on the records of a part, and writes its status file."""
    table = work.table(part.table)
    kept = table.slice(0, part.records).to_pydict()
    dropped = {
        row: reason
        for reason, rows in groups.dropped.get(part.place, {}).items()
        for row in rows.tolist()
    }
    joined = groups.named(np.array(kept["node"], np.uint64))
    counts: Counter[str] = Counter(
        {f"{STAGE}/dropped: {reason}": 0 for reason in ("repeated id", "equal picture")}
    )
    new_groups, rows, splits, status = {}, [], [], []
    for row in range(part.records):
        group = kept["group"][row] or kept["id"][row]
        if joined[row] not in (None, group):
            new_groups[kept["offset"][row]] = group = joined[row]
        reason = dropped.get(row)
        split = None if reason else split_of(group, cfg.split)
        if reason is None:
            rows.append(row)
            splits.append(SPLITS.index(split))
        counts[f"{STAGE}/dropped: {reason}" if reason else f"{KEPT}/{split}"] += 1
        status.append(
            {
                **{name: kept[name][row] for name in ("id", "url", "licence", "source")},
                "stage": STAGE if reason else KEPT,
                "reason": reason,
                "group": group,
                "split": split,
                "pixel_sha256": kept["pixel_hash"][row].hex(),
            }
        )
    names = [name for name in STATUS.names if name in table.column_names and name != "group"]
    status += table.slice(part.records).select(names).to_pylist()
    with work.scratch() as folder:
        pq.write_table(pa.Table.from_pylist(status, STATUS), folder / "status")
        work.publish(folder / "status", "status/{:05d}-{:06d}.parquet".format(*part.place))
    rows = np.array(rows, np.int64)
    return Settled(
        part=part.key,
        number=np.array(kept["number"], np.uint64)[rows],
        split=np.array(splits, np.uint8),
        offset=np.array(kept["offset"], np.int64)[rows],
        size=np.array(kept["size"], np.int64)[rows],
        groups=new_groups,
        counts=dict(counts),
    )
