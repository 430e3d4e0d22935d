"""Pictures and captions for evaluation, in order; `pipeline` has those for training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from flip_jax.data import transforms
from flip_jax.data.pipeline import Batch, Gather, alone, read_record
from flip_jax.data.records import BadRecord, RecordSource, group_number
from flip_jax.data.tokenizer import Tokenizer


class Gallery:
    """Pictures and captions to evaluate on: the first usable records of a split, in order.

    Which records are usable is found once, by decoding them, so pictures and captions always
    agree. Nothing but record numbers is kept in memory.

    Args:
      source: the records.
      tokenizer: turns captions into ids.
      image_size: S, pixels.
      limit: at most so many pictures; None = all.
      captions: at most so many captions per picture, its first ones.
      threads: threads that decode.
      host_index, host_count: each host decodes its part of every batch, and looks at its part of
        the records at first.
      gather: see `TrainPipeline`.

    Attributes:
      records: int64 [images], record numbers.
      image_of: int64 [texts], the picture a caption belongs to, ascending.
      group: int32 [images], see `group_number`.
      bad: what is wrong with each record that was passed over.

    Raises:
      ValueError: no record is usable, or a number is below 1.
    """

    def __init__(
        self,
        source: RecordSource,
        tokenizer: Tokenizer,
        image_size: int,
        limit: int | None = None,
        captions: int = 1,
        threads: int = 2,
        host_index: int = 0,
        host_count: int = 1,
        gather: Gather = alone,
    ):
        if captions < 1 or (limit is not None and limit < 1):
            raise ValueError(f"captions={captions} and limit={limit} must be 1 or more")
        self.source, self.captions = source, captions
        self._tokenizer, self._image_size, self._threads = tokenizer, image_size, threads
        self._host_index, self._host_count, self._gather = host_index, host_count, gather
        self.bad: list[str] = []
        records, texts, groups = [], [], []
        for number, found in self._inspect_all(max(threads, 1)):
            if isinstance(found, str):
                self.bad.append(found)
                continue
            records.append(number)
            texts.append(min(found[0], captions))
            groups.append(found[1])
            if len(records) == limit:
                break
        if not records:
            raise ValueError(
                f"{source.path}, split {source.split!r}: none of {len(source)} records has a "
                f"picture and a caption; the first: {self.bad[0]}"
            )
        self.records = np.array(records, np.int64)
        self.group = np.array(groups, np.int32)
        self.image_of = np.repeat(np.arange(len(records)), texts)

    def _inspect_all(self, threads: int) -> Iterator[tuple[int, list[int] | str]]:
        """Yields every record in order: [captions, group], or what is wrong with it."""

        def inspect(number: int) -> tuple[int, list[int] | str]:
            try:
                record, _ = read_record(self.source, number)
            except BadRecord as error:
                return number, str(error)
            return number, [len(record.captions), group_number(record.group_id)]

        numbers = iter(range(len(self.source)))
        with ThreadPoolExecutor(threads) as pool:
            while chunk := list(itertools.islice(numbers, 32 * threads * self._host_count)):
                own = list(pool.map(inspect, chunk[self._host_index :: self._host_count]))
                yield from sorted(itertools.chain.from_iterable(self._gather(own)), key=_number)

    @property
    def images(self) -> int:
        return len(self.records)

    @property
    def texts(self) -> int:
        return len(self.image_of)

    def thumbnail(self, image: int) -> np.ndarray:
        """Returns picture number `image` as the model sees it, uint8 [S, S, 3]."""
        _, picture = read_record(self.source, self.records[image])
        return transforms.resize_image(picture, self._image_size)

    def caption(self, text: int) -> str:
        """Returns caption number `text`."""
        image = self.image_of[text]
        first = np.searchsorted(self.image_of, image)
        return self.source[self.records[image]].captions[text - first]

    def _own_rows(self, batch_size: int, total: int) -> Iterator[tuple[range, int]]:
        """Yields this host's rows of every batch, and how many rows of padding follow."""
        own = batch_size // self._host_count
        for start in range(self._host_index * own, total + self._host_index * own, batch_size):
            rows = range(min(start, total), min(start + own, total))
            yield rows, own - len(rows)

    def image_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields `image` uint8 [b, S, S, 3] and `valid` bool [b], b = batch_size / host_count; the
        last batches are padded."""
        with ThreadPoolExecutor(max(self._threads, 1)) as pool:
            for rows, padding in self._own_rows(batch_size, self.images):
                shape = (len(rows) + padding, self._image_size, self._image_size, 3)
                image = np.zeros(shape, np.uint8)
                for row, picture in enumerate(pool.map(self.thumbnail, rows)):
                    image[row] = picture
                yield {"image": image, "valid": np.arange(len(image)) < len(rows)}

    def text_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields `token_ids` int32 [b, L], `token_mask` bool [b, L], `image_of` int64 [b] and
        `valid` bool [b], see `image_batches`; padding rows are empty texts of picture 0."""
        for rows, padding in self._own_rows(batch_size, self.texts):
            texts = [self.caption(text) for text in rows] + [""] * padding
            token_ids, token_mask = self._tokenizer(texts)
            yield {
                "token_ids": token_ids,
                "token_mask": token_mask,
                "image_of": np.pad(self.image_of[rows.start : rows.stop], (0, padding)),
                "valid": np.arange(len(texts)) < len(rows),
            }


def _number(inspected: Sequence[Any]) -> int:
    return inspected[0]
