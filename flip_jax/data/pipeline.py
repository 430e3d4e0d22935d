"""Batches for training, as numpy arrays.

Training batch t is a pure function of (seed, t): to resume is to start at step t, and neither the
number of hosts nor of threads or worker processes changes a batch. The chain is

    record numbers -> shuffle -> repeat -> load and augment -> batch -> host slice -> [step:]

all on a Grain `MapDataset`, prefetched last. Augmentation comes before the host slice because
Grain derives its random numbers from the position in the stream: after the slice, all hosts would
draw the same ones. The slice takes every `host_count`-th batch of `batch_size / host_count`
rows, so the hosts' rows one after the other are the batch of a single host.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags

from flip_jax.config import DataConfig
from flip_jax.data import transforms
from flip_jax.data.jpeg import BadImage, jpeg_size
from flip_jax.data.record_sketch import sketch_at, sketch_kind
from flip_jax.data.records import BadRecord, Record, RecordSource, group_number
from flip_jax.data.regions import label_map, region_map
from flip_jax.data.sub_captions import draw_part
from flip_jax.data.text_buckets import crop_texts
from flip_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
Gather = Callable[[Any], list[Any]]

# So many bad records in a row mean that a whole stretch of the data is gone.
_MAX_SUBSTITUTES = 100
# That a stream has in all: more than any run sees, few enough for Grain to count in 64 bits.
_EXAMPLES = 2**60
# `max_bad_fraction` is applied from this many examples on: below, one bad record is a large share.
_MIN_SEEN = 100
# Several hosts add up their bad records every so many batches.
_COUNT_EVERY_BATCHES = 10


def alone(value: Any) -> list[Any]:
    """`gather` of a single host."""
    return [value]


class BadData(ValueError):
    """Too many records cannot be used."""


def read_record(
    source: RecordSource, number: int, need_caption: bool = True, size: int | None = None
) -> tuple[Record, np.ndarray]:
    """Reads a record and decodes its picture.

    Args:
      size: to squash the picture to, see `transforms.load_image`; None = as it is.

    Returns:
      The record and its picture, uint8 [H, W, 3].

    Raises:
      BadRecord: damaged bytes, a picture that cannot be decoded, or no caption where one is needed.
    """
    record = source[number]
    try:
        if size is None:
            image = transforms.decode_image(record.image)
        else:
            image = transforms.load_image(record.image, size)
    except BadImage as error:
        raise BadRecord(f"{source.where(number)} ({record.id}): {error}") from error
    if need_caption and not record.captions:
        raise BadRecord(f"{source.where(number)} ({record.id}): no caption")
    return record, image


def _read_shown(
    source: RecordSource, number: int, stage: float | None, side: int, regions: bool
) -> tuple[Record, np.ndarray, np.ndarray | None]:
    """Reads a record to train on.

    Args:
      stage: how much of its sketch to show, 0..1, where it has one; None = its picture.
      regions: whether the label map is asked for.

    Returns:
      The record, what is shown, uint8 [side, side, 3], and the label map of its picture, see
      `regions.label_map`.

    Raises:
      BadRecord: see `read_record`, and a sketch that cannot be drawn or a mask that is none.
    """
    record, image = read_record(source, number, size=side)
    try:
        labels = label_map(record, *jpeg_size(record.image), side) if regions else None
        if stage is None or sketch_kind(record) is None:
            return record, image, labels
        return record, sketch_at(record, [stage], side)[0], labels
    except ValueError as error:
        raise BadRecord(f"{source.where(number)}: {error}") from error


@dataclass(frozen=True)
class _Load:
    """Record number -> one training example."""

    source: RecordSource
    cfg: DataConfig
    image_size: int
    region_patch: int | None = None

    def __call__(self, number: int, rng: np.random.Generator) -> dict[str, Any]:
        stage = self._sketch_stage(rng)
        used, bad, record, image, labels = self._first_good(int(number), stage)
        moves = None if labels is None else []
        caption = record.captions[rng.integers(len(record.captions))]
        if self.cfg.flip:
            image = transforms.random_flip(image, rng, moves)
        image = transforms.rand_augment(
            image, rng, self.cfg.randaugment_ops, self.cfg.randaugment_level, moves
        )
        kind = self.cfg.contrastive_text
        part = {} if kind == "caption" else {"part": draw_part(caption, kind, rng)}
        if labels is not None:
            moved = transforms.move_labels(labels, moves)
            part["regions"] = region_map(moved, self.region_patch)
        return part | {
            "image": image,
            "caption": caption,
            "group": group_number(record.group_id),
            "index": used,
            "bad": bad,
        }

    def _sketch_stage(self, rng: np.random.Generator) -> float | None:
        """How much is drawn of the sketch to show, 0..1; None = the picture is to be shown."""
        share = self.cfg.sketch_share
        return 1 - rng.random() if share and rng.random() < share else None

    def _first_good(
        self, number: int, stage: float | None
    ) -> tuple[int, int, Record, np.ndarray, np.ndarray | None]:
        """The first usable record from `number` on: its number, how many before it were not, the
        record, its picture or sketch as the model takes it, and its label map if asked for."""
        records = len(self.source)
        for bad in range(min(records, _MAX_SUBSTITUTES)):
            used = (number + bad) % records
            try:
                regions = self.region_patch is not None
                shown = _read_shown(self.source, used, stage, self.image_size, regions)
                return used, bad, *shown
            except BadRecord as error:
                last = error
        raise BadData(
            f"{bad + 1} records in a row cannot be used, the last: {last}. Run `python -m "
            f"flip_jax.data verify {self.source.path}`, then copy or build the data set again."
        )


@dataclass(frozen=True)
class _Collate:
    """Examples -> batch; captions are tokenized together."""

    tokenizer: Tokenizer

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch:
        token_ids, token_mask = self.tokenizer([example["caption"] for example in examples])
        part = {}
        if "part" in examples[0]:
            part_ids, part_mask = self.tokenizer([example["part"] for example in examples])
            part = {"part_ids": part_ids, "part_mask": part_mask}
        if "regions" in examples[0]:
            part["regions"] = np.stack([example["regions"] for example in examples])
        return part | {
            "image": np.stack([example["image"] for example in examples]),
            "token_ids": token_ids,
            "token_mask": token_mask,
            "group": np.array([example["group"] for example in examples], np.int32),
            "index": np.array([example["index"] for example in examples], np.int64),
            "bad": np.array([example["bad"] for example in examples], np.int32),
        }


class TrainPipeline:
    """The endless stream of training batches of one host.

    A batch is a dict of b = batch_size / host_count rows: `image` uint8 [b, S, S, 3] RGB,
    `token_ids` int32 [b, L], `token_mask` bool [b, L], `group` int32 [b] (see `group_number`),
    `index` int64 [b] (the record used), `bad` int32 [b] (records just before it, wrapping around,
    that could not be used and were passed over); with `cfg.contrastive_text` other than `caption`
    also `part_ids`, `part_mask` [b, L], the part of the caption; with `region_patch` also `regions`
    uint32 [b, patches], see `regions.region_map`, of the augmented picture. `batches` cuts L to one
    of `cfg.text_buckets`.

    Every n consecutive rows of the global stream from a multiple of n on, n = len(source), come
    from every record once (a bad one is replaced by the next good one). A caption is drawn among
    the record's at each visit.

    Args:
      source: the training records.
      tokenizer: turns captions into ids.
      cfg: batch size, augmentation, threads and processes.
      image_size: S, pixels.
      seed: of order, captions and augmentation.
      host_index: which of the `host_count` equal parts of each batch to yield.
      gather: JSON value of this host -> those of all hosts, see `flip_jax.distributed.gather`.
      region_patch: pixels of a patch; None = no region maps.

    Raises:
      ValueError: `batch_size` does not divide over the hosts or exceeds the number of records.
    """

    def __init__(
        self,
        source: RecordSource,
        tokenizer: Tokenizer,
        cfg: DataConfig,
        image_size: int,
        seed: int,
        host_index: int = 0,
        host_count: int = 1,
        gather: Gather = alone,
        region_patch: int | None = None,
    ):
        if cfg.batch_size % host_count:
            raise ValueError(
                f"data.batch_size={cfg.batch_size} does not divide over {host_count} hosts; use a "
                f"multiple of {host_count}"
            )
        if cfg.batch_size > len(source):
            raise ValueError(
                f"data.batch_size={cfg.batch_size} is more than the {len(source)} records of "
                f"{source.path}, split {source.split!r}; use a smaller batch"
            )
        if not 0 <= host_index < host_count:
            raise ValueError(f"host_index={host_index} must be 0 to {host_count - 1}")
        self.source, self.cfg = source, cfg
        self._gather = gather
        self._count_every = _COUNT_EVERY_BATCHES if host_count > 1 else 1
        self.steps_per_epoch = len(source) // cfg.batch_size
        self._dataset = (
            grain.MapDataset.range(len(source))
            .seed(seed)
            .shuffle()
            .repeat(_EXAMPLES // len(source))
            .random_map(_Load(source, cfg, image_size, region_patch))
            .batch(cfg.batch_size // host_count, batch_fn=_Collate(tokenizer))
        )[host_index::host_count]

    def batch_at(self, step: int) -> Batch:
        """Computes the batch of one step, in the calling thread."""
        return self._dataset[step]

    def batches(self, start_step: int = 0) -> BatchStream:
        """Starts to prefetch the batches of `start_step`, `start_step + 1`, ..."""
        # Grain reads absl flags, which nobody has parsed in a test, a notebook or a tool.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        cfg = self.cfg
        # An element is a whole batch: Grain's default buffer of 500 would hold 500 batches.
        buffer = max(cfg.threads, 0 if cfg.workers else cfg.prefetch)
        read = grain.ReadOptions(
            num_threads=cfg.threads, prefetch_buffer_size=buffer if cfg.threads else 0
        )
        dataset = self._dataset[start_step:].to_iter_dataset(read)
        if cfg.workers:
            options = grain.MultiprocessingOptions(
                num_workers=cfg.workers,
                per_worker_buffer_size=max(cfg.prefetch // cfg.workers, 1),
            )
            dataset = dataset.mp_prefetch(options, worker_init_fn=_end_with_parent).map(_own)
            # A thread copies one batch ahead: the step would wait for it.
            dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=1)
        return BatchStream(iter(dataset), self.source, cfg, self._gather, self._count_every)


class BatchStream(Iterator[Batch]):
    """Prefetched training batches; also a context manager that ends threads and processes.

    With several hosts each reads its own stream, in step with the others.

    Attributes:
      seen: examples handed out by this stream.
      bad: those of them whose own record could not be used, so that another took its place.
    """

    def __init__(
        self,
        batches: Any,
        source: RecordSource,
        cfg: DataConfig,
        gather: Gather,
        count_every: int,
    ):
        self._batches, self._source = batches, source
        self._limit, self._buckets = cfg.max_bad_fraction, cfg.text_buckets
        self._gather, self._count_every = gather, count_every
        self._steps = self.seen = self.bad = 0
        self._bad_numbers: dict[int, None] = {}  # an ordered set
        self._batches.start_prefetch()

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
          BadData: after 100 examples or more, `bad` is more than `max_bad_fraction` of `seen`; the
            same one at the same step in every run that starts at the same step. Several hosts look
            at their sums every tenth batch, and all raise.
        """
        if self._batches is None:
            raise ValueError("this stream of batches is closed")
        batch = next(self._batches)
        self._steps += 1
        self.seen += len(batch["bad"])
        if batch["bad"].any():
            self._count(batch)
        if self._steps % self._count_every == 0:
            self._check()
        return crop_texts(batch, self._buckets, self._gather)

    def _count(self, batch: Batch) -> None:
        for used, bad in zip(batch["index"].tolist(), batch["bad"].tolist(), strict=True):
            for back in range(bad, 0, -1):
                self._bad_numbers[(used - back) % len(self._source)] = None
        self.bad += int((batch["bad"] > 0).sum())

    def _check(self) -> None:
        seen, bad = map(sum, zip(*self._gather([self.seen, self.bad]), strict=True))
        if seen >= _MIN_SEEN and bad > self._limit * seen:
            named = [name for host in self._gather(self.bad_records(last=5)) for name in host]
            self.close()
            raise BadData(
                f"the records of {bad} of {seen} examples cannot be used "
                f"({bad / seen:.2%}), data.max_bad_fraction={self._limit}. Among them:\n  "
                + "\n  ".join(named[-5:])
                + f"\nRun `python -m flip_jax.data verify {self._source.path}`, then copy or build "
                "the data set again; or raise data.max_bad_fraction."
            )

    def bad_records(self, last: int | None = None) -> list[str]:
        """Names the bad records met so far (or the `last` of them) and what is wrong with each."""
        numbers = list(self._bad_numbers)
        return [_complaint(self._source, n) for n in numbers[-last if last else None :]]

    def close(self) -> None:
        """Ends threads and processes; batches handed out stay valid. May be called again."""
        if self._batches is not None:
            self._batches.close()
        # Grain's iterators close again when they are deleted, and fail at that if it happens as
        # late as the end of the interpreter.
        self._batches = None

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, kind, value, traceback) -> None:
        self.close()


def _complaint(source: RecordSource, number: int) -> str:
    try:
        _read_shown(source, number, stage=1.0, side=16, regions=True)
    except BadRecord as error:
        return str(error)
    return f"{source.where(number)}: could not be read at first, now it can"


def _own(batch: Batch) -> Batch:
    """Copies a worker's batch out of shared memory, which is small in containers and is released
    with errors at the end of the interpreter."""
    return {name: np.array(value) for name, value in batch.items()}


def _end_with_parent(worker: int, workers: int) -> None:
    """Ends this worker process when its parent does, even when that is killed, and not before."""
    # Schedulers and terminals signal the whole process group; the parent finishes its step first,
    # and for that needs its batches.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
