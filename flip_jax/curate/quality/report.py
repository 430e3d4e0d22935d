"""Making the report of a data set, whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from flip_jax.curate.quality import balance, card, cautions, facts, figures, sheets
from flip_jax.curate.quality.clip_iqa import ClipIqa
from flip_jax.curate.quality.facts import Facts
from flip_jax.curate.quality.history import COUNTS, read_sources, read_stages
from flip_jax.curate.quality.sample import Sampled, measure
from flip_jax.curate.quality.survey import survey
from flip_jax.data.records import RecordSource, load_manifest

JSON, CARD = "report.json", "report.md"


@dataclass(frozen=True)
class ReportConfig:
    """What a report is made of.

    Attributes:
      sample: pictures that are decoded.
      min_share: of the pictures with a label of age, gender or skin known; a smaller one is a
        warning.
      sheet: pictures on the sheet of faces; 0 = the report shows no picture of the data.
      clip: folder of a CLIP for the CLIP-IQA-type score; None = not measured.
      work: work folder of the build; None = the one beside the data, if it is there.
      threads: decode so many pictures at a time; does not change the result.
    """

    sample: int = 4000
    min_share: float = 0.1
    sheet: int = 40
    clip: Path | None = None
    work: Path | None = None
    threads: int = 2

    def __post_init__(self):
        for name, least in (("sample", 1), ("sheet", 0), ("threads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least {least}")
        if not 0 <= self.min_share <= 1:
            raise ValueError(f"--min-share {self.min_share:g}: must be from 0 to 1")


def write_report(data: Path, out: Path, cfg: ReportConfig, *, overwrite: bool = False) -> Facts:
    """Reads a data set and writes report.json, report.md and the figures.

    The same data and settings give the same bytes.

    Args:
      data: folder with a manifest.
      out: the folder to make.
      overwrite: replace a report that is already there.

    Returns:
      What report.json holds.

    Raises:
      ValueError: `out` is taken, or something to read is not what it should be.
      OSError: something cannot be read or written.
      ImportError: a CLIP was given and PyTorch is not installed.
    """
    _check_target(data, out, overwrite)
    found = collect(data, cfg)
    _write(found, cfg.sheet, out)
    return found.told


@dataclass(frozen=True)
class Collected:
    """A report before it is written.

    Attributes:
      told: what report.json holds.
      sources: the records, by split.
      sampled: the pictures that were decoded.
    """

    told: Facts
    sources: dict[str, RecordSource]
    sampled: Sampled


def collect(data: Path, cfg: ReportConfig) -> Collected:
    """Reads a data set; see `write_report`."""
    manifest = load_manifest(data)
    sources = {name: RecordSource(data, name) for name in manifest.splits}
    clip = None if cfg.clip is None else ClipIqa(cfg.clip)
    work = _work_folder(data, cfg.work)
    pictures = sum(split.records for split in manifest.splits.values())
    stages = None if work is None else read_stages(work, pictures)
    origin = read_sources(data)

    found = survey(sources, cfg.sample)
    if not found.pictures:
        raise ValueError(f"no record of {data} can be read: {found.bad[1][0]}")
    sampled = measure(sources, found.sample, clip, cfg.threads)
    labels, crossed = (
        sum(getattr(split, name) for split in found.splits.values())
        for name in ("labels", "crossed")
    )
    cells = balance.cells(labels, crossed)
    told = {
        "report_version": facts.VERSION,
        "data": {
            "name": data.resolve().name,
            "source": manifest.source,
            "created_by": manifest.created_by,
            "schema_version": manifest.schema_version,
            "manifest_sha256": next(iter(sources.values())).manifest_hash,
        },
        "settings": {
            "sample": cfg.sample,
            "min_share": cfg.min_share,
            "clip": None if clip is None else clip.name,
        },
        "splits": facts.of_splits(found, manifest),
        "pictures": facts.of_pictures(found),
        "captions": facts.of_captions(found),
        "labels": facts.of_labels(found),
        "balance": facts.of_balance(cells),
        "groups": facts.of_groups(found, manifest),
        "copies": facts.of_copies(found, sampled),
        "quality": facts.of_quality(sampled),
        "stages": facts.of_stages(stages),
        "sources": facts.of_sources(origin),
    }
    told["warnings"] = cautions.all_of(told, cells, cfg.min_share)
    return Collected(told, sources, sampled)


def _work_folder(data: Path, given: Path | None) -> Path | None:
    if given is not None:
        return given
    data = data.resolve()
    beside = data.with_name(data.name + ".work")
    return beside if (beside / COUNTS).is_file() else None


def _write(found: Collected, sheet: int, out: Path) -> None:
    told, sources, sampled = found.told, found.sources, found.sampled
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        names = figures.draw_all(told, folder)
        if sheet and sampled.places:
            figures.save(sheets.of_sample(sources, sampled, sheet), folder / "faces.png")
            names.append("faces.png")
            if (ranked := sheets.by_brisque(sources, sampled)) is not None:
                figures.save(ranked, folder / "faces_by_brisque.png")
                names.append("faces_by_brisque.png")
        (folder / JSON).write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        (folder / CARD).write_text(card.data_card(told, names))
        folder.chmod(0o755)  # mkdtemp's folder is private
        if out.exists():
            old = folder.with_name(folder.name + ".old")
            out.rename(old)
            folder.rename(out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_target(data: Path, out: Path, overwrite: bool) -> None:
    """Refuses a place that is taken by anything but an older report."""
    target = out.resolve()
    if target == data.resolve() or data.resolve() in target.parents:
        raise ValueError(f"--out {out} is inside the data set; a report goes to another folder")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"--out {out} exists and is not empty; choose another or give --overwrite")
    known = {JSON, CARD, *card.FIGURES}
    extra = [] if not target.is_dir() else sorted({path.name for path in target.iterdir()} - known)
    if not (target / JSON).is_file() or extra:
        raise ValueError(
            f"--out {out} holds more than a report ({', '.join(extra[:5]) or 'no ' + JSON}) and is "
            "not overwritten; choose another folder"
        )
