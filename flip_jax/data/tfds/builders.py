"""A builder per published data set: three classes do the work, a line for each registers it."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import tensorflow_datasets as tfds

from flip_jax.data import readers
from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.readers import url_tables
from flip_jax.data.readers.reader import Reader
from flip_jax.data.readers.samples import LandmarkSample, ParsingSample, SketchPair
from flip_jax.data.records import Record, RecordSource, load_manifest

_Examples = Iterator[tuple[str | int, dict[str, Any]]]  # key, features
_TEXT, _TEXTS = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
_PICTURE = tfds.features.Image()
_BOX = tfds.features.Tensor(shape=(None,), dtype=np.float32)  # x0, y0, x1, y1, or none of them
_POINTS = tfds.features.Tensor(shape=(None, 2), dtype=np.float32)
_LABELS = tfds.features.Tensor(shape=(len(ATTRIBUTES),), dtype=np.int8)
_KEYS = {"id": _TEXT, "group_id": _TEXT}
# By what a reader gives; named like its fields. What a sample lacks has length 0.
_FEATURES: dict[type, dict[str, Any]] = {
    Record: _KEYS
    | {
        "image": _PICTURE,
        "captions": _TEXTS,
        "attributes": _LABELS,
        "box": _BOX,
        "landmarks": _POINTS,
    },
    ParsingSample: _KEYS
    | {
        "image": _PICTURE,
        "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
        "landmarks": _POINTS,
    },
    LandmarkSample: _KEYS
    | {
        "image": _PICTURE,
        "landmarks": _POINTS,
        "box": _BOX,
        "visible": tfds.features.Tensor(shape=(None,), dtype=np.bool_),
        "subsets": _TEXTS,
    },
    SketchPair: _KEYS
    | {
        "photo": _PICTURE,
        "sketch": _PICTURE,
        "attributes": _LABELS,
        "style": tfds.features.Scalar(dtype=np.int64),
        "steps": tfds.features.Sequence(_PICTURE),
    },
}
_NOTHING = {"box": np.zeros(0, np.float32), "landmarks": np.zeros((0, 2), np.float32)}


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes what `_splits` gives, in its order; a file that is missing or damaged stops it.

    Pictures are stored as published, not encoded again.
    """

    VERSION = tfds.core.Version("1.0.0")
    FEATURES: ClassVar[dict[str, Any]]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=inspect.getdoc(type(self)),
            features=tfds.features.FeaturesDict(self.FEATURES),
            disable_shuffling=True,  # training shuffles by index
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, _Examples]:
        return self._splits(Path(dl_manager.manual_dir))

    def _generate_examples(self) -> _Examples:
        raise NotImplementedError("_split_generators gives the examples")

    def _splits(self, root: Path) -> dict[str, _Examples]:
        raise NotImplementedError


class _ReaderBuilder(_Builder, skip_registration=True):
    def __init_subclass__(cls, reader: type[Reader], **options: Any):
        cls.READER, cls.name, cls.__doc__ = reader, f"flip_{reader.NAME}", reader.__doc__
        cls.FEATURES, cls.MANUAL_DOWNLOAD_INSTRUCTIONS = _FEATURES[reader.SAMPLE], reader.SOURCE
        super().__init_subclass__(**options)

    def _splits(self, root: Path) -> dict[str, _Examples]:
        sources = {split: self.READER(root, split) for split in self.READER.SPLITS}
        return {split: _examples(source, self.FEATURES) for split, source in sources.items()}


def _examples(source: Sequence[Any], features: dict[str, Any]) -> _Examples:
    for sample in source:
        yield sample.id, {name: _value(name, getattr(sample, name)) for name in features}


def _value(name: str, value: Any) -> Any:
    if value is None:
        return _NOTHING[name]
    if name == "mask":
        return io.BytesIO(cv2.imencode(".png", value)[1].tobytes())
    if name == "steps":
        return [io.BytesIO(step) for step in value]
    if name == "subsets":
        return sorted(value)
    return io.BytesIO(value) if isinstance(value, bytes) else value


class FlipCelebA(_ReaderBuilder, reader=readers.CelebA): ...


class FlipCelebAInTheWild(_ReaderBuilder, reader=readers.CelebAInTheWild): ...


class FlipCelebADialog(_ReaderBuilder, reader=readers.CelebADialog): ...


class FlipCelebADialogHQ(_ReaderBuilder, reader=readers.CelebADialogHQ): ...


class FlipMMCelebAHQ(_ReaderBuilder, reader=readers.MMCelebAHQ): ...


class FlipFace2Text(_ReaderBuilder, reader=readers.Face2Text): ...


class FlipLfw(_ReaderBuilder, reader=readers.Lfw): ...


class FlipLfwa(_ReaderBuilder, reader=readers.Lfwa): ...


class FlipCelebAMaskHQ(_ReaderBuilder, reader=readers.CelebAMaskHQ): ...


class FlipLapa(_ReaderBuilder, reader=readers.Lapa): ...


class Flip300W(_ReaderBuilder, reader=readers.Faces300W): ...


class FlipWflw(_ReaderBuilder, reader=readers.Wflw): ...


class FlipAflw19(_ReaderBuilder, reader=readers.Aflw19): ...


class FlipFs2k(_ReaderBuilder, reader=readers.Fs2k): ...


class FlipFs2kSde1(_ReaderBuilder, reader=readers.Fs2kSde1): ...


class FlipFs2kSde2(_ReaderBuilder, reader=readers.Fs2kSde2): ...


class FlipRecords(_Builder):
    """A folder of records that `python -m flip_jax.data` made, from a table and pictures or else.

    Masks and sketches are left out.
    """

    FEATURES = _FEATURES[Record]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "a folder made by `python -m flip_jax.data build`."

    def _splits(self, root: Path) -> dict[str, _Examples]:
        names = load_manifest(root).splits
        return {name: _examples(RecordSource(root, name), self.FEATURES) for name in names}


class _TableBuilder(_Builder, skip_registration=True):
    """Rows of `flip_jax.data.readers.url_tables.URL_SCHEMA`; an empty text is none."""

    FEATURES: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(("id", "url", "caption", "alt_text", "licence"), _TEXT),
        "box": _BOX,
    }
    BATCHES: ClassVar[Callable[[Path], Iterator[Any]]]

    def _splits(self, root: Path) -> dict[str, _Examples]:
        return {"train": self._rows(root)}

    def _rows(self, root: Path) -> _Examples:
        rows = (row for batch in self.BATCHES(root) for row in batch.to_pylist())
        for number, row in enumerate(rows):  # ids of web data may be there twice
            box = np.array(row.pop("box") or [], np.float32)
            yield number, {name: text or "" for name, text in row.items()} | {"box": box}


class FlipFaceCaption(_TableBuilder):
    __doc__ = url_tables.face_caption_batches.__doc__
    MANUAL_DOWNLOAD_INSTRUCTIONS = url_tables.FACE_CAPTION_SOURCE
    BATCHES = staticmethod(url_tables.face_caption_batches)


class FlipLaionFace(_TableBuilder):
    __doc__ = url_tables.laion_face_batches.__doc__
    MANUAL_DOWNLOAD_INSTRUCTIONS = url_tables.LAION_FACE_SOURCE
    BATCHES = staticmethod(url_tables.laion_face_batches)
