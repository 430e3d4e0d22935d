"""One pass over all records: what their headers, labels, captions and groups say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from flip_jax.curate.quality.balance import CROSSINGS
from flip_jax.curate.quality.distinct import Distinct, Found, key_of
from flip_jax.curate.quality.words import TENTHS, WordCounts
from flip_jax.data.attributes import ATTRIBUTE_INDEX, ATTRIBUTES, UNKNOWN
from flip_jax.data.jpeg import BadImage, jpeg_size
from flip_jax.data.records import BadRecord, Record, RecordSource

MAX_SIDE = 2**16  # a JPEG has fewer pixels on a side
MAX_CAPTIONS = 256  # of a picture, in its histogram
PARTS = ("box", "landmarks", "mask", "polylines")  # of a record, that may be absent
NAMED = 10  # bad records that are named
_BATCH, _BATCH_BYTES = 2048, 64 * 2**20  # records, and bytes of their pictures


@dataclass
class SplitCounts:
    """Of one split.

    Attributes:
      pictures, pairs: records, and captions of them.
      labels: int64 [40, 3], pictures by unknown, absent, present.
      crossed: int64 [C, 3, 3], pictures by both labels of each of `CROSSINGS`.
      parts: how many records have each of `PARTS`.
    """

    pictures: int = 0
    pairs: int = 0
    labels: np.ndarray = field(default_factory=lambda: np.zeros((len(ATTRIBUTES), 3), np.int64))
    crossed: np.ndarray = field(default_factory=lambda: np.zeros((len(CROSSINGS), 3, 3), np.int64))
    parts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))


@dataclass
class Survey:
    """What one pass over a data set found.

    Attributes:
      splits: by name, in the order of the manifest; bit n of a mark is the n-th.
      width, height, shorter: int64 [65536], pictures by pixels.
      captions: int64 [257], pictures by number of captions.
      labels_known: int64 [41], pictures by number of known labels.
      words: of the captions.
      groups: marks are splits, counts are [pictures, pairs].
      files: as `groups` for picture files that are equal byte for byte.
      near: groups and pictures in them that the curation joined because they look alike.
      sample: split and number of the records whose ids have the smallest hashes, in that order.
      bad: how many records cannot be read, and the first of them by name and reason.
    """

    splits: dict[str, SplitCounts]
    width: np.ndarray
    height: np.ndarray
    shorter: np.ndarray
    captions: np.ndarray
    labels_known: np.ndarray
    words: WordCounts
    groups: Found
    files: Found
    near: tuple[int, int]
    sample: list[tuple[str, int]]
    bad: tuple[int, list[str]]

    @property
    def pictures(self) -> int:
        return sum(split.pictures for split in self.splits.values())


def survey(sources: dict[str, RecordSource], sample: int) -> Survey:
    """Reads every record of some splits once.

    A record that cannot be read is left out and named.

    Args:
      sources: by name of the split.
      sample: records to choose; the same ones whatever their order and shards.

    Raises:
      ValueError: more than 64 splits.
      OSError: a shard cannot be read.
    """
    if len(sources) > 64:
        raise ValueError(f"{len(sources)} splits; a report is made of at most 64")
    pass_ = _Pass(sources, sample)
    total = sum(map(len, sources.values()))
    with tqdm(total=total, desc="records", unit="", disable=None) as progress:
        for place, (name, source) in enumerate(sources.items()):
            for batch in _batches(source, pass_.bad):
                pass_.add(name, place, batch)
                progress.update(len(batch))
    return pass_.survey()


def _batches(source: RecordSource, bad: _Bad) -> Iterator[list[tuple[int, Record]]]:
    batch, size = [], 0
    for number in range(len(source)):
        try:
            record = source[number]
        except BadRecord as error:
            bad.append(str(error))
            continue
        batch.append((number, record))
        size += len(record.image)
        if len(batch) == _BATCH or size > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Pass:
    """What is gathered on the way."""

    def __init__(self, sources: dict[str, RecordSource], sample: int):
        self.splits = {name: SplitCounts() for name in sources}
        self.width, self.height, self.shorter = np.zeros((3, MAX_SIDE), np.int64)
        self.captions = np.zeros(MAX_CAPTIONS + 1, np.int64)
        self.labels_known = np.zeros(len(ATTRIBUTES) + 1, np.int64)
        self.words = WordCounts()
        self.groups, self.files = Distinct(2), Distinct(2)
        self.near = Distinct(2)
        self.bad = _Bad()
        self.sample_size = sample
        # Hash of the id, split, number: of the records with the smallest hashes so far.
        self.sample = np.zeros((3, 0), np.uint64)

    def add(self, name: str, place: int, batch: list[tuple[int, Record]]) -> None:
        batch = [(number, record, size) for number, record in batch if (size := self._size(record))]
        if not batch:
            return
        records = [record for _, record, _ in batch]
        sizes = np.array([size for _, _, size in batch])
        for counts, values in zip(
            (self.height, self.width, self.shorter),
            (*sizes.T, sizes.min(axis=1)),
            strict=True,
        ):
            counts += np.bincount(values, minlength=MAX_SIDE)
        ids = np.array([key_of(record.id.encode()) for record in records], np.uint64)
        numbers = np.array([number for number, _, _ in batch], np.uint64)
        self._choose(ids, place, numbers)
        self._add_labels(self.splits[name], records)
        self._add_captions(self.splits[name], records, ids)
        self._add_groups(place, records)

    def _size(self, record: Record) -> tuple[int, int] | None:
        try:
            return jpeg_size(record.image)
        except BadImage as error:
            self.bad.append(f"{record.id}: {error}")
            return None

    def _choose(self, ids: np.ndarray, place: int, numbers: np.ndarray) -> None:
        new = np.stack([ids, np.full(len(ids), place, np.uint64), numbers])
        both = np.concatenate([self.sample, new], axis=1)
        if both.shape[1] > self.sample_size:
            both = both[:, np.lexsort(both[::-1])[: self.sample_size]]
        self.sample = both

    def _add_labels(self, split: SplitCounts, records: list[Record]) -> None:
        labels = np.stack([record.attributes for record in records])
        split.pictures += len(records)
        split.labels += np.stack([(labels == value).sum(axis=0) for value in (-1, 0, 1)], axis=1)
        self.labels_known += np.bincount(
            (labels >= 0).sum(axis=1), minlength=len(self.labels_known)
        )
        for place, names in enumerate(CROSSINGS):
            first, second = (labels[:, ATTRIBUTE_INDEX[name]] - UNKNOWN for name in names)
            split.crossed[place] += np.bincount(3 * first + second, minlength=9).reshape(3, 3)
        for part in PARTS:
            split.parts[part] += sum(getattr(record, part) is not None for record in records)

    def _add_captions(self, split: SplitCounts, records: list[Record], ids: np.ndarray) -> None:
        counts = np.array([len(record.captions) for record in records])
        split.pairs += int(counts.sum())
        self.captions += np.bincount(np.minimum(counts, MAX_CAPTIONS), minlength=len(self.captions))
        # A picture's tenth of the data depends on its id alone, not on where it is stored.
        tenths = ((ids >> np.uint64(32)) * np.uint64(TENTHS)) >> np.uint64(32)
        texts = [text for record in records for text in record.captions]
        self.words.add(texts, np.repeat(tenths, counts))

    def _add_groups(self, place: int, records: list[Record]) -> None:
        marks = np.full(len(records), 1 << place, np.uint64)
        weights = np.array([(1, len(record.captions)) for record in records])
        names = np.array([key_of(record.group_id.encode()) for record in records], np.uint64)
        self.groups.add(names, marks, weights)
        files = np.array([key_of(record.image) for record in records], np.uint64)
        self.files.add(files, marks, weights)
        alike = np.array([record.group_id.startswith("same:") for record in records])
        self.near.add(names[alike], marks[alike], weights[alike])

    def survey(self) -> Survey:
        near = self.near.found()
        many = near.counts[:, 0] > 1
        names = list(self.splits)
        _, places, numbers = self.sample[:, np.lexsort(self.sample[::-1])]
        chosen = zip(places.tolist(), numbers.tolist(), strict=True)
        return Survey(
            splits=self.splits,
            width=self.width,
            height=self.height,
            shorter=self.shorter,
            captions=self.captions,
            labels_known=self.labels_known,
            words=self.words,
            groups=self.groups.found(),
            files=self.files.found(),
            near=(near.estimate(many), round(near.counts[many, 0].sum() / near.share)),
            sample=[(names[place], number) for place, number in chosen],
            bad=(self.bad.count, self.bad.named),
        )


class _Bad:
    """Counts all, names the first."""

    def __init__(self):
        self.count, self.named = 0, []

    def append(self, text: str) -> None:
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append(text)
