"""report.md: the data card, with what was measured beside what others publish."""

from __future__ import annotations

from flip_jax.curate.quality import paper
from flip_jax.curate.quality.facts import Facts
from flip_jax.curate.quality.paper import MIN_SIDE

Row = tuple[str, ...]
_NO_CLIP = "not measured: give --clip"
FIGURES = (
    *("resolution.png", "quality.png", "captions.png", "attributes.png", "balance.png"),
    *("groups.png", "stages.png", "faces.png", "faces_by_brisque.png"),
)


def data_card(facts: Facts, figures: list[str]) -> str:
    """The report as Markdown; `figures` are the files of `FIGURES` that are beside it."""
    sections = [
        ("Warnings", _warnings(facts), ()),
        ("Against published data sets", _comparison(facts), ()),
        ("Who is in the pictures", _balance(facts), ("balance",)),
        ("Labels", [], ("attributes",)),
        ("Captions", [], ("captions",)),
        ("Resolution and quality", [], ("resolution", "quality", "faces_by_brisque")),
        ("Splits and groups", _splits(facts), ("groups",)),
        ("Copies", _copies(facts), ()),
        ("How it was made", _stages(facts), ("stages",)),
        ("Licences and sources", _sources(facts), ()),
        ("Pictures", [], ("faces",)),
        ("What this card cannot say", [_LIMITS], ()),
    ]
    lines = [f"# Data card: {_cell(facts['data']['name'])}", "", *_head(facts), ""]
    for title, text, names in sections:
        drawn = [name for name in names if f"{name}.png" in figures]
        if text or drawn:
            lines += [f"## {title}", "", *text, *([""] if text else [])]
        for name in drawn:
            lines += [f"![{name.replace('_', ' ')}]({name}.png)", ""]
    return "\n".join(lines)


_LIMITS = """\
* Labels are taken as they are. CelebA's 40 attributes are binary and in part a matter of taste;
  "Male" and "Young" are how somebody or a model saw a picture, not who the person is. Pale_Skin is
  the only one about skin: an even share of it says nothing of how dark skin is represented.
* A curation keeps only labels that are certain, so shares are of the pictures where one is known.
* BRISQUE was made for whole photographs with added distortions. It tells sharp from blurred or
  compressed; it is not a judgement of a face.
* Groups are as good as the names they were made from: one person under two names is two groups.
* Whether the people agreed, and what the pictures may be used for, no program can find out."""


def _head(facts: Facts) -> list[str]:
    data, splits = facts["data"], len(facts["splits"])
    return [
        f"{_count(facts['pictures']['count'])} pictures, {_count(facts['captions']['count'])} "
        f"image-caption pairs, {_count(facts['groups']['count'])} groups (persons, or copies of "
        f"one picture), in {splits} {'split' if splits == 1 else 'splits'}.",
        "",
        "| | |",
        "|---|---|",
        f"| made from | {_cell(data['source'])} |",
        f"| made by | {_cell(data['created_by'])}, schema version {data['schema_version']} |",
        f"| SHA-256 of the manifest | `{data['manifest_sha256']}` |",
        f"| pictures that were decoded | {_count(facts['quality']['sampled'])}, those whose ids "
        "have the smallest hashes |",
    ]


def _warnings(facts: Facts) -> list[str]:
    return [f"* {text}" for text in facts["warnings"]] or ["None."]


def _comparison(facts: Facts) -> list[str]:
    rows = [*_measured(facts), *_more(facts)]
    return [
        *_table(("", "here", *(each.name for each in paper.PUBLISHED)), rows),
        "",
        "Published figures: arXiv 2407.08515; ~ is read off a plot, - is not given there. The "
        "number of distinct 4-grams grows with that of the captions. CLIP-IQA-type scores of "
        "different models do not compare.",
    ]


def _measured(facts: Facts) -> list[Row]:
    pictures, captions, quality = facts["pictures"], facts["captions"], facts["quality"]
    labels = facts["labels"]
    named = sum(each["present"] + each["absent"] > 0 for each in labels["attributes"].values())
    here = {
        "pictures": _count(pictures["count"]),
        "resolution": f"{pictures['width']['mean']:.0f} x {pictures['height']['mean']:.0f}",
        "attributes": str(named) if named else "none",
        "captions": _count(captions["count"]),
        "words": _words(captions),
        "distinct_4grams": _count(captions["distinct_4grams"]["count"][-1]),
        "brisque": _score(quality["brisque"], "not defined for any sampled picture"),
        "clip_iqa": _score(quality["clip_iqa"], _NO_CLIP),
        "stages": _flow(facts),
    }
    told = {
        "pictures": "pictures",
        "resolution": "mean width x height, pixels",
        "attributes": "attributes",
        "captions": "captions",
        "words": "words per caption, mean",
        "distinct_4grams": "distinct 4-grams",
        "brisque": "BRISQUE, mode",
        "clip_iqa": "CLIP-IQA type, mode",
        "stages": "from the input to the pairs",
    }
    return [
        (title, here[name], *(getattr(each, name) or "-" for each in paper.PUBLISHED))
        for name, title in told.items()
    ]


def _more(facts: Facts) -> list[Row]:
    pictures, captions, labels = facts["pictures"], facts["captions"], facts["labels"]
    small = pictures[f"not_above_{MIN_SIDE}_px"] / pictures["count"]
    kinds = sorted(labels["kinds"].values(), reverse=True)
    known = labels["known_per_picture"]
    return [
        (f"pictures with a side of {MIN_SIDE} px or less", _share(small), "none", "-"),
        (
            "known labels per picture, median (least)",
            f"{known['p50']} ({known['least']})",
            "> 5",
            "-",
        ),
        (
            "kinds of labels among those present, %",
            " / ".join(f"{100 * share:.0f}" for share in kinds),
            "~34 / 27 / 15 / 14 / 10",
            "-",
        ),
        ("distinct words", _count(captions["vocabulary"]), "-", "-"),
        ("distinct captions", _count(captions["distinct"]), "-", "-"),
        (
            "pairs per group, mean (greatest)",
            _spread(facts["groups"]["pairs_per_group"]),
            "-",
            "-",
        ),
        ("captions per picture, mean (greatest)", _spread(captions["per_picture"]), "1", "1"),
    ]


def _words(captions: Facts) -> str:
    spread = captions["words_per_caption"]
    if spread is None:
        return "no captions"
    return f"{spread['mean']:.1f} (5 % to 95 %: {spread['p5']} to {spread['p95']})"


def _score(spread: Facts | None, without: str) -> str:
    if spread is None:
        return without
    return f"{spread['mode']:.3g} (median {spread['p50']:.3g}, 5 % to 95 %: " + (
        f"{spread['p5']:.3g} to {spread['p95']:.3g})"
    )


def _flow(facts: Facts) -> str:
    stages = facts["stages"]
    if stages is None:
        return "not known: no work folder of a build"
    after = {stage["name"]: stage["went_out"] for stage in stages}
    said = [(stages[0]["went_in"], "rows")]
    told = {"faces": "faces", "attributes": "with labels", "kept": "kept"}
    said += [(after[name], word) for name, word in told.items() if name in after]
    return ", ".join(f"{_count(count)} {word}" for count, word in said)


def _splits(facts: Facts) -> list[str]:
    rows = [
        (name, _count(split["pictures"]), _count(split["pairs"]), _count(split["groups"]))
        for name, split in facts["splits"].items()
    ]
    several = facts["groups"]["in_several_splits"]
    exact = "" if facts["groups"]["exact"] else " (estimated from a sample of the groups)"
    return [
        *_table(("split", "pictures", "pairs", "groups"), rows),
        "",
        f"Groups in more than one split: {_count(several)}{exact}.",
    ]


def _balance(facts: Facts) -> list[str]:
    splits = facts["splits"]
    rows = []
    for place, cell in enumerate(facts["balance"]):
        shares = (split["balance"][place]["share"] for split in splits.values())
        rows.append((cell["who"], *map(_share, (cell["share"], *shares)), _count(cell["pictures"])))
    return _table(("by their labels", "share", *splits, "pictures"), rows)


def _stages(facts: Facts) -> list[str]:
    if facts["stages"] is None:
        return []
    rows = []
    for stage in facts["stages"]:
        drops = [f"{_count(n)} {reason}" for reason, n in sorted(stage["dropped"].items()) if n]
        other = [f"{_count(n)} {what}" for what, n in sorted(stage["other"].items())]
        rows.append(
            (
                stage["name"],
                *map(_count, (stage["went_in"], stage["went_out"])),
                _cell(", ".join(drops)),
                _cell(", ".join(other)),
            )
        )
    return _table(("stage", "in", "out", "dropped", "also counted"), rows)


def _sources(facts: Facts) -> list[str]:
    if facts["sources"] is None:
        return []
    rows = []
    for name, column in facts["sources"]["columns"].items():
        values = [f"{_cell(value)} ({_count(n)})" for value, n in column["most_frequent"]]
        values += ["..."] * column["more"]
        rows.append((name, _count(column["known"]), ", ".join(values)))
    return _table(("", "pictures with one", "most frequent"), rows)


def _copies(facts: Facts) -> list[str]:
    copies, joined = facts["copies"], facts["groups"]["joined_by_likeness"]
    rows = [
        ("picture files that are a copy of another, byte for byte", copies["equal_files"]),
        ("of these, in another split", copies["equal_files_across_splits"]),
        ("groups that the curation made of near duplicates", joined["groups"]),
        ("pictures in them", joined["pictures"]),
        ("pairs of near duplicates in the sample", copies["near_pairs_in_sample"]),
        ("of these, in different groups", copies["near_pairs_of_different_groups"]),
    ]
    if facts["sources"] is not None:
        rows.append(("pictures with the pixels of another", facts["sources"]["equal_pixels"]))
    return _table(("", "pictures"), [(name, _count(n)) for name, n in rows])


def _table(head: Row, rows: list[Row]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(text: str) -> str:
    """Text of others in a table: one line, no mark-up."""
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def _count(number: int) -> str:
    return f"{number:,}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _spread(spread: Facts | None) -> str:
    return "-" if spread is None else f"{spread['mean']:.2f} ({_count(spread['greatest'])})"
