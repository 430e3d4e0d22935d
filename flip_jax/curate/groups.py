"""From links to who is left out, who is in one group, and which split that is in."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flip_jax.curate.config import CurateConfig
from flip_jax.curate.dedupe import Edges
from flip_jax.curate.links import FOLDER, REASONS, Links
from flip_jax.curate.parts import Part, id_number
from flip_jax.curate.sorter import LIMIT
from flip_jax.curate.split import split_of
from flip_jax.curate.stages import fingerprint
from flip_jax.curate.storage import Work, is_local, open_file

STAGE = "dedupe"
KEPT = "kept"  # stage of a record in the status files
_PERSONS = 1 << 63  # nodes below are persons that the input names
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

# SQLite's numbers have a sign: nodes are the same 64 bits as int64, persons from 0 up.
_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE joined (node INTEGER PRIMARY KEY, smallest INTEGER NOT NULL);
CREATE TABLE persons (node INTEGER PRIMARY KEY, name TEXT);
CREATE TABLE dropped (row INTEGER PRIMARY KEY, reason INTEGER NOT NULL);
CREATE TABLE parts (file INTEGER, chunk INTEGER, start INTEGER NOT NULL, PRIMARY KEY (file, chunk));
"""


def join(work: Work, parts: Sequence[Part], found: Iterable[Links], limit: int = LIMIT) -> str:
    """Makes groups of links, or finds them made. A group with persons in it has the name of one of
    them, the same whatever the order of the input; one without is named by a hash.

    Args:
      found: of all searches.
      limit: links in memory.

    Returns:
      The name of a file for `Groups`.
    """
    found = sorted(found, key=lambda links: links.edges)
    name = f"{FOLDER}/{fingerprint([links.edges for links in found])}.groups"
    if not work.exists(name):
        with work.scratch() as folder:
            edges = Edges(folder, limit)
            for links in found:
                for rows in work.rows(links.edges, 2):
                    edges.add(rows)
            with ExitStack() as stack:
                store = sqlite3.connect(folder / "groups", isolation_level=None)
                stack.callback(store.close)
                store.executescript(_TABLES)
                store.execute("BEGIN")
                _fill(store, work, parts, edges, found)
                store.execute("COMMIT")
            work.publish(folder / "groups", name)
    return name


def _fill(
    store: sqlite3.Connection,
    work: Work,
    parts: Sequence[Part],
    edges: Edges,
    found: Sequence[Links],
) -> None:
    start = 0
    for part in sorted(parts, key=lambda part: part.place):
        store.execute("INSERT INTO parts VALUES (?, ?, ?)", (*part.place, start))
        start += part.records
    for links in found:
        for rows in work.rows(links.dropped, 2) if links.dropped else ():
            store.executemany("INSERT INTO dropped VALUES (?, ?)", rows.tolist())
    for rows in edges.components():
        signed = rows.view(np.int64).tolist()
        store.executemany("INSERT OR IGNORE INTO joined VALUES (?, ?)", signed)
    store.execute(
        "INSERT INTO persons (node) SELECT DISTINCT smallest FROM joined WHERE smallest >= 0"
    )
    (nameless,) = store.execute("SELECT count(*) FROM persons").fetchone()
    for part in parts:
        if not nameless:
            return
        table = work.table(part.table, ["node", "group"]).slice(0, part.records)
        names = dict(zip(*table.to_pydict().values(), strict=True))
        persons = json.dumps([node for node in names if node < _PERSONS])
        query = f"SELECT node FROM persons WHERE name IS NULL AND {_AMONG}"
        named = [(names[node], node) for (node,) in store.execute(query, [persons]).fetchall()]
        store.executemany("UPDATE persons SET name = ? WHERE node = ?", named)
        nameless -= len(named)


_AMONG = "node IN (SELECT value FROM json_each(?))"


class Groups(ExitStack):
    """What the searches found, in an SQLite file: of the nodes that are not alone and the rows that
    are left out, in whatever number, a few pages are in memory.

    Args:
      name: from `join`. A file on a far disk is copied to a local one.
    """

    def __init__(self, work: Work, name: str):
        super().__init__()
        path = work.path(name)
        if not is_local(path):
            copy = self.enter_context(work.scratch()) / "groups"
            with open_file(path) as source, open(copy, "wb") as sink:
                shutil.copyfileobj(source, sink, 16 * 2**20)
            path = str(copy)
        # Immutable: no locks, which network disks may lack. Beam may go on in another thread.
        place = f"file:{quote(str(Path(path).absolute()))}?immutable=1"
        self._store = sqlite3.connect(place, uri=True, check_same_thread=False)
        self.callback(self._store.close)

    def named(self, nodes: np.ndarray) -> list[str | None]:
        """The names of the groups of uint64 nodes; None where a node is alone."""
        signed = nodes.view(np.int64).tolist()
        query = (
            "SELECT joined.node, smallest, name FROM joined LEFT JOIN persons "
            f"ON persons.node = smallest WHERE joined.{_AMONG}"
        )
        names = {
            node: f"same:{smallest % 2**64:016x}" if name is None else name
            for node, smallest, name in self._store.execute(query, [json.dumps(signed)])
        }
        return [names.get(node) for node in signed]

    def dropped(self, part: Part) -> dict[int, str]:
        """The rows of a part that are left out, and why."""
        query = "SELECT start FROM parts WHERE file = ? AND chunk = ?"
        (start,) = self._store.execute(query, part.place).fetchone()
        query = "SELECT row, reason FROM dropped WHERE row >= ? AND row < ?"
        rows = self._store.execute(query, (start, start + part.records))
        return {row - start: REASONS[reason] for row, reason in rows}


@dataclass(frozen=True)
class Settled:
    """What became of the records of a part.

    Attributes:
      sizes: bytes of the records that stay, by split.
      counts: for the figures of the build.
    """

    sizes: dict[str, int]
    counts: dict[str, int]


# Columns of `kept_name`: the number of a record that stays, which of SPLITS, where its candidate is
# in the part's file, its node, and a hash of its group.
KEPT_COLUMNS = ("number", "split", "offset", "size", "node", "group")


def kept_name(part: Part) -> str:
    """The file of the records of a part that stay: uint64 [N, len(KEPT_COLUMNS)]."""
    return "{}/kept-{:05d}-{:06d}".format(FOLDER, *part.place)


def settle(work: Work, part: Part, groups: Groups, cfg: CurateConfig) -> Settled:
    """Decides on the records of a part, and writes its status file and what stays of it."""
    table = work.table(part.table)
    kept = table.slice(0, part.records).to_pydict()
    dropped = groups.dropped(part)
    joined = groups.named(np.array(kept["node"], np.uint64))
    counts: Counter[str] = Counter({f"{STAGE}/dropped: {reason}": 0 for reason in REASONS})
    sizes: Counter[str] = Counter()
    rows, status = [], []
    for row in range(part.records):
        group = joined[row] or kept["group"][row] or kept["id"][row]
        reason = dropped.get(row)
        split = None if reason else split_of(group, cfg.split)
        if reason is None:
            place = [kept[name][row] for name in ("offset", "size", "node")]
            rows.append([kept["number"][row], SPLITS.index(split), *place, id_number(group)])
            sizes[split] += kept["size"][row]
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
    stays = np.array(rows, np.uint64).reshape(-1, len(KEPT_COLUMNS))
    work.write_rows(kept_name(part), [stays])
    return Settled(dict(sizes), dict(counts))
