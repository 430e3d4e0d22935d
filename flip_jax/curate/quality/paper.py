"""What others publish of their data sets, to stand beside what is measured here.

Source: arXiv 2407.08515, its table of data sets and its plots. Numbers marked with a tilde are read
off plots by eye. None = not given.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    name: str
    pictures: str
    resolution: str  # mean, pixels
    attributes: str
    captions: str
    words: str  # per caption, mean
    distinct_4grams: str | None
    brisque: str | None  # mode
    clip_iqa: str | None  # mode
    stages: str | None  # pictures from the links to the data set


FACECAPTION = Published(
    name="FaceCaption-15M",
    pictures="15M",
    resolution="285 x 285",
    attributes="40",
    captions="15M",
    words="30",
    distinct_4grams="~160,000",
    brisque="~12",
    clip_iqa="~0.73",
    stages="50M links, 37M with a face, 23M crops, 15M pairs",
)
LAION_FACE = Published(
    name="LAION-Face",
    pictures="50M",
    resolution="615 x 615",
    attributes="none",
    captions="50M",
    words="12",
    distinct_4grams=None,
    brisque=None,
    clip_iqa=None,
    stages=None,
)
PUBLISHED = (FACECAPTION, LAION_FACE)

# For the lines in the figures.
MIN_SIDE = 128  # pixels; FaceCaption-15M keeps crops above
MEAN_SIDE, MEAN_WORDS, BRISQUE_MODE, CLIP_IQA_MODE = 285, 30, 12, 0.73
