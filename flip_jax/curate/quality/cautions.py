"""What a reader of the report should know first, in plain words."""

from __future__ import annotations

from flip_jax.curate.quality import balance
from flip_jax.curate.quality.facts import Facts
from flip_jax.curate.quality.paper import MIN_SIDE

_SMALL = 0.01  # share of small pictures that is worth a word
_LARGE_GROUP = 0.05  # share of all pictures in one group
_SAME_CAPTION = 0.5  # share of captions that are like no other


def all_of(facts: Facts, cells: list[balance.Cell], min_share: float) -> list[str]:
    """Warnings of a report, the gravest first: what would make results wrong, then who is hardly
    there, then the rest."""
    return [
        *_leaks(facts),
        *_damage(facts),
        *balance.warnings(cells, facts["pictures"]["count"], min_share),
        *_captions(facts["captions"], facts["pictures"]["count"]),
        *_pictures(facts),
        *_sources(facts["sources"], facts["pictures"]["count"]),
    ]


def _leaks(facts: Facts) -> list[str]:
    groups, copies = facts["groups"], facts["copies"]
    said = []
    count = max(groups["in_several_splits"], groups["in_several_splits_by_manifest"])
    if count:
        said.append(
            f"LEAK: groups (persons, or copies of one picture) in more than one split: {count:,}. "
            "Results on the other splits are too good. Split by group and build again."
        )
    if count := copies["equal_files_across_splits"]:
        said.append(
            f"LEAK: picture files that are in more than one split, byte for byte: {count:,}. Give "
            "copies one group, or leave them out, and build again."
        )
    if count := copies["near_pairs_across_splits"]:
        said.append(
            "LEAK: pairs of sampled pictures that look alike (near duplicates) and are in "
            f"different splits: {count:,}."
        )
    if count := copies["near_pairs_of_different_groups"]:
        said.append(
            f"Pairs of sampled pictures that look alike but are in different groups: {count:,}. In "
            "training each counts as a wrong answer for the other."
        )
    return said


def _damage(facts: Facts) -> list[str]:
    said = []
    if count := facts["pictures"]["unreadable"]["count"]:
        said.append(
            f"Records that cannot be read: {count:,}. `python -m flip_jax.data verify` names them."
        )
    if count := facts["quality"]["undecodable"]["count"]:
        said.append(f"Sampled pictures that do not decode: {count:,}.")
    return said


def _captions(captions: Facts, pictures: int) -> list[str]:
    said = []
    if count := captions["pictures_without"]:
        said.append(
            f"Pictures without a caption: {count:,} of {pictures:,}. Training passes over them."
        )
    if captions["count"] and captions["distinct"] < _SAME_CAPTION * captions["count"]:
        share = captions["distinct"] / captions["count"]
        said.append(
            f"Only {share:.0%} of the captions differ from each other: many pictures share theirs, "
            "and retrieval cannot tell such pictures apart."
        )
    return said


def _pictures(facts: Facts) -> list[str]:
    pictures, groups = facts["pictures"], facts["groups"]
    said = []
    small = pictures[f"not_above_{MIN_SIDE}_px"]
    if small > _SMALL * pictures["count"]:
        said.append(
            f"Pictures with a side of {MIN_SIDE} pixels or less: {small:,} of "
            f"{pictures['count']:,}. FaceCaption-15M leaves them out."
        )
    largest = groups["pictures_per_group"]["greatest"]
    if largest > _LARGE_GROUP * pictures["count"] and groups["count"] > 1:
        said.append(
            f"One group has {largest:,} of {pictures['count']:,} pictures: a model will know that "
            "person rather than faces."
        )
    return said


def _sources(sources: Facts | None, pictures: int) -> list[str]:
    if sources is None:
        return [
            "No table of sources beside the data: licence and origin of the pictures are unknown."
        ]
    lacking = pictures - sources["columns"]["licence"]["known"]
    if lacking > 0:
        return [f"Pictures without a licence in the table of sources: {lacking:,} of {pictures:,}."]
    return []
