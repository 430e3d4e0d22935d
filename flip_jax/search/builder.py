"""Building an index: embed every record, join the embeddings in a graph, put it in place.

The embeddings, which take longest, go to a file beside the target as they are made. A build that
was stopped goes on there; the index appears whole, by a rename, or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import faiss
import numpy as np
from tqdm import tqdm

from flip_jax.api import FlipModel
from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.records import BadRecord, Record, RecordSource
from flip_jax.data.transforms import BadImage
from flip_jax.search.identity import weights_digest
from flip_jax.search.index import (
    MANIFEST,
    Examples,
    Manifest,
    least_effort,
    new_graph,
    write_index,
)
from flip_jax.weights import read_tokenizer, read_weights

_BATCH = 64  # pictures embedded at a time
_GRAPH_BLOCK = 10_000  # vectors added at a time
_SAMPLED = 200  # records whose captions try the graph and serve as examples
_EXAMPLES = 6  # of each kind
_LONGEST_EXAMPLE = 120  # characters


def build_index(
    checkpoint: Path,
    data: Path,
    split: str,
    out: Path,
    *,
    overwrite: bool = False,
    max_bad_fraction: float = 0.01,
    threads: int = 2,
) -> Manifest:
    """Embeds the pictures of a split and writes an index of them.

    Args:
      checkpoint: as `flip_jax.load` takes it, on this machine.
      data: a data set; split: which part of it.
      out: folder to make.
      overwrite: replace an index in `out`.
      max_bad_fraction: share of unreadable records above which nothing is written.
      threads: read and decode so many pictures at a time, and build the graph.

    Raises:
      ValueError: `out` is in the way, too many unreadable records, an unknown split, or a
        checkpoint that is no whole model.
      OSError: something cannot be read or written, or another build of `out` is running.
    """
    if not 0 <= max_bad_fraction <= 1 or threads < 1:
        raise ValueError(
            f"max_bad_fraction is {max_bad_fraction}, allowed 0 to 1; threads is {threads}, "
            "allowed 1 or more"
        )
    _check_target(out, overwrite)
    source = RecordSource(data, split)
    weights = read_weights(checkpoint)
    model = FlipModel(weights, read_tokenizer(checkpoint, weights), batch_size=_BATCH)
    made_from = {
        "checkpoint_digest": weights_digest(weights),
        "data_hash": source.manifest_hash,
        "split": split,
        "embed_dim": model.cfg.model.embed_dim,
    }
    partial = out.absolute().with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with _Rows(partial, made_from) as rows:
        _embed(source, model, rows, threads)
        table = rows.table()
        left_out = len(source) - len(table)
        if left_out > max_bad_fraction * len(source) or not len(table):
            raise ValueError(
                f"{left_out} of {len(source)} records of {data} cannot be read (allowed: "
                f"{max_bad_fraction:.2%}); `python -m flip_jax.data verify {data}` names them"
            )
        faiss.omp_set_num_threads(threads)
        graph = _graph(table["embedding"])
        examples, queries = _sample(source, table, model)
        manifest = Manifest(
            **made_from,
            checkpoint=str(checkpoint.absolute()),
            checkpoint_step=model.step,
            data=str(data.absolute()),
            faces=len(table),
            effort=least_effort(graph, queries),
            left_out=left_out,
            examples=examples,
        )
        finished = partial / "finished"
        shutil.rmtree(finished, ignore_errors=True)
        attributes = np.ascontiguousarray(table["attributes"].T)
        write_index(finished, graph, attributes, np.array(table["record"]), manifest)
        _check_target(out, overwrite)  # again: what came there meanwhile is not this one's
        _put_in_place(finished, out, partial / "replaced")
        shutil.rmtree(partial)  # while it is held: the next build begins with a folder of its own
    return manifest


def _put_in_place(finished: Path, out: Path, replaced: Path) -> None:
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    finished.rename(out)


def _check_target(out: Path, overwrite: bool) -> None:
    """Before the work, too: the index takes this place by a rename."""
    if out.exists() and (out.samefile(".") or os.path.ismount(out)):
        raise ValueError(f"{out} cannot be replaced: name a folder to be made, such as {out}/index")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{out} exists; choose another folder or give --overwrite")
    if not (out / MANIFEST).is_file():
        raise ValueError(f"{out} is no index, so it is not replaced; choose another folder")


class _Rows:
    """The embeddings so far, in a file of rows of one size; only one build may hold it."""

    def __init__(self, folder: Path, made_from: dict[str, str | int]):
        self._made_from, self._about = made_from, folder / "made_from.json"
        self._path = folder / "rows"
        self.dtype = np.dtype(
            [
                ("record", "<i8"),
                ("attributes", "i1", len(ATTRIBUTES)),
                ("embedding", "<f4", made_from["embed_dim"]),
            ]
        )

    def __enter__(self) -> _Rows:
        self._file = open(self._path, "ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise OSError(f"another process is building into {self._path.parent}") from error
        if not self._is_in_place():
            self._file.close()
            raise OSError(f"another build into {self._path.parent} has just ended; start again")
        same = False
        with contextlib.suppress(OSError, ValueError):  # none yet, or a part of it
            same = json.loads(self._about.read_text()) == self._made_from
        # A process that is killed can leave a part of a row.
        kept = self._file.tell() // self.dtype.itemsize if same else 0
        self._file.truncate(kept * self.dtype.itemsize)
        self._about.write_text(json.dumps(self._made_from))
        return self

    def _is_in_place(self) -> bool:
        """Whether the file is still there: the build that held it removes it at its end."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def next_record(self) -> int:
        """Number of the first record that was not looked at; bad ones at the end look new."""
        table = self.table()
        return int(table["record"][-1]) + 1 if len(table) else 0

    def append(self, rows: np.ndarray) -> None:
        self._file.write(rows.tobytes())
        self._file.flush()

    def table(self) -> np.ndarray:
        """All rows, mapped from disk; [n] of `dtype`."""
        if not self._path.stat().st_size:
            return np.zeros(0, self.dtype)
        return np.memmap(self._path, self.dtype, "r")


def _embed(source: RecordSource, model: FlipModel, rows: _Rows, threads: int) -> None:
    """Appends the rows of all records that are not there yet."""
    first = rows.next_record()
    numbers = iter(range(first, len(source)))

    def prepare(number: int) -> tuple[int, np.ndarray, np.ndarray] | None:
        try:
            record = source[number]
            return number, record.attributes, model.preprocess(record.image)[0]
        except (BadRecord, BadImage) as error:
            tqdm.write(f"left out: {source.where(number)}: {error}")
            return None

    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(source), initial=first, desc="embed", disable=None) as bar,
    ):

        def batches() -> Iterator[Iterator]:
            while chunk := list(islice(numbers, _BATCH)):
                yield pool.map(prepare, chunk)

        ahead, waiting = batches(), []
        while waiting.extend(islice(ahead, 2 - len(waiting))) or waiting:
            batch = list(waiting.pop(0))
            good = [item for item in batch if item is not None]
            block = np.zeros(len(good), rows.dtype)
            if good:
                block["record"], block["attributes"], images = zip(*good, strict=True)
                block["embedding"] = model.encode_image(np.stack(images))
            if not np.isfinite(block["embedding"]).all():
                raise ValueError(
                    "the model gives embeddings that are not finite; its training went wrong"
                )
            rows.append(block)
            bar.update(len(batch))


def _graph(embeddings: np.ndarray) -> faiss.IndexHNSWFlat:
    graph = new_graph(embeddings.shape[1])
    with tqdm(total=len(embeddings), desc="graph", disable=None) as bar:
        for start in range(0, len(embeddings), _GRAPH_BLOCK):
            block = np.ascontiguousarray(embeddings[start : start + _GRAPH_BLOCK])
            graph.add(block)
            bar.update(len(block))
    return graph


def _sample(
    source: RecordSource, table: np.ndarray, model: FlipModel
) -> tuple[Examples, np.ndarray]:
    """Examples, and vectors [Q, E] to try the graph with: captions, or pictures without any."""
    rng = np.random.default_rng(0)
    faces = rng.permutation(len(table))[:_SAMPLED].tolist()
    records: list[Record] = [source[int(table["record"][face])] for face in faces]
    captions = [record.captions[0] for record in records if record.captions]
    short = [text for text in dict.fromkeys(captions) if len(text) <= _LONGEST_EXAMPLE]
    sketched = [face for face, r in zip(faces, records, strict=True) if r.polylines is not None]
    examples = Examples(
        captions=short[:_EXAMPLES], faces=faces[:_EXAMPLES], sketches=sketched[-_EXAMPLES:]
    )
    if captions:
        return examples, model.encode_text(captions)
    return examples, np.ascontiguousarray(table["embedding"][faces])
