"""What takes decoding: BRISQUE, a CLIP-IQA-type score and near duplicates, over a sample."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flip_jax.curate.config import DedupeConfig
from flip_jax.curate.dedupe import BANDS, band_first, near_pairs
from flip_jax.curate.pictures import perceptual_hash
from flip_jax.curate.quality.brisque import brisque
from flip_jax.curate.quality.clip_iqa import ClipIqa
from flip_jax.curate.quality.survey import NAMED
from flip_jax.curate.sorter import Sorter
from flip_jax.data.records import RecordSource
from flip_jax.data.transforms import BadImage, decode_image

_AT_A_TIME = 32  # pictures; bounds the memory


@dataclass
class Sampled:
    """The pictures of a sample that could be decoded, N of them, in the order of the sample.

    Attributes:
      places: split and number of each.
      brisque: float64 [N]; NaN where it is not defined.
      clip_iqa: float64 [N], or None where no model was given.
      near: pairs that look alike; those of them in different groups; and in different splits.
      bad: how many could not be decoded, and the first of them by name and reason.
    """

    places: list[tuple[str, int]]
    brisque: np.ndarray
    clip_iqa: np.ndarray | None
    near: tuple[int, int, int]
    bad: tuple[int, list[str]]


@dataclass(frozen=True)
class _Picture:
    place: tuple[str, int]
    group: str
    brisque: float
    hash: bytes
    prepared: np.ndarray | None  # for CLIP


def measure(
    sources: dict[str, RecordSource],
    places: list[tuple[str, int]],
    clip: ClipIqa | None,
    threads: int,
) -> Sampled:
    """Decodes and scores some records.

    Args:
      sources: by name of the split.
      places: split and number of each record.
      clip: None = no CLIP-IQA-type score.
      threads: decode and score so many pictures at a time; does not change the result.

    Raises:
      OSError: a shard cannot be read.
    """
    found: list[_Picture] = []
    scores: list[np.ndarray] = []
    bad: list[str] = []

    def picture(place: tuple[str, int]) -> _Picture | str:
        record = sources[place[0]][place[1]]
        try:
            image = decode_image(record.image)
        except BadImage as error:
            return f"{record.id}: {error}"
        prepared = None if clip is None else clip.prepare(image)
        return _Picture(place, record.group_id, brisque(image), perceptual_hash(image), prepared)

    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(places), desc="pictures", unit="", disable=None) as progress,
    ):
        for start in range(0, len(places), _AT_A_TIME):
            done = list(pool.map(picture, places[start : start + _AT_A_TIME]))
            bad += (each for each in done if isinstance(each, str))
            good = [each for each in done if isinstance(each, _Picture)]
            if clip is not None and good:
                scores.append(clip.scores(np.stack([each.prepared for each in good])))
            found += (_Picture(e.place, e.group, e.brisque, e.hash, None) for e in good)
            progress.update(len(done))
    return Sampled(
        places=[each.place for each in found],
        brisque=np.array([each.brisque for each in found]),
        clip_iqa=None if clip is None else np.concatenate([np.zeros(0), *scores]),
        near=_near(found),
        bad=(len(bad), bad[:NAMED]),
    )


def _near(pictures: list[_Picture]) -> tuple[int, int, int]:
    """Pairs that look alike, as the curation sees it: in all, across groups, across splits."""
    if not pictures:
        return 0, 0, 0
    hashes = np.frombuffer(b"".join(each.hash for each in pictures), "<u8").reshape(-1, 4)
    rows = np.column_stack([hashes, np.arange(len(hashes), dtype=np.uint64)])
    found = [np.empty((0, 2), np.uint64)]
    with tempfile.TemporaryDirectory() as name:
        for band in range(BANDS):
            by_band = Sorter(Path(name), rows.shape[1])
            by_band.add(band_first(rows, band))
            blocks, distance = by_band.sorted(), DedupeConfig().max_distance
            found += near_pairs(blocks, distance, Path(name), equals=band == 0)
    pairs = np.unique(np.sort(np.concatenate(found), axis=1), axis=0).astype(np.int64)
    groups = np.unique([each.group for each in pictures], return_inverse=True)[1]
    splits = np.unique([each.place[0] for each in pictures], return_inverse=True)[1]
    first, second = pairs.T
    apart = (groups[first] != groups[second]).sum(), (splits[first] != splits[second]).sum()
    return len(pairs), *map(int, apart)
