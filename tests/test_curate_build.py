"""Whole builds on drawn faces: what is kept and why, the same bytes however the work is done."""

import dataclasses
import functools
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SHARED
from PIL import Image

pytest.importorskip("apache_beam", reason="curation needs the extra `curate`")

from apache_beam.io.localfilesystem import LocalFileSystem

from flip_jax.curate.__main__ import main
from flip_jax.curate.config import (
    AttributesConfig,
    BeamConfig,
    CaptionsConfig,
    CurateConfig,
    DedupeConfig,
    FacesConfig,
    FetchConfig,
    InputConfig,
    OptOutConfig,
    OutputConfig,
    SplitConfig,
)
from flip_jax.curate.pipeline import build
from flip_jax.data.__main__ import main as data_main
from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.drawn_faces import draw_face
from flip_jax.data.records import RecordSource, load_manifest
from flip_jax.data.transforms import decode_image

PEOPLE, SIDE = 30, 64


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two pictures of each person, with labels; the second of person 3 is copied under another
    name and shrunk under a third, the first of person 4 is also person 5's."""
    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for person in range(PEOPLE):
        for picture in range(2):
            face = draw_face(seed=0, identity=person, picture=picture, size=SIDE)
            name = f"{person:02d}-{picture}.png"
            Image.fromarray(face.image).save(folder / name)
            rows.append({"file": name, "who": f"p{person}", "attributes": face.attributes})
    copy = Image.open(folder / "03-1.png")
    copy.save(folder / "copy.png", compress_level=1)
    copy.resize((56, 56), Image.Resampling.LANCZOS).save(folder / "small.png")
    rows.append({**rows[7], "file": "copy.png", "who": None})
    rows.append({**rows[7], "file": "small.png", "who": None})
    (folder / "shared.png").write_bytes((folder / "04-0.png").read_bytes())
    rows.append({**rows[8], "file": "shared.png", "who": "p5"})
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    rows.append({**rows[0], "file": "broken.jpg", "who": "p0"})
    rows.append({**rows[0], "file": "gone.jpg", "who": "p0"})
    few = np.full(40, -1, np.int8)
    few[:5] = 1
    rows.append({"file": "29-0.png", "who": "p29", "attributes": few})
    Image.open(folder / "02-0.png").resize((20, 20)).save(folder / "tiny.png")
    rows.append({**rows[0], "file": "tiny.png", "who": "p0"})
    labels = np.stack([row["attributes"] for row in rows])
    columns = {name: labels[:, index] for index, name in enumerate(ATTRIBUTES)}
    table = {
        "file": [row["file"] for row in rows],
        "id": [f"{number}:{row['file']}" for number, row in enumerate(rows)],
        "who": [row["who"] for row in rows],
        "url": [f"http://host{number % 3}.test/{number}" for number in range(len(rows))],
        "licence": ["cc0" if number % 2 else None for number in range(len(rows))],
        **columns,
    }
    pq.write_table(pa.table(table), folder / "faces.parquet")
    return folder


def config(photos: Path, out: Path, **changes) -> CurateConfig:
    cfg = CurateConfig(
        input=InputConfig(
            paths=f"{photos}/faces.parquet",
            images=str(photos),
            id_column="id",
            file_column="file",
            url_column="url",
            group_column="who",
            licence_column="licence",
            licence="unknown",
            source="drawn",
            chunk_rows=9,
        ),
        faces=FacesConfig(detector="whole", min_side=24),
        captions=CaptionsConfig(count=2),
        split=SplitConfig(train=0.6, val=0.2, test=0.2),
        output=OutputConfig(path=str(out), shard_bytes=30_000),
    )
    return replace(cfg, **changes)


@pytest.fixture(scope="module")
def built(photos, tmp_path_factory) -> tuple[Path, dict[str, int]]:
    out = tmp_path_factory.mktemp("built") / "data"
    return out, build(config(photos, out))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def records(folder: Path) -> dict[str, list]:
    splits = load_manifest(folder).splits
    sources = {split: RecordSource(folder, split) for split in splits}
    return {
        split: [source[number] for number in range(len(source))]
        for split, source in sources.items()
    }


def status(out: Path) -> list[dict]:
    return pq.read_table(f"{out}.work/status").to_pylist()


def test_every_row_is_accounted_for(built):
    out, counts = built
    rows = status(out)
    assert len(rows) == counts["input/rows"] == 2 * PEOPLE + 7
    found = Counter((row["stage"], row["reason"]) for row in rows)
    kept = found.pop(("kept", None))
    assert found == {
        ("read", "unreadable file"): 1,
        ("read", "not a picture"): 1,
        ("faces", "too small"): 1,
        ("attributes", "few labels"): 1,
        ("dedupe", "equal picture"): 2,
    }
    assert kept == 2 * PEOPLE + 1
    for (stage, reason), number in found.items():
        assert counts[f"{stage}/dropped: {reason}"] == number
    assert sum(counts[f"kept/{split}"] for split in ("train", "val", "test")) == kept
    assert counts["captions/made by grammar"] == 2 * (kept + 2)
    assert counts["faces/in"] == counts["faces/out"] + 1
    assert json.loads(Path(f"{out}.work/counts.json").read_text()) == counts


def test_the_records_are_as_the_manifest_says(built):
    out, counts = built
    assert data_main(["verify", str(out)]) == 0
    manifest = load_manifest(out)
    for split, found in records(out).items():
        stats = manifest.splits[split]
        assert stats.records == len(found) == counts[f"kept/{split}"]
        assert stats.groups == len({record.group_id for record in found})
        assert stats.captions == 2 * len(found)
        words = [len(text.split()) for record in found for text in record.captions]
        assert stats.words_per_caption.mean == pytest.approx(np.mean(words), rel=1e-12)
        assert stats.words_per_caption.least == min(words)
        heights = [decode_image(record.image).shape[0] for record in found]
        assert stats.image_height.mean == pytest.approx(np.mean(heights), rel=1e-12)
        assert stats.image_height.greatest == max(heights)
    assert len(manifest.splits["train"].shards) > 1
    assert manifest.source.startswith("curated from ")
    assert manifest.counts == counts  # the work folder may go


def test_shards_are_in_the_order_of_the_hash_and_about_equal(built):
    from flip_jax.curate.parts import id_number

    out, _ = built
    for found in records(out).values():
        numbers = [id_number(record.id) for record in found]
        assert numbers == sorted(numbers)


def test_groups_join_copies_and_no_group_is_in_two_splits(built):
    out, _ = built
    rows = {row["id"].partition(":")[2]: row for row in status(out)}
    groups = {row["id"].partition(":")[2]: row["group"] for row in status(out)}
    assert groups["small.png"] == groups["03-0.png"] == groups["03-1.png"] == "p3"
    # One picture under two names makes them one person, the name of either for all of both.
    joined = {groups[f"{who}-{n}.png"] for who in ("04", "05") for n in (0, 1)}
    assert len(joined) == 1 and joined < {"p4", "p5"}
    assert groups["06-0.png"] == "p6"
    assert {rows[name]["reason"] for name in ("copy.png", "03-1.png")} == {None, "equal picture"}
    splits: dict[str, set[str]] = {}
    by_id = {row["id"]: row for row in status(out)}
    for split, found in records(out).items():
        for record in found:
            row = by_id[record.id]
            assert (record.group_id, split) == (row["group"], row["split"])
            splits.setdefault(record.group_id, set()).add(split)
    assert all(len(each) == 1 for each in splits.values())
    assert set.union(*splits.values()) == {"train", "val", "test"}


def test_without_near_duplicates_equal_pictures_still_join(photos, tmp_path):
    cfg = config(photos, tmp_path / "data", dedupe=DedupeConfig(near=False))
    build(cfg)
    groups = {row["id"].partition(":")[2]: row["group"] for row in status(tmp_path / "data")}
    assert len({groups[f"{who}-{n}.png"] for who in ("04", "05") for n in (0, 1)}) == 1
    assert groups["small.png"] == "61:small.png"
    kept = build(
        replace(
            cfg,
            dedupe=DedupeConfig(exact=False, near=False),
            output=replace(cfg.output, path=str(tmp_path / "all")),
        )
    )
    assert sum(kept[f"kept/{split}"] for split in ("train", "val", "test")) == 2 * PEOPLE + 3


def test_sources_tell_of_every_record_in_order(built):
    out, _ = built
    rows = pq.read_table(out / "sources.parquet").to_pylist()
    for split, found in records(out).items():
        here = [row for row in rows if row["split"] == split]
        assert [row["id"] for row in here] == [record.id for record in found]
        assert [row["group_id"] for row in here] == [record.group_id for record in found]
    assert {row["licence"] for row in rows} == {"cc0", "unknown"}
    assert {row["source"] for row in rows} == {"drawn"}
    assert all(row["url"].startswith("http://host") for row in rows)


@pytest.mark.parametrize("change", ["chunks", "batches", "shuffled", "processes"])
def test_the_bytes_do_not_depend_on_how_the_work_is_done(photos, built, tmp_path, change):
    cfg = config(photos, tmp_path / "data")
    if change == "chunks":
        cfg = replace(cfg, input=replace(cfg.input, chunk_rows=1000))
    elif change == "batches":
        cfg = replace(cfg, batch_rows=4)
    elif change == "processes":
        cfg = replace(cfg, beam=BeamConfig(workers=2))
    else:
        table = pq.read_table(photos / "faces.parquet")
        order = np.random.default_rng(0).permutation(len(table))
        pq.write_table(table.take(order), tmp_path / "faces.parquet")
        cfg = replace(cfg, input=replace(cfg.input, paths=f"{tmp_path}/faces.parquet"))
    build(cfg)
    found, wanted = contents(tmp_path / "data"), contents(built[0])
    if change in ("chunks", "shuffled"):  # it says what it was made from
        del found["manifest.json"], wanted["manifest.json"]
        assert (
            load_manifest(tmp_path / "data").splits.keys() == load_manifest(built[0]).splits.keys()
        )
    assert found == wanted


def test_a_second_build_finds_the_work_done(photos, tmp_path, monkeypatch):
    cfg = config(photos, tmp_path / "data")
    first = build(cfg)
    before = contents(tmp_path / "data")
    for file in (tmp_path / "data").iterdir():
        file.unlink()
    (tmp_path / "data").rmdir()
    left = [tmp_path / "data.work/scratch/of-a-kill", tmp_path / ".data.partial-of-a-kill"]
    for folder in left:
        folder.mkdir()
    monkeypatch.setattr("flip_jax.curate.parts.PartMaker._make", lambda *_: pytest.fail("again"))
    monkeypatch.setattr(
        "flip_jax.curate.output.RecordWriter", lambda *_, **__: pytest.fail("again")
    )
    assert build(cfg) == first
    assert contents(tmp_path / "data") == before
    assert not any(folder.exists() for folder in left)


def test_other_settings_are_other_work(photos, tmp_path):
    cfg = config(photos, tmp_path / "data")
    build(cfg)
    work = str(tmp_path / "data.work")
    other = replace(
        cfg,
        captions=CaptionsConfig(count=1),
        output=replace(cfg.output, path=str(tmp_path / "other"), work=work),
    )
    counts = build(other)
    assert all(
        len(r.captions) == 1 for found in records(tmp_path / "other").values() for r in found
    )
    assert counts["captions/made by grammar"] == counts["captions/in"]


def test_who_opted_out_is_left_out(photos, built, tmp_path):
    digests = {row["id"]: row["pixel_sha256"] for row in status(built[0]) if row["stage"] == "kept"}
    (tmp_path / "domains").write_text("host1.test\n")
    (tmp_path / "hashes").write_text(f"{digests['20:10-0.png']}  # wished so\n")
    lists = OptOutConfig(domains=f"{tmp_path}/domains", hashes=f"{tmp_path}/hashes")
    counts = build(config(photos, tmp_path / "data", opt_out=lists))
    rows = [row for row in status(tmp_path / "data") if row["reason"] == "opted out"]
    assert Counter(row["detail"] for row in rows) == {"domain host1.test": 22, "pixels": 1}
    assert counts["opt-out/dropped: opted out"] == 22
    assert counts["hashes/dropped: opted out"] == 1
    ids = {record.id for found in records(tmp_path / "data").values() for record in found}
    assert not ids & {row["id"] for row in rows}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_opt_out_list_stops_the_build_before_it_starts(photos, tmp_path, workers):
    (tmp_path / "domains").write_text("https://host1.test/\n")
    lists, beam = OptOutConfig(domains=f"{tmp_path}/domains"), BeamConfig(workers=workers)
    with pytest.raises(
        ValueError, match=r"^config.opt_out.domains: .*, line 1, .*a bare host name"
    ):
        build(config(photos, tmp_path / "data", opt_out=lists, beam=beam))
    assert [path.name for path in tmp_path.iterdir()] == ["domains"]


def test_a_repeated_id_is_kept_once(photos, tmp_path):
    cfg = config(photos, tmp_path / "data")
    table = pq.read_table(photos / "faces.parquet").slice(0, 20)
    names = table["id"].to_pylist()
    names[13] = names[2]
    table = table.set_column(table.column_names.index("id"), "id", pa.array(names))
    pq.write_table(table, tmp_path / "faces.parquet")
    counts = build(replace(cfg, input=replace(cfg.input, paths=f"{tmp_path}/faces.parquet")))
    assert counts["dedupe/dropped: repeated id"] == 1
    (row,) = [row for row in status(tmp_path / "data") if row["reason"] == "repeated id"]
    assert row["url"].endswith("/13")


def test_the_same_table_twice_is_there_once(photos, built, tmp_path):
    """Its chunks are equal, and so are the names of their parts."""
    for name in ("a", "b"):
        shutil.copy(photos / "faces.parquet", tmp_path / f"{name}.parquet")
    cfg = config(photos, tmp_path / "data")
    cfg = replace(cfg, input=replace(cfg.input, paths=f"{tmp_path}/a.parquet {tmp_path}/b.parquet"))
    counts = build(cfg)
    assert counts["input/rows"] == 2 * built[1]["input/rows"]
    assert counts["dedupe/dropped: repeated id"] == 2 * PEOPLE + 3
    found, wanted = contents(tmp_path / "data"), contents(built[0])
    del found["manifest.json"], wanted["manifest.json"]
    assert found == wanted


def test_a_shard_changed_in_place_is_read_again(tmp_path):
    cfg = CurateConfig(
        input=InputConfig(kind="tar", paths=f"{tmp_path}/a.tar"),
        faces=FacesConfig(detector="whole", min_side=24),
        attributes=AttributesConfig(min_labels=-1),
        captions=CaptionsConfig(count=0, keep_texts=True),
        split=SplitConfig(train=1.0, val=0.0, test=0.0),
    )
    pixels = {}
    for turn, value in enumerate((10, 11)):
        sink = io.BytesIO()
        Image.new("RGB", (32, 32), (value,) * 3).save(sink, "PNG", compress_level=0)
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, data in (("x.png", sink.getvalue()), ("x.txt", b"a face")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        output = OutputConfig(path=f"{tmp_path}/{turn}", work=f"{tmp_path}/work")
        build(replace(cfg, output=output))
        (record,) = records(tmp_path / str(turn))["train"]
        assert (record.id, record.captions) == ("a/x", ["a face"])
        pixels[turn] = int(decode_image(record.image).mean())
    assert pixels == {0: 10, 1: 11}


def test_the_command(photos, tmp_path, capsys):
    (tmp_path / "config.py").write_text(
        "from flip_jax.curate.config import *\n"
        "def get_config():\n"
        f"    return CurateConfig(input=InputConfig(paths={str(photos / 'faces.parquet')!r}, "
        f"images={str(photos)!r}, file_column='file', group_column='who'))\n"
    )
    out = tmp_path / "data"
    arguments = ["build", "--config", str(tmp_path / "config.py"), f"--config.output.path={out}"]
    arguments += ["--config.faces.detector=whole", "--config.faces.min_side=24"]
    assert main(arguments) == 0
    assert "kept/train" in capsys.readouterr().out
    assert main(arguments) == 1  # the place is taken
    assert "remove it or choose another" in capsys.readouterr().err
    assert main([*arguments, "--config.faces.min_sid=3"]) == 1
    assert "did you mean config.faces.min_side" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_errors_of_workers_are_told_plainly(photos, tmp_path, workers):
    (tmp_path / "bad.jsonl").write_text("{ not json")
    cfg = config(photos, tmp_path / "data", beam=BeamConfig(workers=workers))
    cfg = replace(cfg, input=InputConfig(paths=f"{tmp_path}/bad.jsonl", url_column="u"))
    with pytest.raises(ValueError, match=r"table .*bad.jsonl cannot be read") as error:
        build(cfg)
    assert "Traceback" not in str(error.value)
    assert not (tmp_path / "data").exists()


def test_nothing_left_is_an_error(photos, tmp_path):
    cfg = config(photos, tmp_path / "data", faces=FacesConfig(detector="whole", min_side=5000))
    with pytest.raises(ValueError, match=r"no record was left; the files in .*status say why"):
        build(cfg)


def test_two_builds_do_not_share_a_work_folder(photos, tmp_path):
    from flip_jax.curate.pipeline import _locked
    from flip_jax.curate.storage import Work

    with (
        _locked(Work(str(tmp_path / "data.work"))),
        pytest.raises(ValueError, match="in use by another build"),
    ):
        build(config(photos, tmp_path / "data"))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_any_point_it_ends_with_the_same_bytes(photos, built, tmp_path, workers):
    out = tmp_path / "data"
    arguments = [f"--config.{name}={value}" for name, value in fields(config(photos, out))]
    arguments += [f"--config.beam.workers={workers}"]
    (tmp_path / "config.py").write_text(
        "from flip_jax.curate.config import CurateConfig\nget_config = CurateConfig\n"
    )
    command = [sys.executable, "-m", "flip_jax.curate", "build", "--config", "config.py"]
    kills = 0

    def progress() -> int:
        names = ("rows/*", "parts/*", "status/*", "shards/*")
        return sum(len(list(Path(f"{out}.work").glob(name))) for name in names)

    while not out.exists():
        start = progress()
        process = subprocess.Popen([*command, *arguments], cwd=tmp_path, stdout=subprocess.DEVNULL)
        while process.poll() is None and (kills == 3 or progress() < start + 12):
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        elif process.returncode:
            pytest.fail("the build failed")
        process.wait()
    assert kills >= 2
    assert contents(out) == contents(built[0])


@pytest.mark.slow  # two processes start
def test_a_worker_that_is_killed_ends_the_build_with_a_plain_error(photos, built, tmp_path):
    out = tmp_path / "data"
    cfg = config(photos, out)
    arguments = [f"--config.{name}={value}" for name, value in fields(cfg)]
    (tmp_path / "config.py").write_text(
        "from flip_jax.curate.config import CurateConfig\nget_config = CurateConfig\n"
    )
    command = [sys.executable, "-m", "flip_jax.curate", "build", "--config", "config.py"]
    process = subprocess.Popen(
        [*command, *arguments, "--config.beam.workers=2", "--config.input.chunk_rows=1"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(Path(f"{out}.work").glob("parts/*")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(_descendants(process.pid)[-1], signal.SIGKILL)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: a worker process ended before its work was done" in told
    assert "Traceback" not in told.split("error: a worker")[-1]
    assert not out.exists()
    build(cfg)
    assert contents(out) == contents(built[0])


def _descendants(process: int) -> list[int]:
    """Children, of any thread, and theirs; those without any come last."""
    found = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        found += [int(number) for number in file.read_text().split()]
    return found + [each for child in found for each in _descendants(child)]


def fields(part, prefix: str = ""):
    """The fields of a config by dotted name, None left out."""
    for item in dataclasses.fields(part):
        value = getattr(part, item.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{item.name}.")
        elif value is not None:
            yield prefix + item.name, value


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_pictures_from_urls_make_the_same_shards(photos, built, tmp_path):
    """Fetched from a local server; the work folder keeps them for other settings."""
    handler = functools.partial(QuietHandler, directory=str(photos))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        table = pq.read_table(photos / "faces.parquet")
        place = f"http://127.0.0.1:{server.server_address[1]}/"
        urls = pa.array([place + name for name in table["file"].to_pylist()])
        table = table.set_column(table.column_names.index("url"), "url", urls)
        pq.write_table(table, tmp_path / "urls.parquet")
        cfg = config(photos, tmp_path / "data")
        source = replace(cfg.input, paths=f"{tmp_path}/urls.parquet", images=None, file_column=None)
        fetch = FetchConfig(allow_private=True, host_delay_seconds=0.0, per_host=8, retries=0)
        cfg = replace(cfg, input=source, fetch=fetch)
        counts = build(cfg)
        server.shutdown()
    assert counts["fetch/dropped: http status"] == 1
    (row,) = [row for row in status(tmp_path / "data") if row["stage"] == "fetch"]
    assert (row["detail"], row["url"]) == ("404", f"{place}gone.jpg")
    shards = {name for name in contents(built[0]) if name.endswith(".array_record")}
    found, wanted = contents(tmp_path / "data"), contents(built[0])
    assert {name: found[name] for name in shards} == {name: wanted[name] for name in shards}
    # The server is gone.
    work = f"{tmp_path}/data.work"
    other = replace(cfg, faces=replace(cfg.faces, min_side=60))
    other = replace(other, output=OutputConfig(path=f"{tmp_path}/other", work=work))
    assert build(other)["faces/dropped: too small"] == 2


class Bucket(LocalFileSystem):
    """Paths bucket://... on the local disk: what opens them as local files fails."""

    root = ""
    opened: ClassVar[list[str]] = []

    @classmethod
    def scheme(cls):
        return "bucket"

    def join(self, base, *paths):
        return "/".join([base.rstrip("/"), *paths])

    def _here(self, path):
        return path.replace("bucket://", self.root + "/", 1)

    def match(self, patterns, limits=None):
        found = super().match([self._here(pattern) for pattern in patterns], limits)
        for result in found:
            for item in result.metadata_list:
                item.path = item.path.replace(self.root + "/", "bucket://", 1)
        return found

    def open(self, path, *args, **kwargs):
        self.opened.append(path)
        return super().open(self._here(path), *args, **kwargs)

    def create(self, path, *args, **kwargs):
        return super().create(self._here(path), *args, **kwargs)

    def exists(self, path):
        return super().exists(self._here(path))

    def delete(self, paths):  # the one above matches them first, which leads back here
        for path in paths:
            os.remove(self._here(path))


def test_files_may_be_where_beam_can_write(photos, built, tmp_path, monkeypatch):
    monkeypatch.setattr(Bucket, "root", str(tmp_path))
    monkeypatch.setattr(Bucket, "opened", [])
    monkeypatch.chdir(tmp_path)  # a name taken for a local one would end up here
    shutil.copytree(photos, tmp_path / "photos")
    cfg = config(Path("photos"), Path("data"))
    cfg = replace(
        cfg,
        input=replace(cfg.input, paths="bucket://photos/*.parquet", images="bucket://photos"),
        output=replace(cfg.output, path="bucket://data"),
    )
    assert build(cfg) == built[1]
    found, wanted = contents(tmp_path / "data"), contents(built[0])
    del found["manifest.json"], wanted["manifest.json"]
    assert found == wanted
    assert load_manifest(tmp_path / "data").splits == load_manifest(built[0]).splits
    assert not list(tmp_path.glob("bucket*"))
    # Far files are read whole, and not for each record: opening one takes long.
    parts = [path for path in Bucket.opened if path.endswith(".records")]
    assert len(parts) == len(set(parts)) > 4
    with pytest.raises(ValueError, match="remove it or choose another one"):
        build(cfg)


def test_the_default_detector_finds_the_faces_of_a_folder(tmp_path, capsys):
    """With the config for a folder of photographs, as it is."""
    (tmp_path / "photos").mkdir()
    rng, rows = np.random.default_rng(0), []
    for person in range(10):
        face = draw_face(seed=0, identity=person, picture=0, size=260)
        photo = rng.integers(90, 110, (420, 500, 3)).astype(np.uint8)
        photo[100:360, 120:380] = face.image
        Image.fromarray(photo).save(tmp_path / f"photos/{person}.png")
        rows.append(
            {"file": f"{person}.png", **dict(zip(ATTRIBUTES, face.attributes, strict=True))}
        )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "faces.parquet")
    fields = [f"input.paths={tmp_path}/faces.parquet", f"input.images={tmp_path}/photos"]
    fields += [f"output.path={tmp_path}/data", "beam.workers=1", "attributes.min_labels=0"]
    config = str(ROOT / "configs/curate/folder.py")
    arguments = ["build", "--config", config, *(f"--config.{field}" for field in fields)]
    assert main(arguments) == 0, capsys.readouterr().err
    found = [record for each in records(tmp_path / "data").values() for record in each]
    assert len(found) >= 7
    for record in found:
        height, width = decode_image(record.image).shape[:2]
        assert min(height, width) > 128 and max(height, width) < 420
        # The face is in the middle of the crop, with a margin around it.
        x0, y0, x1, y1 = record.box / (width, height, width, height)
        assert 0.1 < x0 < 0.35 and 0.65 < x1 < 0.9 and 0.1 < y0 < 0.35 and 0.65 < y1 < 0.9


@pytest.mark.parametrize("detector", ["whole", "opencv"])
def test_real_photographs(tmp_path, detector):
    folder = SHARED / "real_faces"
    if not folder.is_dir():
        pytest.skip("no photographs on this machine; drawn faces are tested above")
    table = pq.read_table(folder / "attributes.parquet").slice(0, 150)
    pq.write_table(table, tmp_path / "faces.parquet")
    cfg = CurateConfig(
        input=InputConfig(
            paths=f"{tmp_path}/faces.parquet",
            images=str(folder / "images"),
            file_column="file",
            group_column="identity",
        ),
        faces=FacesConfig(detector=detector, min_side=100, margin=0.2, max_faces=1),
        attributes=AttributesConfig(min_labels=0),
        split=SplitConfig(train=0.8, val=0.1, test=0.1),
        output=OutputConfig(path=str(tmp_path / "data")),
    )
    counts = build(cfg)
    assert counts["faces/out"] == 150 if detector == "whole" else counts["faces/out"] > 130
    assert data_main(["verify", str(tmp_path / "data")]) == 0
    for found in records(tmp_path / "data").values():
        assert all(record.captions and record.attributes.min() >= 0 for record in found)
