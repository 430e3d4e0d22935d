"""Where records come from: tables beside folders of pictures, and drawn faces."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath

import cv2
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from flip_jax.config import DrawnConfig
from flip_jax.data.attributes import ATTRIBUTE_INDEX, UNKNOWN
from flip_jax.data.captions import captions
from flip_jax.data.drawn_faces import PARSING_CLASSES, draw_face
from flip_jax.data.record_build import (
    BuildReport,
    Finished,
    Rejected,
    check_numbers,
    write_records,
)
from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import (
    MANIFEST,
    Record,
    file_sha256,
    group_number,
    join_strokes,
    load_manifest,
)
from flip_jax.data.tables import attribute_labels, cell_text, read_table
from flip_jax.data.transforms import BadImage, encode_jpeg, prepare_image

_NO_BEARD = ATTRIBUTE_INDEX["No_Beard"]
# Below this many pictures a second process costs more than it saves.
_PICTURES_PER_PROCESS = 100


@dataclass(frozen=True)
class BuildConfig:
    """How the columns of a table become records.

    Attributes:
      image_column: file name below the image folder; also the record's id.
      group_column: equal for pictures of one person; None or an empty cell = a group of its own.
      group_prefix: put before the group's value, to keep data sets apart.
      split_column: name of the split of each row; None = all rows go to `split`.
      caption_column: a sentence or a list of sentences.
      captions: sentences to make from the attribute columns with the caption grammar.
      caption_seed: of these sentences.
      max_side: pixels; larger pictures are shrunk. None = as they are.
      quality: JPEG quality where a picture has to be encoded again.
      max_bad_fraction: share of rejected rows above which nothing is written.
    """

    image_column: str = "file"
    group_column: str | None = None
    group_prefix: str = ""
    split_column: str | None = None
    split: str = "train"
    caption_column: str | None = None
    captions: int = 0
    caption_seed: int = 0
    max_side: int | None = None
    quality: int = 95
    max_bad_fraction: float = 0.01


def build(
    tables: Sequence[tuple[str | os.PathLike, str | os.PathLike]],
    out_dir: str | os.PathLike,
    cfg: BuildConfig,
    *,
    overwrite: bool = False,
    threads: int = 2,
) -> BuildReport:
    """Writes records from tables of pictures, in the order of the rows.

    A JPEG that decodes without complaint, is baseline RGB, upright and not larger than `max_side`
    is stored byte for byte; any other readable picture is encoded again; a row whose picture
    cannot be decoded or that has no caption (where captions are asked for) is rejected.

    Attribute columns are those named like CelebA's: 1 and true = present, 0 and false = absent,
    null = unknown. -1 means unknown where the table also has zeros, else absent (CelebA's own
    files hold 1 and -1).

    Args:
      tables: pairs of a .parquet, .csv or .jsonl file and the folder its pictures are in.
      out_dir: the data set to make.
      cfg: see `BuildConfig`.
      overwrite: replace a data set in `out_dir`.
      threads: decode so many pictures at a time; does not change the result.

    Raises:
      ValueError: a column that is missing or of the wrong type, a bad label, ids that are not
        unique (all found before a picture is read), or too many rejections.
      OSError: a file or folder cannot be read or written.
    """
    tables = [(Path(table), Path(images)) for table, images in tables]
    source = "; ".join(f"{table.name} sha256 {file_sha256(table)[:16]}" for table, _ in tables)
    report = BuildReport()
    check_numbers(captions=cfg.captions, max_bad_fraction=cfg.max_bad_fraction, threads=threads)
    _check_tables(tables, cfg)
    with RecordWriter(out_dir, f"{source}; {_describe(cfg)}", overwrite=overwrite) as writer:
        for path, images in tables:
            table = read_table(path, _text_columns(cfg))
            drafts = tqdm(_drafts(table, images, cfg), path.name, len(table), disable=None)
            write_records(writer, report, iter(drafts), _finish, threads)
        report.check(cfg.max_bad_fraction)
    return report


def _describe(cfg: BuildConfig | DrawnConfig) -> str:
    return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(cfg).items())


@dataclass(frozen=True)
class _Draft:
    """One row of a table, before its picture is read."""

    file: str
    images: Path
    group: str
    split: str
    captions: list[str]
    attributes: np.ndarray
    cfg: BuildConfig


def _text_columns(cfg: BuildConfig) -> list[str]:
    columns = (cfg.image_column, cfg.group_column, cfg.split_column, cfg.caption_column)
    return [name for name in columns if name]


def _check_tables(tables: Sequence[tuple[Path, Path]], cfg: BuildConfig) -> None:
    """Finds what would stop the build hours later."""
    if cfg.max_side is not None and cfg.max_side < 1:
        raise ValueError(f"max_side={cfg.max_side}: must be at least 1, or None to shrink nothing")
    if not 1 <= cfg.quality <= 100:
        raise ValueError(f"quality={cfg.quality}: must be 1 to 100")
    files = set()
    for path, images in tables:
        table = read_table(path, _text_columns(cfg))
        for name in _text_columns(cfg):
            if name not in table.column_names:
                raise ValueError(f"{path} has no column {name!r}; it has {table.column_names}")
        if cfg.caption_column and not _holds_text(table[cfg.caption_column].type):
            raise ValueError(
                f"{path}: column {cfg.caption_column!r} is {table[cfg.caption_column].type}; "
                "captions must be strings or lists of strings"
            )
        if not images.is_dir():
            raise FileNotFoundError(f"image folder {images} does not exist")
        try:
            attribute_labels(table)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        for file in map(cell_text, table[cfg.image_column].drop_null().to_pylist()):
            if file in files:
                raise ValueError(
                    f"{path}: {cfg.image_column} {file!r} is there twice; ids must be unique"
                )
            files.add(file)


def _holds_text(kind: pa.DataType) -> bool:
    """Whether a column's type is a string or a list of strings; all null is either."""
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)


def _drafts(table: pa.Table, images: Path, cfg: BuildConfig) -> Iterator[_Draft]:
    labels = attribute_labels(table)

    def column(name: str | None, default: str) -> list:
        return table[name].to_pylist() if name else [default] * len(table)

    for file, group, split, texts, attributes in zip(
        column(cfg.image_column, ""),
        column(cfg.group_column, ""),
        column(cfg.split_column, cfg.split),
        column(cfg.caption_column, ""),
        labels,
        strict=True,
    ):
        file, group = cell_text(file), cell_text(group)
        texts = [texts] if isinstance(texts, str) else texts or []
        yield _Draft(
            file=file,
            images=images,
            group=cfg.group_prefix + (group or file),
            split=cell_text(split),
            captions=[text.strip() for text in texts if text and text.strip()],
            attributes=attributes,
            cfg=cfg,
        )


def _finish(draft: _Draft) -> Finished:
    cfg, texts, file = draft.cfg, draft.captions, draft.file
    if not draft.split.isidentifier():
        raise Rejected("no split", f"{file}: {draft.split!r} is not a plain word")
    if cfg.captions and np.any(draft.attributes != UNKNOWN):
        seed = group_number(f"{cfg.caption_seed}:{file}")
        texts = texts + captions(draft.attributes, seed, cfg.captions)
    if not texts and (cfg.captions or cfg.caption_column):
        raise Rejected("no caption", f"{file}: no text and no known attribute")
    data = _read_file(draft)
    try:
        image, encoded_again = prepare_image(data, cfg.max_side, cfg.quality)
    except BadImage as error:
        raise Rejected("undecodable picture", f"{file}: {error}") from error
    record = Record(
        id=file,
        group_id=draft.group,
        image=image,
        captions=texts,
        attributes=draft.attributes,
    )
    return Finished(draft.split, record, encoded_again)


def _read_file(draft: _Draft) -> bytes:
    path = PurePath(draft.file)
    if not draft.file or "\0" in draft.file or path.is_absolute() or ".." in path.parts:
        raise Rejected("bad file name", f"{draft.file}: not a path below the image folder")
    try:
        return (draft.images / path).read_bytes()
    except OSError as error:
        raise Rejected("unreadable file", f"{draft.file}: {error.strerror}") from error


def write_drawn(
    cfg: DrawnConfig,
    out_dir: str | os.PathLike,
    *,
    overwrite: bool = False,
    processes: int | None = None,
) -> Path:
    """Renders drawn faces into records; a folder that holds just these already is left alone.

    The people of `train` and `test` differ. The first pictures of all people come before the
    second ones, so that the first records of a split are of as many people as possible.

    Args:
      cfg: numbers of people, pictures and captions, size and seed.
      out_dir: the data set to make.
      overwrite: replace a data set made with other settings.
      processes: to draw with; None = one per core. Does not change a byte.

    Returns:
      `out_dir`.

    Raises:
      ValueError: a number out of range, or `out_dir` holds something else.
      OSError: the folder or the disk refuses.
    """
    out_dir = Path(out_dir)
    for name in ("train_identities", "test_identities", "pictures", "captions"):
        least = 0 if name == "test_identities" else 1
        if getattr(cfg, name) < least:
            raise ValueError(f"data.drawn.{name}={getattr(cfg, name)} must be {least} or more")
    source = f"drawn faces; {_describe(cfg)}"
    if (out_dir / MANIFEST).is_file() and not overwrite:
        found = load_manifest(out_dir).source
        if found != source:
            raise ValueError(
                f"{out_dir} holds another data set:\n  {found}\nnot the wanted\n  {source}\n"
                "Remove it or choose another folder."
            )
        return out_dir
    total = cfg.train_identities + cfg.test_identities
    splits = {
        "train": range(cfg.train_identities),
        "test": range(cfg.train_identities, total),
    }
    tasks = [
        (split, cfg, identity, picture)
        for split, identities in splits.items()
        for picture in range(cfg.pictures)
        for identity in identities
    ]
    cores = (os.cpu_count() or 1) if processes is None else processes
    processes = max(min(cores, len(tasks) // _PICTURES_PER_PROCESS), 1)
    options = {"overwrite": overwrite, "mask_classes": PARSING_CLASSES}
    with RecordWriter(out_dir, source, **options) as writer:
        for split, record in tqdm(
            _draw_all(tasks, processes), "drawing faces", len(tasks), disable=None
        ):
            writer.write(split, record)
    return out_dir


_Task = tuple[str, DrawnConfig, int, int]  # split, settings, identity, picture


def _draw_all(tasks: list[_Task], processes: int) -> Iterator[tuple[str, Record]]:
    if processes == 1:
        yield from map(_draw, tasks)
        return
    # Spawned, because a fork copies JAX's threads in the middle of whatever they are doing.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(_draw, tasks, chunksize=16)


def _draw(task: _Task) -> tuple[str, Record]:
    split, cfg, identity, picture = task
    face = draw_face(cfg.seed, identity, picture, cfg.size)
    record_id = f"drawn:{identity}/{picture}"
    seed = group_number(f"{cfg.seed}:{record_id}")
    _, mask = cv2.imencode(".png", face.mask)
    record = Record(
        id=record_id,
        group_id=f"drawn:{identity}",
        image=encode_jpeg(face.image),
        captions=captions(_told(face.attributes), seed, cfg.captions),
        attributes=face.attributes,
        box=face.box,
        landmarks=face.landmarks,
        mask=mask.tobytes(),
        polylines=join_strokes(face.strokes),
    )
    return split, record


def _told(attributes: np.ndarray) -> np.ndarray:
    """The labels of a drawn face as its captions tell them.

    As in CelebA, a man with nothing but a mustache or sideburns is not labelled `No_Beard`, of
    which the grammar makes "a beard". No full beard is ever drawn, so that would be wrong.
    """
    told = attributes.copy()
    if told[_NO_BEARD] == 0:
        told[_NO_BEARD] = UNKNOWN
    return told
