"""Tables as published, tar shards and folders become rows of one shape."""

import csv
import hashlib
import io
import json
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

pytest.importorskip("apache_beam", reason="curation needs the extra `curate`")

from flip_jax.curate.config import InputConfig, OptOutConfig
from flip_jax.curate.inputs import (
    input_files,
    input_names,
    read_chunk,
    split_input,
    urls_to_fetch,
)
from flip_jax.curate.optout import OptOut
from flip_jax.curate.pictures import ReadStage
from flip_jax.curate.stages import Place, Sample, Tally
from flip_jax.curate.storage import Work
from flip_jax.data.attributes import ATTRIBUTE_INDEX


def _png(value: int = 0) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 0)).save(sink, "PNG")
    return sink.getvalue()


def read_stage(hashes: Path | None = None, **fields) -> ReadStage:
    lists = OptOutConfig(hashes=None if hashes is None else str(hashes))
    stage = ReadStage(InputConfig(**fields), OptOut(lists))
    stage.setup()
    return stage


@pytest.fixture
def read(tmp_path):
    """Reads an input whole; returns samples, tally and chunks."""

    def run(batch=3, fetched=None, **fields):
        cfg = InputConfig(**fields)
        work, samples, tally, chunks = Work(str(tmp_path / "work")), [], Tally(), []
        files = input_files(cfg)
        for number, (file, name) in enumerate(zip(files, input_names(files, cfg), strict=True)):
            chunks += split_input(work, file, number, name, cfg)
        for chunk in chunks:
            for found in read_chunk(work, chunk, batch, fetched or {}, tally):
                samples += found
        return samples, tally, chunks

    return run


def _problems(tally):
    return [(drop.sample.id, drop.reason) for drop in tally.drops]


def test_facecaption_15m_as_published(read, tmp_path):
    """`caption` and `laion_caption` are lists of one, `box` is JSON text, `url` may be several."""
    table = pa.table(
        {
            "_id": ["a", "b", "c", "d", "e", "f"],
            "caption": [["A man."], ["A woman."], ["x"], ["y"], ["z"], [" two  spaces\n"]],
            "url": [
                "http://h/1.jpg",
                "http://h/2.jpg, http://g/2.jpg",
                "UNKNOWN",
                "http://h/4.jpg",
                None,
                "UNKNOWN, http://h/6.jpg",
            ],
            "laion_caption": [["alt"], [None], [], None, ["q"], ["r"]],
            "box": ["[1, 2, 30, 40]", "[0, 0, 9, 9]", "[1,2,3,4]", "[5, 5, 5, 9]", "[]", None],
        }
    )
    pq.write_table(table, tmp_path / "v2.parquet")
    samples, tally, chunks = read(
        paths=f"{tmp_path}/v2.parquet",
        id_column="_id",
        url_column="url",
        text_column="caption",
        box_column="box",
    )
    assert [sample.id for sample in samples] == ["a", "b", "f"]
    assert [sample.url for sample in samples] == [
        "http://h/1.jpg",
        "http://h/2.jpg",
        "http://h/6.jpg",
    ]
    assert [sample.texts for sample in samples] == [("A man.",), ("A woman.",), ("two spaces",)]
    assert samples[0].box.tolist() == [1, 2, 30, 40] and samples[0].box.dtype == np.float32
    assert samples[2].box is None
    assert _problems(tally) == [("c", "no url"), ("d", "bad box"), ("e", "bad box")]
    assert tally.counts["input/rows"] == 6
    work = Work(str(tmp_path / "work"))
    assert urls_to_fetch(work, chunks[0]) == {
        0: "http://h/1.jpg",
        1: "http://h/2.jpg",
        5: "http://h/6.jpg",
    }


def test_laion_face_as_published(read, tmp_path):
    """Numbers as ids, which pandas may have made float; licences of one character."""
    table = pa.table(
        {
            "SAMPLE_ID": [2962951000013.0, 5.0, None],
            "URL": ["http://h/1.jpg", "http://h/2.jpg", "http://h/3.jpg"],
            "TEXT": ["one", None, ""],
            "HEIGHT": [10, 20, 30],
            "LICENSE": ["?", None, "cc-by-2.0"],
        }
    )
    pq.write_table(table, tmp_path / "laion_face_part_00000.parquet")
    samples, tally, _ = read(
        paths=f"{tmp_path}/laion_face_part_*.parquet",
        id_column="SAMPLE_ID",
        url_column="URL",
        text_column="TEXT",
        licence_column="LICENSE",
        licence="unknown",
        source="laion-face",
    )
    assert [sample.id for sample in samples] == ["2962951000013", "5"]
    assert [sample.texts for sample in samples] == [("one",), ()]
    assert [sample.licence for sample in samples] == ["?", "unknown"]
    assert {sample.source for sample in samples} == {"laion-face"}
    assert [reason for _, reason in _problems(tally)] == ["no id"]


def test_fetched_pictures_and_dead_links_are_told_apart(read, tmp_path):
    (tmp_path / "t.jsonl").write_text(
        '{"u": "http://h/1"}\n{"u": "http://h/2"}\n{"u": "http://h/3"}'
    )
    fetched = {0: Place("file", 3, 4), 1: ("http status", "404"), 2: Place("file", 7, 4)}
    samples, tally, _ = read(paths=f"{tmp_path}/t.jsonl", url_column="u", fetched=fetched, batch=2)
    assert [sample.place for sample in samples] == [fetched[0], fetched[2]]
    (drop,) = tally.drops
    assert (drop.stage, drop.reason, drop.detail) == ("fetch", "http status", "404")
    assert drop.sample.url == "http://h/2"
    assert len({sample.id for sample in samples}) == 2


def test_a_folder_with_a_table(read, tmp_path):
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    (images / "a.png").write_bytes(_png())
    (images / "sub/b.png").write_bytes(_png(9))
    with open(tmp_path / "t.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "who", "Male", "Smiling", "box"])
        rows.writerow(["a.png", 7, 1, -1, "1 2 3 4"])
        rows.writerow(["sub/b.png", "", -1, 1, "(1.5, 2, 3, 4.5)"])
        rows.writerow(["../a.png", "x", 1, 1, "1 2 3 4"])
        rows.writerow(["gone.png", "x", 1, 1, "1 2 3 4"])
    samples, tally, _ = read(
        paths=f"{tmp_path}/t.csv",
        images=str(images),
        file_column="file",
        group_column="who",
        group_prefix="lfw:",
        box_column="box",
        box_format="size",
    )
    assert [sample.group for sample in samples] == ["lfw:7", "", "lfw:x"]
    assert [sample.id for sample in samples] == ["a.png", "sub/b.png", "gone.png"]
    assert samples[1].box.tolist() == [1.5, 2, 4.5, 6.5]
    # No label is 0: -1 is CelebA's "absent".
    assert samples[0].attributes[ATTRIBUTE_INDEX["Male"]] == 1
    assert samples[0].attributes[ATTRIBUTE_INDEX["Smiling"]] == 0
    assert samples[0].attributes[ATTRIBUTE_INDEX["Young"]] == -1
    assert _problems(tally) == [("../a.png", "bad file name")]
    stage = read_stage()
    kept = stage.process(samples, tally)
    assert [sample.image for sample in kept] == [_png(), _png(9)]
    assert _problems(tally)[1:] == [("gone.png", "unreadable file")]


def test_labels_mean_the_same_in_every_chunk(read, tmp_path):
    """A 0 in the last row makes -1 mean unknown in the first chunk too."""
    table = pa.table({"url": ["http://h/1", "http://h/2"], "Male": [-1, 0]})
    pq.write_table(table, tmp_path / "t.parquet")
    samples, _, chunks = read(paths=f"{tmp_path}/t.parquet", url_column="url", chunk_rows=1)
    assert len(chunks) == 2
    assert [sample.attributes[ATTRIBUTE_INDEX["Male"]] for sample in samples] == [-1, 0]


def test_float_columns_are_labels_with_gaps_or_probabilities(read, tmp_path):
    urls = [f"http://h/{number}" for number in range(3)]
    whole = pa.table({"url": urls, "Male": [1.0, 0.0, np.nan], "Young": [None, 1, 0]})
    pq.write_table(whole, tmp_path / "a.parquet")
    samples, _, _ = read(paths=f"{tmp_path}/a.parquet", url_column="url")
    assert [sample.attributes[ATTRIBUTE_INDEX["Male"]] for sample in samples] == [1, 0, -1]
    assert [sample.attributes[ATTRIBUTE_INDEX["Young"]] for sample in samples] == [-1, 1, 0]
    shares = pa.table({"url": urls, "Male": [0.9, 0.0, np.nan], "Young": [1, 1, 0]})
    pq.write_table(shares, tmp_path / "b.parquet")
    samples, _, _ = read(paths=f"{tmp_path}/b.parquet", url_column="url")
    assert all(sample.attributes is None for sample in samples)
    found = np.stack([sample.probabilities for sample in samples])
    np.testing.assert_array_equal(
        found[:, ATTRIBUTE_INDEX["Male"]], np.array([0.9, 0, np.nan], np.float32)
    )
    assert found[:, ATTRIBUTE_INDEX["Young"]].tolist() == [1, 1, 0]
    assert np.isnan(found[:, ATTRIBUTE_INDEX["Bald"]]).all()
    pq.write_table(pa.table({"url": urls, "Male": [0.9, 1.5, 0]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"Male: 1.5 is no probability"):
        read(paths=f"{tmp_path}/c.parquet", url_column="url")


@pytest.mark.parametrize("nested", [False, True])
def test_pictures_inside_a_table(read, tmp_path, nested):
    cells = [{"bytes": _png(1), "path": "x"}, None] if nested else [_png(1), None]
    pq.write_table(pa.table({"image": cells, "id": ["a", "b"]}), tmp_path / "t.parquet")
    fields = {"image_column": "image", "id_column": "id"}
    samples, tally, _ = read(paths=f"{tmp_path}/t.parquet", **fields)
    assert [sample.image for sample in samples] == [_png(1)]
    assert _problems(tally) == [("b", "no picture")]


def test_memory_does_not_grow_with_the_row_groups(tmp_path):
    """Row groups of pictures that have been read are let go, whatever their number."""
    cfg = InputConfig(image_column="image", chunk_rows=50)
    rng, peaks = np.random.default_rng(0), {}
    for groups in (4, 8, 32):  # the first one imports what is imported late
        table = tmp_path / f"{groups}.parquet"
        images = [rng.bytes(2000) for _ in range(groups * 50)]
        pq.write_table(pa.table({"image": images}), table, row_group_size=50)
        tracemalloc.start()
        chunks = split_input(Work(str(tmp_path / str(groups))), str(table), 0, "", cfg)
        peaks[groups] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sum(chunk.rows for chunk in chunks) == groups * 50
    # Two row groups; the 24 more are 2.4 MB.
    assert peaks[32] - peaks[8] < 200_000, peaks


def _add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _shard(path, samples=4):
    """What img2dataset writes with output_format=webdataset."""
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            key = f"00000000{number}"
            facts = {"url": f"http://h/{number}", "caption": f"json {number}", "key": key}
            _add(tar, f"{key}.jpg", _png(number))
            _add(tar, f"{key}.json", json.dumps(facts | {"SAMPLE_ID": number + 100}).encode())
            _add(tar, f"{key}.txt", f"text {number}".encode())


def test_img2dataset_shards(read, tmp_path):
    for shard in range(2):
        _shard(tmp_path / f"0000{shard}.tar")
    samples, tally, chunks = read(
        kind="tar", paths=f"{tmp_path}/*.tar", url_column="url", chunk_rows=3
    )
    assert len(samples) == 8 and len(chunks) == 4 and not tally.drops
    assert [sample.id for sample in samples[:2]] == ["00000/000000000", "00000/000000001"]
    assert len({sample.id for sample in samples}) == 8
    assert samples[5].url == "http://h/1" and samples[5].texts == ("text 1",)
    kept = read_stage().process(samples, tally)
    assert [sample.image for sample in kept] == [_png(number % 4) for number in range(8)]
    named, _, _ = read(
        kind="tar", paths=f"{tmp_path}/00000.tar", id_column="SAMPLE_ID", text_column="caption"
    )
    assert [(sample.id, sample.texts) for sample in named[:1]] == [("100", ("json 0",))]


def test_a_shard_cut_off_while_it_was_written(read, tmp_path):
    _shard(tmp_path / "0.tar")
    data = (tmp_path / "0.tar").read_bytes()
    with tarfile.open(tmp_path / "0.tar") as tar:
        end = tar.getmember("000000002.jpg").offset_data + 10
    (tmp_path / "0.tar").write_bytes(data[:end])
    samples, tally, _ = read(kind="tar", paths=f"{tmp_path}/0.tar")
    assert len(samples) == 2
    assert _problems(tally) == [("0/000000002", "truncated")]


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        _add(tar, "a.jpg", _png())
    cfg = InputConfig(kind="tar", paths=f"{tmp_path}/a.tar.gz")
    with pytest.raises(ValueError, match=r"not a plain tar file.*unpack"):
        split_input(Work(str(tmp_path / "work")), f"{tmp_path}/a.tar.gz", 0, "a", cfg)


def test_a_folder_of_pictures(read, tmp_path):
    root = tmp_path / "faces"
    (root / "b").mkdir(parents=True)
    for name in ("a.png", "b/c.PNG", "z.png"):
        (root / name).write_bytes(_png())
    (root / "a.txt").write_text("a caption\n")
    (root / "b/c.json").write_text('{"caption": ["one", "two"], "person": 3}')
    (root / "z.json").write_text("not json")
    (root / "notes.md").write_text("no picture")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    samples, tally, _ = read(
        kind="folder", paths=f"'{root}'", text_column="caption", group_column="person"
    )
    assert [sample.id for sample in samples] == ["a.png", "b/c.PNG"]
    assert [sample.texts for sample in samples] == [("a caption",), ("one", "two")]
    assert [sample.group for sample in samples] == ["", "3"]
    assert _problems(tally) == [("z.png", "bad json")]


def test_labels_beside_pictures(read, tmp_path):
    """Coded as in tables, a folder as a whole: -1 is unknown, as there is a label that is 0."""
    root = tmp_path / "faces"
    root.mkdir()
    for name, text in {
        "a": '{"Male": 1, "Smiling": -1}',
        "b": '{"Male": 0, "Smiling": -1, "Young": true}',
        "c": '{"Male": 0.25, "Young": null}',
        "d": '{"Male": "yes"}',
        "e": '{"Male": [1]}',
        "f": '{"caption": "a face"}',
    }.items():
        (root / f"{name}.png").write_bytes(_png())
        (root / f"{name}.json").write_text(text)
    samples, tally, _ = read(kind="folder", paths=f"'{root}'", text_column="caption")
    male, smiling, young = (ATTRIBUTE_INDEX[name] for name in ("Male", "Smiling", "Young"))
    a, b, c, f = samples
    assert [one.id for one in samples] == ["a.png", "b.png", "c.png", "f.png"]
    assert (a.attributes[male], a.attributes[smiling], a.attributes[young]) == (1, -1, -1)
    assert (b.attributes[male], b.attributes[smiling], b.attributes[young]) == (0, -1, 1)
    assert c.attributes is None and c.probabilities[male] == 0.25
    assert np.isnan(c.probabilities[young])
    assert f.attributes is None and f.probabilities is None
    assert _problems(tally) == [("d.png", "bad label"), ("e.png", "bad label")]


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(("other", "absent"), [(1, 0), (0, -1), (False, -1), (0.0, -1)])
def test_what_minus_one_means_says_the_whole_input(read, tmp_path, kind, other, absent):
    root = tmp_path / "faces"
    root.mkdir()
    labels = {"a": {"Male": 1, "Bald": -1}, "b": {"Young": other}, "c": {"Young": 0.5}}
    for name, cells in labels.items():
        (root / f"{name}.png").write_bytes(_png())
        (root / f"{name}.json").write_text(json.dumps(cells))
    with tarfile.open(tmp_path / "faces.tar", "w") as tar:
        for file in sorted(root.iterdir()):
            tar.add(file, file.name)
    paths = root if kind == "folder" else tmp_path / "faces.tar"
    (a, *_), tally, _ = read(kind=kind, paths=f"'{paths}'")
    assert a.attributes[ATTRIBUTE_INDEX["Bald"]] == absent
    assert not _problems(tally)


def test_pictures_of_one_name_in_several_inputs(read, tmp_path):
    """Each has an id of its own; of one input they are what they would be alone."""
    for place in ("one", "two"):
        for name in ("x/1", "y/1"):
            file = tmp_path / place / "set" / f"{name}.png"
            file.parent.mkdir(parents=True)
            file.write_bytes(_png(len(str(file))))
        with tarfile.open(tmp_path / place / "0.tar", "w") as tar:
            for name in ("x/1", "y/1"):
                tar.add(tmp_path / place / "set" / f"{name}.png", f"./{name}.png")

    def ids(kind, pattern, *places):
        paths = " ".join(f"{tmp_path}/{place}/{pattern}" for place in places)
        return [sample.id for sample in read(kind=kind, paths=paths)[0]]

    assert ids("folder", "set", "one") == ["x/1.png", "y/1.png"]
    assert ids("tar", "0.tar", "one") == ["0/x/1", "0/y/1"]
    names = [f"{place}/set/{name}/1.png" for place in ("one", "two") for name in "xy"]
    assert ids("folder", "set", "one", "two") == names
    names = [f"{place}/0/{name}/1" for place in ("one", "two") for name in "xy"]
    assert ids("tar", "0.tar", "*") == names
    (tmp_path / "two/0.tar").unlink()
    assert ids("tar", "0.tar", "*") == ["0/x/1", "0/y/1"]
    with pytest.raises(ValueError, match=r"config.input.paths=.*is one twice"):
        ids("folder", "set", "one", "one/../one/.")


def test_huge_and_broken_pictures_are_not_decoded():
    size = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = _png()[:12] + size + struct.pack(">I", zlib.crc32(size)) + _png()[33:]
    tally = Tally()
    samples = [Sample(id="bomb", image=bomb), Sample(id="text", image=b"<html>")]
    samples += [Sample(id="none"), Sample(id="big", image=_png()), Sample(id="good", image=_png())]
    stage = read_stage(max_pixels=47)
    assert not stage.process(samples, tally)
    reasons = [reason for _, reason in _problems(tally)]
    assert reasons == ["too many pixels", "not a picture", "empty"] + ["too many pixels"] * 2
    assert read_stage(max_pixels=48).process(samples[-1:], tally)


def test_picture_files_on_the_opt_out_list_are_left_out(tmp_path):
    (tmp_path / "hashes").write_text(hashlib.sha256(_png(3)).hexdigest().upper())
    samples = [Sample(id=str(value), image=_png(value)) for value in (2, 3)]
    tally = Tally()
    assert [each.id for each in read_stage(tmp_path / "hashes").process(samples, tally)] == ["2"]
    assert _problems(tally) == [("3", "opted out")]
    (tmp_path / "hashes").write_text("abc\n")
    with pytest.raises(ValueError, match=r"holds 'abc'.*64 hexadecimal"):
        read_stage(tmp_path / "hashes")


def test_the_input_is_read_once_and_again_when_it_changed(read, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"u": "http://h/1"}\n')
    first = read(paths=str(path), url_column="u")[2]
    assert read(paths=str(path), url_column="u")[2] == first
    path.write_text('{"u": "http://h/1"}\n{"u": "http://h/2"}\n')
    second = read(paths=str(path), url_column="u", chunk_rows=1)[2]
    assert [chunk.rows for chunk in second] == [1, 1]
    assert second[0].key == first[0].key  # the same row: its finished part is found again


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"paths": "gone/*.parquet", "url_column": "u"}, "gone.*no such file"),
        ({"paths": "gone", "kind": "folder"}, "gone.*no such folder"),
        ({"paths": "{0}/t.parquet", "url_column": "U"}, "url_column='U'.*it has u"),
        ({"paths": "{0}/t.parquet", "images": "gone", "file_column": "u"}, "images='gone'.*folder"),
    ],
)
def test_input_that_is_not_there(tmp_path, fields, message):
    pq.write_table(pa.table({"u": ["x"]}), tmp_path / "t.parquet")
    fields["paths"] = fields["paths"].format(tmp_path)
    with pytest.raises(ValueError, match=message):
        input_files(InputConfig(**fields))


@pytest.mark.parametrize("data", [b"", b"PAR1 no", "half"])
def test_a_damaged_table_is_named(tmp_path, data):
    path = tmp_path / "cut.parquet"
    if data == "half":
        pq.write_table(pa.table({"u": ["x"] * 100}), path)
        data = path.read_bytes()[:-40]
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"^table .*cut.parquet cannot be read: "):
        input_files(InputConfig(paths=str(path), url_column="u"))


def test_a_table_with_a_damaged_page_is_named(read, tmp_path):
    path = tmp_path / "page.parquet"
    urls = [f"http://h/{number * 7919}" for number in range(5000)]
    pq.write_table(pa.table({"u": urls}), path, use_dictionary=False, compression="zstd")
    data = bytearray(path.read_bytes())
    data[200:400] = bytes(200)
    path.write_bytes(data)
    with pytest.raises((ValueError, OSError), match=r"^table .*page.parquet cannot be read: "):
        read(paths=str(path), url_column="u")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1", "yes"], "column Male: labels must be -1, 0 or 1"),
        ([0.5, 1.5], "column Male: 1.5 is no probability"),
        ([1, 2], "column Male: label 2 must be -1, 0 or 1"),
    ],
)
def test_a_table_with_a_bad_label_is_named(read, tmp_path, suffix, values, message):
    columns, path = {"u": ["http://h/1", "http://h/2"], "Male": values}, tmp_path / f"t.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table(columns), path)
    else:
        rows = zip(columns["u"], values, strict=True)
        path.write_text("u,Male\n" + "".join(f"{url},{value}\n" for url, value in rows))
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        read(paths=str(path), url_column="u")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_table_that_is_not_utf_8_is_named(read, tmp_path, suffix):
    path = tmp_path / f"latin.{suffix}"
    if suffix == "parquet":
        offsets, latin = np.array([0, 4], np.int32), "café".encode("latin-1")
        text = pa.Array.from_buffers(
            pa.string(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(latin)]
        )
        pq.write_table(pa.table({"u": ["http://h/1"], "text": text}), path)
    else:
        path.write_bytes('{"u": "http://h/1", "text": "café"}\n'.encode("latin-1"))
    message = r"^table .*latin.* cannot be read: column text is not UTF-8; save the table as UTF-8"
    with pytest.raises(ValueError, match=message):
        read(paths=str(path), url_column="u", text_column="text")
