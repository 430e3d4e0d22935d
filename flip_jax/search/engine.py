"""From a query to faces: encode, find near neighbours, put the best in order by ITM."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import numpy as np

from flip_jax.api import FlipModel
from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.records import BadRecord, Record, RecordSource
from flip_jax.data.tokenizer import clean_caption
from flip_jax.search.filters import STATES, State, allowed_faces
from flip_jax.search.index import FaceIndex
from flip_jax.search.pictures import decode_upload

_log = logging.getLogger(__name__)
MAX_TEXT = 500  # characters
MAX_COUNT = 96  # faces


class BadQuery(ValueError):
    """A query for what does not exist; the message is fit for whoever sent it."""


class Query(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What a page asks. Without text, picture and face it lists what the filters leave.

    Attributes:
      text: a description.
      picture: a photo or sketch, the bytes of a JPEG, PNG or WebP file.
      face: a face of the index, in the place of a picture.
      filters: state wanted of attributes.
      count: faces wanted.
      rerank: put the best in order by ITM.
    """

    text: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)] = ""
    picture: bytes | None = None
    face: Annotated[int, msgspec.Meta(ge=0)] | None = None
    filters: dict[str, State] = {}
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)] = 24
    rerank: bool = False


class Face(msgspec.Struct, kw_only=True):
    """A face found. `cosine` is None without a query, `match` where ITM did not look at it."""

    face: int
    id: str
    captions: list[str]
    attributes: list[str]  # those present
    cosine: float | None
    match: float | None  # probability


class Answer(msgspec.Struct, kw_only=True):
    faces: list[Face]
    matching: int  # faces that meet the filters
    total: int
    notes: list[dict[str, Any]]  # `code` and what belongs to it
    milliseconds: dict[str, float]


@dataclass
class _Clock:
    spent: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.spent[name] = round(1e3 * (now - self._last), 2)
        self._last = now


class Engine:
    """An index, the pictures it was made of, and the model that made it.

    Calls use all cores; let one thread make them.

    Args:
      index, source, model: that belong together.
      rerank: how many of the best faces ITM looks at.
    """

    def __init__(self, index: FaceIndex, source: RecordSource, model: FlipModel, rerank: int):
        self.index, self.source, self.model, self.rerank = index, source, model, rerank
        # How many faces have each attribute in each state.
        self.counts = {
            name: {state: int(np.count_nonzero(row == value)) for state, value in STATES.items()}
            for name, row in zip(ATTRIBUTES, index.attributes, strict=True)
        }

    def warm_up(self) -> None:
        """Compiles every shape a search runs."""
        picture = self.model.preprocess(self.record(0).image)[0]
        self.model.encode_text(["a face"])
        self.model.encode_image(picture)
        self.model.match([picture] * self.rerank, ["a face"] * self.rerank)
        self.model.match(picture, ["a face"] * self.rerank)

    def record(self, face: int) -> Record:
        """Raises:
        IndexError: no such face.
        BadRecord, OSError: it cannot be read any more.
        """
        if not 0 <= face < len(self.index):
            raise IndexError(f"face {face} of {len(self.index)}")
        return self.source[int(self.index.records[face])]

    def search(self, query: Query, picture: np.ndarray | None = None) -> Answer:
        """Answers a query.

        Args:
          query: see `Query`.
          picture: its picture, decoded: uint8 [H, W, 3] RGB; None = `query.picture` is decoded.

        Raises:
          BadQuery: an attribute or a face that does not exist.
          RefusedPicture: `query.picture` cannot be used.
        """
        if picture is None and query.picture is not None:
            picture = decode_upload(query.picture)
        clock, notes = _Clock(), []
        try:
            allowed = allowed_faces(self.index.attributes, query.filters)
        except ValueError as error:
            raise BadQuery(str(error)) from error
        if query.face is not None and query.face >= len(self.index):
            raise BadQuery(f"face {query.face} of {len(self.index)}")
        matching = len(self.index) if allowed is None else int(np.count_nonzero(allowed))
        text = query.text if query.text.strip() else ""
        if text:
            notes += self._notes(text)
        vector = self._vector(text, query.face, picture)
        clock.lap("encode")
        faces, cosines = self._nearest(vector, query, allowed)
        clock.lap("search")
        faces, cosines, records = self._readable(faces, cosines)
        chances = np.full(len(faces), np.nan)
        if query.rerank and vector is not None and len(faces):
            best = slice(0, self.rerank)
            chances[best] = self._match(text, query.face, picture, records[best])
            if np.isnan(chances).all():
                notes.append({"code": "no_captions"})
            # By probability, those without one behind in the order they have.
            order = np.argsort(-np.nan_to_num(chances, nan=-1.0), kind="stable")
            faces, chances = faces[order], chances[order]
            cosines, records = cosines[order], [records[place] for place in order]
            clock.lap("rerank")
        found = [_face(*row) for row in zip(faces, records, cosines, chances, strict=True)]
        return Answer(
            faces=found[: query.count],
            matching=matching,
            total=len(self.index),
            notes=notes,
            milliseconds=clock.spent,
        )

    def _vector(self, text: str, face: int | None, picture: np.ndarray | None) -> np.ndarray | None:
        """Unit vector float32 [E] of the query: between those of its words and its picture."""
        parts = []
        if text:
            parts.append(self.model.encode_text([text])[0])
        if picture is not None:
            parts.append(self.model.encode_image(picture)[0])
        elif face is not None:
            parts.append(self.index.vector(face))
        if not parts:
            return None
        total = np.sum(parts, axis=0)
        return total / max(float(np.linalg.norm(total)), 1e-12)

    def _nearest(
        self, vector: np.ndarray | None, query: Query, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        if vector is None:
            faces = np.arange(len(self.index)) if allowed is None else np.flatnonzero(allowed)
            faces = faces[: query.count]
            return faces, np.full(len(faces), np.nan)
        # ITM may bring up what is not among the first by cosine.
        count = max(query.count, self.rerank) if query.rerank else query.count
        return self.index.search(vector, count, allowed)

    def _readable(
        self, faces: np.ndarray, cosines: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, list[Record]]:
        """The faces whose records can be read, and these; the others were damaged since."""
        kept, records = [], []
        for place, face in enumerate(faces):
            try:
                records.append(self.record(int(face)))
                kept.append(place)
            except (BadRecord, OSError) as error:
                _log.warning("face %d is left out of an answer: %s", face, error)
        return faces[kept], cosines[kept], records

    def _match(
        self, text: str, face: int | None, picture: np.ndarray | None, records: list[Record]
    ) -> np.ndarray:
        """Probability float [n] that each face matches the text; without a text, that its first
        caption matches the picture asked for. NaN where there is no caption."""
        # One shape for any number of faces: a new one would be compiled while somebody waits.
        filler = [records[-1]] * (self.rerank - len(records))
        if text:
            pictures = [record.image for record in records + filler]
            return self.model.match(pictures, [text] * self.rerank)[: len(records)]
        asked = picture if picture is not None else self.record(face).image
        captions = [record.captions[0] if record.captions else "" for record in records + filler]
        chances = self.model.match(asked, captions)[: len(records)].astype(float)
        return np.where([bool(record.captions) for record in records], chances, np.nan)

    def _notes(self, text: str) -> list[dict[str, Any]]:
        """What of a text the model does not see: words it does not know, and what is cut off."""
        notes, tokenizer = [], self.model.tokenizer
        words = list(dict.fromkeys(clean_caption(text).split()))
        rows, masks = tokenizer(words)
        pieces = masks.sum(axis=1) - 2
        # A word that is spelled out in letters is known to the vocabulary, not to the model.
        unknown = [
            word
            for word, row, count in zip(words, rows, pieces, strict=True)
            if "[UNK]" in tokenizer.decode(row) or (len(word) > 2 and count > len(word) / 2)
        ]
        if unknown:
            notes.append({"code": "unknown_words", "words": [word[:40] for word in unknown[:12]]})
        if tokenizer([text])[1].all():
            notes.append({"code": "cut", "tokens": tokenizer.max_length - 2})
        return notes


def _face(face: int, record: Record, cosine: float, chance: float) -> Face:
    return Face(
        face=int(face),
        id=record.id,
        captions=record.captions,
        attributes=[
            n for n, state in zip(ATTRIBUTES, record.attributes, strict=True) if state == 1
        ],
        cosine=None if np.isnan(cosine) else round(float(cosine), 4),
        match=None if np.isnan(chance) else round(float(chance), 4),
    )
