"""Writing records of a published data set."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import cv2
import msgspec
import numpy as np
from tqdm import tqdm

from flip_jax.data.attributes import ATTRIBUTES, UNKNOWN
from flip_jax.data.jpeg import BadImage, jpeg_size
from flip_jax.data.readers import READERS
from flip_jax.data.readers.reader import Reader, grammar_captions
from flip_jax.data.readers.samples import LandmarkSample, ParsingSample, SketchPair
from flip_jax.data.record_build import (
    BuildReport,
    Finished,
    Rejected,
    check_numbers,
    write_records,
)
from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import Record, file_sha256
from flip_jax.data.transforms import decode_image, prepare_image

_QUALITY = 95  # of pictures that are no baseline JPEG and are encoded again


def write_published(
    name: str,
    root: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    captions: int = 5,
    max_bad_fraction: float = 0.01,
    overwrite: bool = False,
    threads: int = 2,
) -> BuildReport:
    """Writes all splits of a published data set as records, in the order of its tables.

    A baseline RGB JPEG is stored byte for byte, any other picture is encoded again: upright, or
    as the file's pixels lie where masks, landmarks or boxes go by them. A sample whose files are
    missing or damaged is rejected and named.

    Args:
      name: of `READERS`.
      root: folder of the unpacked data set.
      out_dir: the data set to make.
      captions: to draw per picture by the grammar, where the data set has labels and no captions.
      max_bad_fraction: share of rejected samples above which nothing is written.
      overwrite: replace a data set in `out_dir`.
      threads: decode so many pictures at a time; does not change the result.

    Raises:
      ValueError: unknown name, a number out of range, a table that is not as published, or too many
        rejections.
      OSError: a table is missing, or a folder cannot be read or written.
      ImportError: the data set needs an extra that is not installed.
    """
    if name not in READERS:
        raise ValueError(f"data set {name!r} is not known; allowed: {', '.join(READERS)}")
    check_numbers(captions=captions, max_bad_fraction=max_bad_fraction, threads=threads)
    reader = READERS[name]
    options = {"captions": captions} if reader.DRAWS_CAPTIONS else {}
    splits = [reader(root, split, **options) for split in reader.SPLITS]
    tables = dict.fromkeys(path for split in splits for path in split.tables)
    source = [f"{path.name} sha256 {file_sha256(path)[:16]}" for path in tables]
    if reader.DRAWS_CAPTIONS or reader.SAMPLE is SketchPair:
        source.append(f"captions={captions}")
    finish = functools.partial(_finish, captions=captions)
    report = BuildReport()
    classes = reader.CLASSES if reader.SAMPLE is ParsingSample else ()
    written = {"overwrite": overwrite, "mask_classes": classes}
    with RecordWriter(out_dir, "; ".join([name, *source]), **written) as writer:
        drafts = tqdm(_drafts(splits), name, sum(map(len, splits)), disable=None)
        write_records(writer, report, iter(drafts), finish, threads)
        report.check(max_bad_fraction)
    return report


def _drafts(splits: list[Reader]) -> Iterator[tuple[Reader, int]]:
    for split in splits:
        for index in range(len(split)):
            yield split, index


def _finish(draft: tuple[Reader, int], captions: int) -> Finished:
    reader, index = draft
    try:
        sample = reader[index]
    except OSError as error:
        raise Rejected("unreadable file", str(error)) from error
    except ValueError as error:
        raise Rejected("damaged file", str(error)) from error
    is_pair = isinstance(sample, SketchPair)
    # These are in pixels of the file (readers/samples.py), which must not be turned then.
    placed = any(getattr(sample, n, None) is not None for n in ("mask", "landmarks", "box"))
    try:
        photo = sample.photo if is_pair else sample.image
        image, encoded_again = prepare_image(photo, None, _QUALITY, upright=not placed)
        for drawing in _drawings(sample) if is_pair else ():
            decode_image(drawing)
    except BadImage as error:
        raise Rejected("undecodable picture", f"{sample.id}: {error}") from error
    record = _pair_record(sample, image, captions) if is_pair else _record(sample, image)
    return Finished(reader.split, record, encoded_again)


def _drawings(pair: SketchPair) -> list[bytes]:
    return [*pair.steps] or [pair.sketch]


def _pair_record(pair: SketchPair, image: bytes, captions: int) -> Record:
    return Record(
        id=pair.id,
        group_id=pair.group_id,
        image=image,
        captions=grammar_captions(pair.attributes, pair.id, captions),
        attributes=pair.attributes,
        drawings=_drawings(pair),
    )


def _record(sample: Record | ParsingSample | LandmarkSample, image: bytes) -> Record:
    if isinstance(sample, Record):
        return msgspec.structs.replace(sample, image=image)
    mask = box = visible = None
    subsets: list[str] = []
    if isinstance(sample, ParsingSample):
        height, width = jpeg_size(image)
        # A record's mask has the pixels of its picture.
        mask = cv2.resize(sample.mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        mask = cv2.imencode(".png", mask)[1].tobytes()
    else:
        box, subsets = sample.box, sorted(sample.subsets)
        # Where all points are seen, or nobody said, there is nothing to note.
        visible = None if sample.visible.all() else sample.visible.astype(np.int8)
    return Record(
        id=sample.id,
        group_id=sample.group_id,
        image=image,
        captions=[],
        attributes=np.full(len(ATTRIBUTES), UNKNOWN, np.int8),
        box=box,
        landmarks=sample.landmarks,
        visible=visible,
        subsets=subsets,
        mask=mask,
    )
