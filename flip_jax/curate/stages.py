"""What passes through a build, and what a stage of it is.

A stage takes a batch of samples and returns those that go on, changed or split into several. What
does not go on is told to the tally with a reason, so that every row of the input can be accounted
for. Batches, and not single samples, because labelling and rewriting are several times as fast on
many at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from flip_jax.config import to_dict

Item = TypeVar("Item")


class Place(NamedTuple):
    """Where a picture file is: a file, or a part of one."""

    path: str
    offset: int = 0
    size: int = -1  # bytes; -1 = to the end


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture, or one face of it, on its way to a record.

    Attributes:
      id: unique in the input; faces of one picture get `id#0`, `id#1` and so on.
      image: a picture file. Before `faces` as it came (any format, any size), after it the JPEG
        of the crop. Empty before `read` and `fetch`.
      place: where `read` finds the picture; None where it has to be fetched or is there.
      group: the person, where the input names it; else empty.
      url, licence, source: from the input, for the status file; empty where it has none.
      texts: captions of the input, such as the alt text of a web picture.
      captions: captions made here. Records hold these.
      attributes: int8 [40] in the order of `flip_jax.data.attributes.ATTRIBUTES`, 1 present, 0
        absent, -1 unknown; None before `attributes` where the input has no labels.
      probabilities: float32 [40], probability that the attribute is present, NaN where not known;
        None where there are none.
      box: float32 [4], x0, y0, x1, y1 of the face in pixels of `image`. Before `faces` the box
        that the input gives, or None.
      landmarks: float32 [5, 2], (x, y) in pixels of `image`: left eye, right eye, nose, left and
        right corner of the mouth, as seen in the picture (left = smaller x in an upright face).
      confidence: of the detector, 0 to 1; None where it has none.
      pixel_hash, perceptual_hash: 32 bytes each, of the crop; empty before `hashes`.
    """

    id: str
    image: bytes = b""
    place: Place | None = None
    group: str = ""
    url: str = ""
    licence: str = ""
    source: str = ""
    texts: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    attributes: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    box: np.ndarray | None = None
    landmarks: np.ndarray | None = None
    confidence: float | None = None
    pixel_hash: bytes = b""
    perceptual_hash: bytes = b""


@dataclass(frozen=True)
class Drop:
    """A sample that left the build."""

    sample: Sample  # without its picture
    stage: str
    reason: str
    detail: str


@dataclass
class Tally:
    """What became of the samples of a batch or a chunk.

    Attributes:
      drops: samples that did not go on, in order.
      counts: how often something worth a figure happened, by `stage/name`.
    """

    drops: list[Drop] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def drop(self, stage: str, sample: Sample, reason: str, detail: str = "") -> None:
        """Records that `sample` ends here.

        Args:
          reason: a few words in lower case, the same for all samples of the kind, e.g. `too small`.
          detail: what was found, e.g. `96 x 120 px`.
        """
        bare = dataclasses.replace(sample, image=b"")
        self.drops.append(Drop(bare, stage, reason, detail))
        self.counts[f"{stage}/dropped: {reason}"] += 1

    def count(self, stage: str, name: str, number: int = 1) -> None:
        """Adds to a figure that is not a drop, e.g. `("rewrite", "fell back to grammar")`."""
        self.counts[f"{stage}/{name}"] += number


class Stage:
    """One step of a build.

    Made where the pipeline is built, then pickled to the workers: the constructor takes the
    settings and does nothing slow; `setup` loads models and opens connections, once per worker.

    Attributes:
      name: in the status file and the counts.
      version: raise it when the same input gives another output; finished work is then done again.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1

    def __init__(self, cfg: Any):
        self.cfg = cfg  # a frozen dataclass of `flip_jax.curate.config`

    def setup(self) -> None:
        """Called once in each worker, before the first batch."""

    def teardown(self) -> None:
        """Called when a worker is done with its work; not after a kill."""

    def process(self, batch: Sequence[Sample], tally: Tally) -> list[Sample]:
        """Does the work of the stage.

        Args:
          batch: samples in the order of the input; may be empty.
          tally: takes every sample that does not go on.

        Returns:
          What goes on, in the order of `batch`. It must depend on nothing but the samples, the
          settings and what `fingerprint` covers: not on the batch they came in, nor on the clock.

        A fault of one sample is a drop. An exception stops the build: leave it for what concerns
        all samples, e.g. a model file that does not load.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Identifies what the output depends on besides the samples.

        A stage that reads a model file adds the hash of the file. Settings that change only the
        speed (concurrency, cache folders) are better left out.
        """
        return fingerprint(type(self).__name__, self.version, to_dict(self.cfg))


def fingerprint(*parts: Any) -> str:
    """The SHA-256 of values that JSON can hold, in hexadecimal."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields the items in lists of `size`, the last one shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
