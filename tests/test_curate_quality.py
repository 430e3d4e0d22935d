"""The quality report of whole data sets: numbers, warnings, bytes, files, errors."""

import dataclasses
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SHARED
from PIL import Image

pytest.importorskip("apache_beam", reason="curation needs the extra `curate`")

from flip_jax.curate.__main__ import main
from flip_jax.curate.config import (
    CurateConfig,
    FacesConfig,
    InputConfig,
    OutputConfig,
    SplitConfig,
)
from flip_jax.curate.pipeline import build
from flip_jax.curate.quality.card import FIGURES
from flip_jax.curate.quality.report import ReportConfig, collect, write_report
from flip_jax.curate.quality.survey import survey
from flip_jax.data.__main__ import main as data_main
from flip_jax.data.attributes import ATTRIBUTE_INDEX, ATTRIBUTES
from flip_jax.data.drawn_faces import draw_face
from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import MANIFEST, Record, RecordSource, load_manifest
from flip_jax.data.transforms import encode_jpeg

SIDE = 64
MALE, YOUNG = ATTRIBUTE_INDEX["Male"], ATTRIBUTE_INDEX["Young"]


def record(name: str, group: str, picture: int, captions: list[str], male: int = 1) -> Record:
    labels = np.full(len(ATTRIBUTES), -1, np.int8)
    labels[[MALE, YOUNG]] = male, 1
    face = draw_face(seed=0, identity=picture, picture=0, size=SIDE).image
    image = face[: SIDE - picture % 3]  # of three heights
    return Record(
        id=name,
        group_id=group,
        image=encode_jpeg(image, 80),
        captions=captions,
        attributes=labels,
        box=np.zeros(4, np.float32) if picture % 2 else None,
    )


def write(folder: Path, records: list[tuple[str, Record]], shard_bytes: int = 2**28) -> Path:
    with RecordWriter(folder, "drawn by a test", shard_bytes=shard_bytes) as writer:
        for split, each in records:
            writer.write(split, each)
    return folder


def faces() -> list[tuple[str, Record]]:
    """20 pictures of 10 groups in two splits; `p0` is in both, and so is one of its files."""
    found = []
    for number in range(20):
        split = "train" if number < 14 else "test"
        texts = [f"A man with a hat, and number {number}.", "A man with a hat."][: 1 + number % 2]
        found.append((split, record(f"r{number}", f"p{number // 2}", number, texts)))
    copied = msgspec.structs.replace(found[0][1], id="copy")
    none = record("none", "p20", 30, [], male=0)
    return [*found, ("test", copied), ("test", none)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("quality") / "faces", faces())


@pytest.fixture(scope="module")
def report(data, tmp_path_factory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("out") / "report"
    assert main(["report", str(data), "--out", str(out), "--sheet", "9"]) == 0
    return json.loads((out / "report.json").read_text()), out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_numbers(data, report):
    told, _ = report
    assert told["pictures"]["count"] == 22
    assert told["pictures"]["width"] == {"mean": 64, "least": 64, "greatest": 64} | {
        f"p{n}": 64 for n in (1, 5, 25, 50, 75, 95, 99)
    }
    heights = [SIDE - number % 3 for number in (*range(20), 0, 30)]
    assert told["pictures"]["height"]["mean"] == pytest.approx(np.mean(heights), abs=1e-4)
    assert told["pictures"]["height"]["least"] == 62
    assert told["pictures"]["parts"] == {"box": 10, "landmarks": 0, "mask": 0, "polylines": 0}
    captions = told["captions"]
    assert captions["count"] == 31 == sum(captions["words_histogram"])
    assert captions["per_picture_histogram"] == [1, 11, 10]
    assert captions["words_per_caption"]["mean"] == pytest.approx((21 * 8 + 10 * 5) / 31, abs=1e-4)
    assert captions["distinct"] == 21
    # a, man, with, hat, and, number; 0 to 19
    assert captions["vocabulary"] == 26
    # a man with a; man with a hat; with a hat and; a hat and number; hat and number N
    assert captions["distinct_4grams"]["count"][-1] == 4 + 20
    assert captions["distinct_4grams"]["exact"]
    assert told["labels"]["attributes"]["Male"] == {"unknown": 0, "absent": 1, "present": 21}
    assert told["labels"]["known_per_picture"]["greatest"] == 2
    assert told["splits"]["train"]["pictures"] == 14
    assert told["splits"]["test"]["groups"] == 5  # p7, p8, p9, p0 and p20
    manifest = load_manifest(data)
    for split, stats in manifest.splits.items():
        assert told["splits"][split]["pairs"] == stats.captions
        assert told["splits"][split]["groups"] == stats.groups


def test_groups_copies_and_balance(report):
    told, _ = report
    groups = told["groups"]
    assert groups["count"] == 11 and groups["of_one_picture"] == 1
    assert groups["in_several_splits"] == groups["in_several_splits_by_manifest"] == 1
    assert groups["sizes"] == [
        {"least": 1, "greatest": 1, "groups": 1, "pictures": 1},
        {"least": 2, "greatest": 2, "groups": 9, "pictures": 18},
        {"least": 3, "greatest": 4, "groups": 1, "pictures": 3},
    ]
    assert groups["pairs_per_group"]["mean"] == pytest.approx(31 / 11, abs=1e-4)
    copies = told["copies"]
    assert copies["equal_files"] == copies["equal_files_across_splits"] == 1
    assert copies["near_pairs_across_splits"] >= 1
    shares = {cell["who"]: cell["share"] for cell in told["balance"]}
    assert shares["women"] == pytest.approx(1 / 22, abs=1e-4)
    assert shares["young men"] == pytest.approx(21 / 22, abs=1e-4)
    assert shares["older men"] == 0
    assert shares["people labelled pale"] is None


def test_the_warnings_say_what_is_wrong(report):
    told, _ = report
    said = "\n".join(told["warnings"])
    assert "LEAK: groups (persons, or copies of one picture) in more than one split: 1." in said
    assert "picture files that are in more than one split, byte for byte: 1." in said
    assert "Pictures without a caption: 1 of 22." in said
    assert "Few women: 4.5 % of the pictures with Male known, under 10 %" in said
    assert "Pale_Skin (skin) is known for 0.0 % of the pictures only" in said
    assert "Pictures with a side of 128 pixels or less: 22 of 22." in said
    assert "licence and origin of the pictures are unknown" in said
    # Once there are few older people, older men need no warning of their own.
    assert "Few older people" in said and "Few older men" not in said


def test_a_sound_set_gives_no_leak(tmp_path):
    records = [record(f"r{n}", f"p{n}", n, [f"Face {n}."], male=n % 2) for n in range(4)]
    data = write(tmp_path / "data", [("train", each) for each in records])
    told = collect(data, ReportConfig(min_share=0)).told
    assert not [text for text in told["warnings"] if "LEAK" in text or "Few" in text]
    assert told["groups"]["in_several_splits"] == told["copies"]["equal_files"] == 0


def test_near_duplicates_of_the_sample(tmp_path):
    pictures = {"a": (1, "p"), "b": (1, "p"), "c": (2, "q"), "d": (2, "r"), "e": (2, "s")}
    pictures["f"] = (3, "t")
    records = [record(name, group, n, ["A face."]) for name, (n, group) in pictures.items()]
    copies = collect(
        write(tmp_path / "data", [("train", each) for each in records]), ReportConfig()
    ).told["copies"]
    # Of equal hashes each is paired with the first.
    assert copies["near_pairs_in_sample"] == 3
    assert copies["near_pairs_of_different_groups"] == 2
    assert copies["near_pairs_across_splits"] == 0


def test_the_files(report):
    told, out = report
    # No counts of a build, and too few pictures for the sheet by quality.
    drawn = set(FIGURES) - {"stages.png"}
    assert {path.name for path in out.iterdir()} == {"report.json", "report.md", *drawn}
    card = (out / "report.md").read_text()
    assert set(re.findall(r"\]\((\w+\.png)\)", card)) == drawn
    for name in drawn:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "| words per caption, mean | 7.0 (5 % to 95 %: 5 to 8) | 30 | 12 |" in card
    assert "| CLIP-IQA type, mode | not measured: give --clip | ~0.73 | - |" in card
    assert all(f"* {text}" in card for text in told["warnings"])


def test_the_same_bytes_whatever_the_threads_and_shards(data, report, tmp_path, monkeypatch):
    told, out = report
    small = write(tmp_path / "faces", faces(), shard_bytes=4000)
    assert len(load_manifest(small).splits["train"].shards) > 3
    cfg = ReportConfig(sheet=9, threads=1)
    write_report(data, tmp_path / "again", cfg)
    assert contents(tmp_path / "again") == contents(out)
    monkeypatch.setattr("flip_jax.curate.quality.survey._BATCH_BYTES", 5000)  # some pictures
    other = json.loads(json.dumps(collect(small, cfg).told))
    assert other.pop("data")["manifest_sha256"] != told["data"]["manifest_sha256"]
    assert other == {name: value for name, value in told.items() if name != "data"}


def test_the_sample_does_not_depend_on_the_order(tmp_path):
    records = faces()
    chosen, curves = [], []
    for name, order in (("one", records), ("other", records[::-1])):
        folder = write(tmp_path / name, order)
        sources = {split: RecordSource(folder, split) for split in ("test", "train")}
        found = survey(sources, 5)
        chosen.append([sources[split][number].id for split, number in found.sample])
        curves.append(found.words.summary()["distinct_4grams"])
    assert chosen[0] == chosen[1] and curves[0] == curves[1]
    assert len(set(chosen[0])) == 5 and curves[0][0] < curves[0][-1]


def test_no_sheets_no_faces(data, tmp_path):
    write_report(data, tmp_path / "out", ReportConfig(sheet=0))
    assert not list((tmp_path / "out").glob("faces*"))
    assert "faces.png" not in (tmp_path / "out" / "report.md").read_text()


def test_a_set_without_captions_and_labels(tmp_path):
    each = record("r", "p", 0, [])
    each = msgspec.structs.replace(each, attributes=np.full(len(ATTRIBUTES), -1, np.int8))
    out = tmp_path / "out"
    told = write_report(write(tmp_path / "data", [("test", each)]), out, ReportConfig())
    assert told["captions"]["words_per_caption"] is None
    assert not (out / "captions.png").exists() and (out / "balance.png").exists()
    card = (out / "report.md").read_text()
    assert "| words per caption, mean | no captions |" in card and "captions.png" not in card
    assert "| attributes | none | 40 | none |" in card
    assert any(text.startswith("No picture has a label of gender") for text in told["warnings"])


def damage(folder: Path) -> None:
    """Flips bytes of the first record, which the hashes of the file format notice."""
    (shard,) = folder.glob("train-*.array_record")
    content = bytearray(shard.read_bytes())
    place = content.index(b"JFIF") + 40
    content[place : place + 8] = bytes(byte ^ 255 for byte in content[place : place + 8])
    shard.write_bytes(content)


def test_a_damaged_record_is_left_out_and_named(data, tmp_path):
    shutil.copytree(data, tmp_path / "faces")
    damage(tmp_path / "faces")
    told = collect(tmp_path / "faces", ReportConfig()).told
    assert told["pictures"]["count"] == 21
    assert told["pictures"]["unreadable"]["count"] == 1
    assert "train-00000.array_record record 0" in told["pictures"]["unreadable"]["first"][0]
    assert any(text.startswith("Records that cannot be read: 1.") for text in told["warnings"])


def counts_of(kept: int) -> dict[str, int]:
    return {"input/rows": kept + 3, "faces/in": kept + 3, "faces/dropped: no face": 3} | {
        "faces/out": kept, "kept/train": kept
    }  # fmt: skip


def test_what_a_build_dropped(data, tmp_path, capsys):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "counts.json").write_text(json.dumps(counts_of(22)))
    cfg = ReportConfig(work=tmp_path / "work", sheet=0)
    told = write_report(data, tmp_path / "out", cfg)
    assert [stage["name"] for stage in told["stages"]] == ["input", "faces", "kept"]
    assert told["stages"][1] == {
        "name": "faces", "went_in": 25, "went_out": 22, "dropped": {"no face": 3}, "other": {}
    }  # fmt: skip
    card = (tmp_path / "out" / "report.md").read_text()
    assert "| faces | 25 | 22 | 3 no face |  |" in card and "](stages.png)" in card
    (tmp_path / "work" / "counts.json").write_text(json.dumps(counts_of(9)))
    with pytest.raises(ValueError, match="kept 9 pictures, the data set has 22"):
        collect(data, cfg)
    (tmp_path / "work" / "counts.json").write_text("[1")
    with pytest.raises(ValueError, match="does not hold counts"):
        collect(data, cfg)


def sources_table(rows: list[dict]) -> pa.Table:
    names = ("split", "id", "group_id", "url", "licence", "source", "pixel_sha256")
    return pa.Table.from_pylist([{name: row.get(name, "") for name in names} for row in rows])


def test_licences_and_sources(data, tmp_path):
    shutil.copytree(data, tmp_path / "faces")
    rows = [{"licence": "cc0", "source": "drawn|here", "pixel_sha256": "ab" * 32}] * 2
    rows += [
        {"url": f"https://a.test/{n}" if n else "http://[no-host", "pixel_sha256": f"{n:064x}"}
        for n in range(20)
    ]
    # Hashes are told apart by their beginnings, which are zeros here: 19 more copies.
    pq.write_table(sources_table(rows), tmp_path / "faces" / "sources.parquet")
    told = write_report(tmp_path / "faces", tmp_path / "out", ReportConfig(sheet=0))
    assert told["sources"]["columns"]["licence"] == {
        "known": 2, "most_frequent": [["cc0", 2]], "more": False
    }  # fmt: skip
    assert told["sources"]["columns"]["host"]["most_frequent"] == [["a.test", 19]]
    assert told["sources"]["equal_pixels"] == 1 + 19
    assert "Pictures without a licence in the table of sources: 20 of 22." in told["warnings"]
    assert r"drawn\|here (2)" in (tmp_path / "out" / "report.md").read_text()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "faces" / "sources.parquet")
    with pytest.raises(ValueError, match="no column licence, pixel_sha256, source, url"):
        collect(tmp_path / "faces", ReportConfig())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample", "0"], "--sample 0: must be at least 1"),
        (["--min-share", "2"], "--min-share 2: must be from 0 to 1"),
        (["--clip", "nowhere"], "--clip nowhere: no such folder"),
        (["--work", "nowhere"], "--work nowhere: holds no counts.json"),
    ],
)
def test_what_is_refused(data, tmp_path, capsys, arguments, message):
    assert main(["report", str(data), "--out", str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_where_a_report_goes(data, report, tmp_path):
    _, made = report
    out = tmp_path / "out"
    shutil.copytree(made, out)
    with pytest.raises(ValueError, match="is inside the data set"):
        write_report(data, data / "report", ReportConfig())
    with pytest.raises(ValueError, match="exists and is not empty"):
        write_report(data, out, ReportConfig())
    write_report(data, out, ReportConfig(sheet=0), overwrite=True)
    assert not list(out.glob("faces*")) and not list(tmp_path.glob(".*"))
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"holds more than a report \(mine\.txt\)"):
        write_report(data, out, ReportConfig(), overwrite=True)
    with pytest.raises(FileNotFoundError, match=MANIFEST):
        write_report(out, tmp_path / "new", ReportConfig())
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_after_a_build(tmp_path):
    (tmp_path / "photos").mkdir()
    rows = []
    for number in range(8):
        face = draw_face(seed=0, identity=number // 2, picture=number % 2, size=SIDE)
        Image.fromarray(face.image).save(tmp_path / "photos" / f"{number}.png")
        labels = dict(zip(ATTRIBUTES, face.attributes.tolist(), strict=True))
        rows.append({"file": f"{number}.png", "who": f"p{number // 2}", **labels})
    shutil.copy(tmp_path / "photos" / "7.png", tmp_path / "photos" / "same.png")
    rows += [{**rows[0], "file": "gone.png"}, {**rows[7], "file": "same.png"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "faces.parquet")
    cfg = CurateConfig(
        input=InputConfig(
            paths=f"{tmp_path}/faces.parquet",
            images=f"{tmp_path}/photos",
            file_column="file",
            group_column="who",
            licence="cc0",
        ),
        faces=FacesConfig(detector="whole", min_side=32),
        split=SplitConfig(train=1, val=0, test=0),
        output=OutputConfig(path=f"{tmp_path}/data"),
    )
    build(cfg)
    told = write_report(tmp_path / "data", tmp_path / "out", ReportConfig())
    stages = {stage["name"]: stage for stage in told["stages"]}
    assert stages["input"]["went_in"] == 10
    assert stages["dedupe"]["dropped"]["equal picture"] == 1
    assert stages["read"]["dropped"]["unreadable file"] == 1
    assert stages["kept"]["went_out"] == 8
    assert stages["captions"]["other"] == {"made by grammar": 45}
    flow = [(stage["went_in"], stage["went_out"]) for stage in told["stages"]]
    assert all(out == later for (_, out), (later, _) in pairwise(flow))
    assert told["sources"]["columns"]["licence"]["most_frequent"] == [["cc0", 8]]
    assert not [text for text in told["warnings"] if "licence" in text or "LEAK" in text]
    card = (tmp_path / "out" / "report.md").read_text()
    assert "10 rows, 9 faces, 9 with labels, 8 kept" in card


def test_real_photographs(tmp_path):
    folder = SHARED / "real_faces"
    if not folder.is_dir():
        pytest.skip("no photographs on this machine")
    table = pq.read_table(folder / "attributes.parquet")
    pq.write_table(table.slice(0, 300), tmp_path / "faces.parquet")
    build = ["build", "--table", f"{tmp_path}/faces.parquet", "--images", f"{folder}/images"]
    columns = ["--group-column", "identity", "--split-column", "split", "--captions", "1"]
    assert data_main([*build, *columns, "--out", f"{tmp_path}/data"]) == 0
    told = collect(tmp_path / "data", ReportConfig()).told
    assert told["quality"]["sampled"] == 300 and told["quality"]["undecodable"]["count"] == 0
    # Sharp, well lit photographs in JPEG.
    assert 5 < told["quality"]["brisque"]["p50"] < 35
    men = np.mean(table.slice(0, 300)["Male"].to_numpy() == 1)
    assert told["balance"][0]["share"] == pytest.approx(men, abs=1e-4)
    assert dataclasses.asdict(ReportConfig())["sample"] > 300  # all were sampled
