"""The numbers of a report as plain dicts and lists: what report.json holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from flip_jax.curate.quality import balance, numbers
from flip_jax.curate.quality.history import Sources, StageCounts
from flip_jax.curate.quality.paper import MIN_SIDE
from flip_jax.curate.quality.sample import Sampled
from flip_jax.curate.quality.survey import PARTS, Survey
from flip_jax.curate.quality.words import TENTHS, N
from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.records import Manifest

VERSION = 1  # of report.json
Facts = dict[str, Any]

# The five kinds of arXiv 2407.08515; which attribute is of which kind is not printed there.
KINDS = {
    "facial features": (
        *("Arched_Eyebrows", "Bags_Under_Eyes", "Big_Lips", "Big_Nose", "Bushy_Eyebrows"),
        *("Double_Chin", "High_Cheekbones", "Mouth_Slightly_Open", "Narrow_Eyes", "Oval_Face"),
        *("Pointy_Nose", "Rosy_Cheeks", "Smiling"),
    ),
    "elementary": ("Attractive", "Blurry", "Chubby", "Male", "Pale_Skin", "Young"),
    "beard type": ("5_o_Clock_Shadow", "Goatee", "Mustache", "No_Beard", "Sideburns"),
    "hairstyle": (
        *("Bald", "Bangs", "Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair"),
        *("Receding_Hairline", "Straight_Hair", "Wavy_Hair"),
    ),
    "accessories": (
        *("Eyeglasses", "Heavy_Makeup", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick"),
        *("Wearing_Necklace", "Wearing_Necktie"),
    ),
}

# Bins of the shorter side, in pixels: twelve from each power of two to the next.
SIDE_EDGES = np.unique(np.round(2 ** np.arange(3, 14.01, 1 / 12))).astype(np.int64)
BRISQUE_EDGES = np.arange(-20, 121, 2)
CLIP_IQA_EDGES = np.arange(51) / 50
# Histograms end here; the last bin has all that is more.
_MANY_WORDS, _MANY_CAPTIONS = 200, 25


def of_pictures(found: Survey) -> Facts:
    counts = numbers.binned(found.shorter, SIDE_EDGES)
    return {
        "count": found.pictures,
        "width": numbers.of_counts(found.width),
        "height": numbers.of_counts(found.height),
        "shorter_side": numbers.of_counts(found.shorter),
        "shorter_side_histogram": {"edges": SIDE_EDGES.tolist(), "counts": counts.tolist()},
        f"not_above_{MIN_SIDE}_px": int(found.shorter[: MIN_SIDE + 1].sum()),
        "parts": {
            part: sum(split.parts[part] for split in found.splits.values()) for part in PARTS
        },
        "unreadable": {"count": found.bad[0], "first": found.bad[1]},
    }


def of_captions(found: Survey) -> Facts:
    words = found.words.summary()
    lengths = found.words.lengths
    spread = numbers.of_counts(lengths)
    if spread:
        spread["mean"] = round(words["words"] / words["captions"], 4)
    return {
        "count": words["captions"],
        "per_picture": numbers.of_counts(found.captions),
        "per_picture_histogram": _cut(found.captions, _MANY_CAPTIONS),
        "pictures_without": int(found.captions[0]),
        "words_per_caption": spread,
        "words_histogram": _cut(lengths, _MANY_WORDS),
        "distinct": words["distinct_captions"],
        "vocabulary": words["vocabulary"],
        f"distinct_{N}grams": {
            "by_share_of_data": [n / TENTHS for n in range(1, TENTHS + 1)],
            "count": words["distinct_4grams"],
            "exact": words["distinct_4grams_exact"],
        },
    }


def _cut(counts: np.ndarray, end: int) -> list[int]:
    return np.trim_zeros(np.append(counts[:end], counts[end:].sum()), "b").tolist()


def of_labels(found: Survey) -> Facts:
    labels = sum(split.labels for split in found.splits.values())
    counted = {
        name: dict(zip(("unknown", "absent", "present"), row, strict=True))
        for name, row in zip(ATTRIBUTES, labels.tolist(), strict=True)
    }
    present = max(sum(each["present"] for each in counted.values()), 1)
    return {
        "known_per_picture": numbers.of_counts(found.labels_known),
        "attributes": counted,
        "kinds": {
            kind: round(sum(counted[name]["present"] for name in names) / present, 4)
            for kind, names in KINDS.items()
        },
    }


def of_groups(found: Survey, manifest: Manifest) -> Facts:
    groups = found.groups
    pictures, pairs = groups.counts.T
    several = np.bitwise_count(groups.marks) > 1
    return {
        "count": groups.estimate(np.ones(len(pictures), bool)),
        "exact": groups.share == 1,
        "of_one_picture": groups.estimate(pictures == 1),
        "pictures_per_group": numbers.of_counts(np.bincount(pictures)),
        "pairs_per_group": numbers.of_counts(np.bincount(pairs)),
        "sizes": _sizes(pictures, groups.share),
        "in_several_splits": groups.estimate(several),
        "in_several_splits_by_manifest": manifest.groups_in_several_splits,
        "joined_by_likeness": {"groups": found.near[0], "pictures": found.near[1]},
    }


def _sizes(pictures: np.ndarray, share: float) -> list[dict[str, int]]:
    """Groups and pictures by size of the group: 1, 2, 3-4, 5-8 and so on."""
    found, least = [], 1
    while least <= (int(pictures.max()) if len(pictures) else 0):
        greatest = max(2 * (least - 1), least)
        here = pictures[(pictures >= least) & (pictures <= greatest)]
        row = {"least": least, "greatest": greatest, "groups": round(len(here) / share)}
        found.append(row | {"pictures": round(int(here.sum()) / share)})
        least = greatest + 1
    return found


def of_copies(found: Survey, sampled: Sampled) -> Facts:
    files = found.files
    extra = (files.counts[:, 0] - 1).sum() if len(files.counts) else 0
    return {
        "equal_files": round(int(extra) / files.share),
        "equal_files_across_splits": files.estimate(np.bitwise_count(files.marks) > 1),
        "exact": files.share == 1,
        "near_pairs_in_sample": sampled.near[0],
        "near_pairs_of_different_groups": sampled.near[1],
        "near_pairs_across_splits": sampled.near[2],
    }


def of_splits(found: Survey, manifest: Manifest) -> Facts:
    return {
        name: {
            "pictures": split.pictures,
            "pairs": split.pairs,
            "groups": manifest.splits[name].groups,  # exact, however many there are
            "balance": of_balance(balance.cells(split.labels, split.crossed)),
        }
        for name, split in found.splits.items()
    }


def of_balance(cells: list[balance.Cell]) -> list[Facts]:
    return [
        {
            "who": cell.said,
            "labels": cell.labels,
            "pictures": cell.pictures,
            "known": cell.known,
            "share": None if cell.share is None else round(cell.share, 4),
        }
        for cell in cells
    ]


def of_quality(sampled: Sampled) -> Facts:
    brisque = sampled.brisque[np.isfinite(sampled.brisque)]
    return {
        "sampled": len(sampled.places),
        "undecodable": {"count": sampled.bad[0], "first": sampled.bad[1]},
        "brisque": _scores(brisque, BRISQUE_EDGES, 2),
        "brisque_undefined": len(sampled.brisque) - len(brisque),
        "clip_iqa": None
        if sampled.clip_iqa is None
        else _scores(sampled.clip_iqa, CLIP_IQA_EDGES, 0.02),
    }


def _scores(values: np.ndarray, edges: np.ndarray, width: float) -> Facts | None:
    spread = numbers.of_values(values, width, 4)
    if spread is None:
        return None
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    return spread | {"histogram": {"edges": edges.tolist(), "counts": counts.tolist()}}


def of_stages(stages: list[StageCounts] | None) -> list[Facts] | None:
    return None if stages is None else [dataclasses.asdict(stage) for stage in stages]


def of_sources(sources: Sources | None) -> Facts | None:
    if sources is None:
        return None
    return {
        "rows": sources.rows,
        "equal_pixels": sources.equal_pixels,
        "columns": {
            name: {
                "known": column.known,
                "most_frequent": [list(item) for item in column.values],
                "more": column.more,
            }
            for name, column in sources.columns.items()
        },
    }
