"""Building records from tables and drawings, and the command line around them."""

import dataclasses
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from flip_jax.config import DrawnConfig
from flip_jax.data import sources
from flip_jax.data.__main__ import main
from flip_jax.data.attributes import ATTRIBUTE_INDEX, ATTRIBUTES
from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import Record, RecordSource, load_manifest
from flip_jax.data.sources import BuildConfig, build, write_drawn
from flip_jax.data.transforms import decode_image, encode_jpeg

REAL_FACES = Path(__file__).resolve().parent.parent.parent / "shared" / "real_faces"


def picture(number: int, height: int = 24, width: int = 18) -> np.ndarray:
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(folder: Path, name: str, image: Image.Image | bytes, **options) -> str:
    folder.mkdir(exist_ok=True)
    if isinstance(image, bytes):
        (folder / name).write_bytes(image)
    else:
        image.save(folder / name, **options)
    return name


def table(folder: Path, columns: dict, suffix: str = ".parquet", name: str = "table") -> Path:
    path = folder / f"{name}{suffix}"
    data = pa.table(columns)
    if suffix == ".parquet":
        pq.write_table(data, path)
    elif suffix == ".csv":
        pa.csv.write_csv(data, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in data.to_pylist()))
    return path


@pytest.fixture
def faces(tmp_path) -> dict:
    """Columns of a table of 150 pictures in `images`: more than one round of the pool."""
    files = [save(tmp_path / "images", f"{n:03}.jpg", encode_jpeg(picture(n))) for n in range(150)]
    return {
        "file": files,
        "identity": [n // 4 for n in range(150)],
        "split": ["test" if n % 5 == 0 else "train" for n in range(150)],
        "Smiling": [n % 2 for n in range(150)],
        "Male": [None if n == 7 else 1 for n in range(150)],
    }


CONFIG = BuildConfig(group_column="identity", group_prefix="toy:", split_column="split", captions=2)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_build_from_every_kind_of_table(tmp_path, faces, suffix):
    path, out = table(tmp_path, faces, suffix), tmp_path / "out"
    report = build([(path, tmp_path / "images")], out, CONFIG)
    assert report.written == Counter(train=120, test=30)
    assert report.encoded_again == report.rejections == 0
    for split in ("train", "test"):
        wanted = [n for n in range(150) if faces["split"][n] == split]
        found = RecordSource(out, split)
        assert found.damaged_shards() == []
        assert [record.id for record in found] == [faces["file"][n] for n in wanted]
        for n, record in zip(wanted, found, strict=True):
            assert record.image == (tmp_path / "images" / record.id).read_bytes()
            assert record.group_id == f"toy:{n // 4}"
            assert len(record.captions) == 2 and all(record.captions)
            labels = np.full(40, -1)
            labels[ATTRIBUTE_INDEX["Smiling"]] = n % 2
            labels[ATTRIBUTE_INDEX["Male"]] = -1 if n == 7 else 1
            np.testing.assert_array_equal(record.attributes, labels)
    texts = {text for record in found for text in record.captions}
    assert any("smil" in text for text in texts) and len(texts) > 20
    assert load_manifest(out).groups_in_several_splits > 0


def test_people_are_the_same_however_their_numbers_are_stored(tmp_path):
    """pandas makes a column with a gap float; a NaN that is no null is a gap, too."""
    folder = tmp_path / "images"
    files = [save(folder, f"{n}.jpg", Image.fromarray(picture(n, 20, 20))) for n in range(5)]
    one = table(tmp_path, {"file": files[:2], "person": [5, 6]}, name="one")
    two = table(tmp_path, {"file": files[2:], "person": [5.0, float("nan"), None]}, name="two")
    pairs = [(one, folder), (two, folder)]
    build(pairs, tmp_path / "out", BuildConfig(group_column="person"))
    found = [record.group_id for record in RecordSource(tmp_path / "out", "train")]
    assert found == ["5", "6", "5", "3.jpg", "4.jpg"]


def test_text_of_a_csv_stays_as_it_is(tmp_path):
    """Leading zeros, and lines within a quoted caption in a file of several blocks."""
    folder = tmp_path / "images"
    files = [save(folder, f"{n}.jpg", Image.fromarray(picture(n, 20, 20))) for n in range(2)]
    long = "a man\nwho smiles " + "x" * 2_000_000
    path = tmp_path / "faces.csv"
    lines = ["file,person,text", f'{files[0]},007,"{long}"', f'{files[1]},7,"one\ntwo"']
    path.write_text("\n".join(lines) + "\n")
    cfg = BuildConfig(group_column="person", caption_column="text")
    build([(path, folder)], tmp_path / "out", cfg)
    found = list(RecordSource(tmp_path / "out", "train"))
    assert [record.group_id for record in found] == ["007", "7"]
    assert [record.captions for record in found] == [[long], ["one\ntwo"]]


def test_a_killed_build_is_named(tmp_path, faces, caplog):
    left = tmp_path / ".out.partial-x"
    left.mkdir()
    build([(table(tmp_path, faces), tmp_path / "images")], tmp_path / "out", CONFIG)
    assert f"{left} was left by a build that was killed" in caplog.text and left.is_dir()


def test_threads_change_nothing(tmp_path, faces):
    path = table(tmp_path, faces)
    for threads in (1, 3):
        build([(path, tmp_path / "images")], tmp_path / str(threads), CONFIG, threads=threads)
    for file in (tmp_path / "1").iterdir():
        assert file.read_bytes() == (tmp_path / "3" / file.name).read_bytes()


def test_pictures_that_are_encoded_again(tmp_path):
    folder, image = tmp_path / "images", Image.fromarray(picture(0, 60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        save(folder, "plain.jpg", image, quality=95),
        save(folder, "rotated.jpg", image, quality=95, exif=exif),
        save(folder, "cmyk.jpg", image.convert("CMYK"), quality=95),
        save(folder, "grey.jpg", image.convert("L"), quality=95),
        save(folder, "progressive.jpg", image, quality=95, progressive=True),
        save(folder, "lossless.png", image),
        save(folder, "large.jpg", image.resize((200, 300)), quality=95),
    ]
    cfg = BuildConfig(max_side=60)
    report = build([(table(tmp_path, {"file": files}), folder)], tmp_path / "out", cfg)
    assert report.encoded_again == 6
    for record in RecordSource(tmp_path / "out", "train"):
        stored = Image.open(io.BytesIO(record.image))
        assert (stored.format, stored.mode) == ("JPEG", "RGB")
        assert "progressive" not in stored.info and stored.getexif().get(0x0112, 1) == 1
        raw = (folder / record.id).read_bytes()
        assert (record.image == raw) == (record.id == "plain.jpg")
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert("RGB")
        expected = (40, 60) if record.id == "large.jpg" else upright.size
        assert stored.size == expected
        difference = decode_image(record.image).astype(float) - np.asarray(upright.resize(expected))
        assert np.abs(difference).mean() < 4
        assert record.captions == [] and record.group_id == record.id


def test_a_table_of_bad_pictures_alone(tmp_path):
    save(tmp_path / "images", "cut.jpg", encode_jpeg(picture(1))[:-30])
    path, out = table(tmp_path, {"file": ["cut.jpg"]}), tmp_path / "out"
    with pytest.raises(ValueError, match=r"1 of 1 rows were rejected(.|\n)*cut\.jpg"):
        build([(path, tmp_path / "images")], out, BuildConfig(max_bad_fraction=1))
    assert not out.exists()


def test_rejected_rows_are_named(tmp_path, faces):
    folder = tmp_path / "images"
    save(folder, "empty.jpg", b"")
    save(folder, "garbage.jpg", b"hello")
    save(folder, "cut.jpg", (folder / "000.jpg").read_bytes()[:-30])
    save(folder, "text.jpg", encode_jpeg(picture(1)))
    bad = ["empty.jpg", "garbage.jpg", "cut.jpg", "absent.jpg", "../table.csv", None, None]
    bad += ["a\0b.jpg", str(folder / "001.jpg"), "text.jpg"]
    columns = {
        "file": faces["file"] + bad,
        "caption": ["a face"] * 159 + ["  "],
        "split": ["train"] * 160,
    }
    path, out = table(tmp_path, columns), tmp_path / "out"
    cfg = BuildConfig(caption_column="caption", split_column="split", max_bad_fraction=0.1)
    report = build([(path, folder)], out, cfg)
    assert report.written["train"] == 150
    assert {reason: len(names) for reason, names in report.rejected.items()} == {
        "undecodable picture": 3,
        "unreadable file": 1,
        "bad file name": 5,
        "no caption": 1,
    }
    for name in ("empty.jpg", "cut.jpg", "absent.jpg", "text.jpg"):
        assert name in str(report)
    strict = dataclasses.replace(cfg, max_bad_fraction=0.04)
    with pytest.raises(ValueError, match="10 of 160 rows were rejected") as error:
        build([(path, folder)], tmp_path / "strict", strict)
    assert "garbage.jpg" in str(error.value)
    assert not (tmp_path / "strict").exists()


def test_captions_from_a_column(tmp_path, faces):
    texts = [["first", " second "], ["", None], ["third " * 10_000], None]
    columns = {
        "file": faces["file"][:4],
        "caption": pa.array(texts),
        "Smiling": [1, 1, 1, 1],
    }
    path = table(tmp_path, columns)
    cfg = BuildConfig(caption_column="caption", captions=1)
    build([(path, tmp_path / "images")], tmp_path / "out", cfg)
    found = [record.captions for record in RecordSource(tmp_path / "out", "train")]
    assert [len(captions) for captions in found] == [3, 1, 2, 1]
    assert found[0][:2] == ["first", "second"] and len(found[2][0].split()) == 10_000


def test_caption_column_of_the_wrong_type(tmp_path, faces):
    folder, cfg = tmp_path / "images", BuildConfig(caption_column="caption")
    for wrong in ([1, 2], [[1], [2]], [{"en": "a face"}, None]):
        path = table(tmp_path, {"file": faces["file"][:2], "caption": wrong})
        with pytest.raises(ValueError, match=r"table\.parquet: column 'caption' is .*strings"):
            build([(path, folder)], tmp_path / "out", cfg)
    kinds = (pa.large_string(), pa.list_(pa.large_string()), pa.dictionary(pa.int32(), pa.string()))
    for number, kind in enumerate(kinds):
        text = ["a face"] if pa.types.is_list(kind) else "a face"
        captions = pa.array([text, text]).cast(kind)
        path = table(tmp_path, {"file": faces["file"][:2], "caption": captions})
        report = build([(path, folder)], tmp_path / f"out{number}", cfg)
        assert report.written.total() == 2


def test_tables_are_joined_in_order(tmp_path, faces):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, start in ((first, 0), (second, 10)):
        files = [save(folder, f"{n}.jpg", encode_jpeg(picture(n))) for n in range(start, start + 5)]
        table(folder, {"file": files})
    pairs = [(folder / "table.parquet", folder) for folder in (second, first)]
    build(pairs, tmp_path / "out", BuildConfig(split="val"))
    ids = [record.id for record in RecordSource(tmp_path / "out", "val")]
    assert ids == [f"{n}.jpg" for n in (10, 11, 12, 13, 14, 0, 1, 2, 3, 4)]
    with pytest.raises(ValueError, match="ids must be unique"):
        # An empty folder: the pictures would be rejected if they were looked for first.
        (tmp_path / "empty").mkdir()
        build([(pairs[0][0], tmp_path / "empty")] * 2, tmp_path / "twice", BuildConfig())
    assert not (tmp_path / "twice").exists()


def test_a_column_that_is_there_twice(tmp_path, faces):
    twice = tmp_path / "twice.csv"
    twice.write_text("file,text,file\na.jpg,b,c.jpg\n")
    with pytest.raises(ValueError, match=r"twice.csv has columns twice: file"):
        build([(twice, tmp_path / "images")], tmp_path / "out", CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "path"}, "no column 'path'; it has"),
        ({"group_column": "who"}, "no column 'who'"),
        ({"caption_column": "text"}, "no column 'text'"),
        ({"max_side": 0}, "max_side=0: must be at least 1"),
        ({"quality": 300}, "quality=300: must be 1 to 100"),
        ({"captions": -1}, "captions=-1: must be at least 0"),
        ({"max_bad_fraction": float("nan")}, "max_bad_fraction=nan: must be from 0 to 1"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction=1.5: must be from 0 to 1"),
    ],
)
def test_missing_columns_and_impossible_settings(tmp_path, faces, changes, message):
    cfg = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=message):
        build([(table(tmp_path, faces), tmp_path / "images")], tmp_path / "out", cfg)


def test_a_build_needs_a_thread(tmp_path, faces):
    with pytest.raises(ValueError, match="threads=0: must be at least 1"):
        build([(table(tmp_path, faces), tmp_path / "images")], tmp_path / "out", CONFIG, threads=0)


def test_unusable_tables_and_folders(tmp_path, faces):
    good = table(tmp_path, faces)
    broken, strange = tmp_path / "broken.parquet", tmp_path / "table.xlsx"
    broken.write_bytes(b"PAR1 no")
    strange.write_bytes(b"")
    for path, images, error in (
        (tmp_path / "absent.parquet", "images", FileNotFoundError),
        (broken, "images", ValueError),
        (strange, "images", ValueError),
        (good, "nowhere", FileNotFoundError),
    ):
        with pytest.raises(error, match=path.name if images == "images" else "nowhere"):
            build([(path, tmp_path / images)], tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()


# --- drawn faces

DRAWN = DrawnConfig(train_identities=3, test_identities=2, pictures=2, captions=3, size=64, seed=5)


def test_drawn_records(tmp_path):
    out = write_drawn(DRAWN, tmp_path / "drawn", processes=1)
    train, test = RecordSource(out, "train"), RecordSource(out, "test")
    assert [r.id for r in train] == [f"drawn:{i}/{p}" for p in range(2) for i in range(3)]
    assert {r.group_id for r in test} == {"drawn:3", "drawn:4"}
    assert load_manifest(out).groups_in_several_splits == 0
    for record in train:
        assert decode_image(record.image).shape == (64, 64, 3)
        assert np.asarray(Image.open(io.BytesIO(record.mask))).shape == (64, 64)
        assert len(record.captions) == 3 and len(set(record.captions)) > 1
        assert record.landmarks.shape == (68, 2) and record.box.shape == (4,)
        assert len(record.strokes) > 5
        assert set(np.unique(record.attributes)) <= {0, 1}


def test_drawn_men_without_a_beard_are_not_told_to_have_one(tmp_path):
    cfg = dataclasses.replace(DRAWN, train_identities=100, pictures=1, captions=8)
    records = RecordSource(write_drawn(cfg, tmp_path / "drawn", processes=1), "train")
    hair = ATTRIBUTE_INDEX["Mustache"], ATTRIBUTE_INDEX["Sideburns"]
    beards = ATTRIBUTE_INDEX["Goatee"], ATTRIBUTE_INDEX["5_o_Clock_Shadow"]
    found = [
        record
        for record in records
        if record.attributes[[*hair]].any() and not record.attributes[[*beards]].any()
    ]
    assert len(found) >= 5
    for record in found:
        assert record.attributes[ATTRIBUTE_INDEX["No_Beard"]] == 0, "labelled as in CelebA"
        text = " ".join(record.captions)
        assert "beard" not in text and "shaven" not in text, text
        assert "mustache" in text or "sideburns" in text, text


def test_drawn_bytes_do_not_depend_on_processes(tmp_path, monkeypatch):
    one = write_drawn(DRAWN, tmp_path / "one", processes=1)
    monkeypatch.setattr(sources, "_PICTURES_PER_PROCESS", 5)  # two processes for ten pictures
    two = write_drawn(DRAWN, tmp_path / "two", processes=2)
    assert {f.name for f in one.iterdir()} == {f.name for f in two.iterdir()}
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()


def test_drawn_folder_is_used_again_or_refused(tmp_path):
    out = write_drawn(DRAWN, tmp_path / "drawn", processes=1)
    before = (out / "manifest.json").stat()
    assert write_drawn(DRAWN, out, processes=1) == out
    assert (out / "manifest.json").stat() == before
    other = dataclasses.replace(DRAWN, seed=6)
    with pytest.raises(ValueError, match="seed=5"):
        write_drawn(other, out, processes=1)
    write_drawn(other, out, overwrite=True, processes=1)
    assert "seed=6" in load_manifest(out).source
    with pytest.raises(ValueError, match=r"data\.drawn\.pictures=0"):
        write_drawn(dataclasses.replace(DRAWN, pictures=0), tmp_path / "none")


# --- command line


def test_command_line_round_trip(tmp_path, capsys):
    out, sheet = str(tmp_path / "drawn"), tmp_path / "sheet.png"
    options = "--train-identities 4 --test-identities 2 --pictures 2 --size 64 --processes 1"
    assert main(["draw", "--out", out, *options.split()]) == 0
    assert "train: 8 records of 4 groups, 32 captions" in capsys.readouterr().out
    assert main(["show", out, "--count", "3", "--out", str(sheet)]) == 0
    assert "drawn:5/0" in capsys.readouterr().out
    assert np.asarray(Image.open(sheet)).std() > 20
    assert main(["verify", out]) == 0
    assert "train: 8 of 8 records are good" in capsys.readouterr().out
    bench = "--image-size 32 --batch-size 4 --max-length 16 --seconds 0.05 --threads 1"
    assert main(["bench", out, *bench.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        *("read", "decode", "flip", "tokenize", "all", "pipeline")
    ]


def test_command_line_build(tmp_path, faces, capsys):
    arguments = ["build", "--table", str(table(tmp_path, faces)), "--out", str(tmp_path / "out")]
    images = ["--images", str(tmp_path / "images")]
    options = ["--group-column", "identity", "--split-column", "split", "--captions", "3"]
    assert main([*arguments, *images, *options]) == 0
    assert "150 records (30 test, 120 train)" in capsys.readouterr().out
    assert main([*arguments, *images, *options]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main([*arguments, *images, *images]) == 2
    assert "in pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        ("bench", "--workers=-1", "--workers=-1: must be at least 0"),
        ("bench", "--threads=-1", "--threads=-1: must be at least 0"),
        ("bench", "--prefetch=0", "--prefetch=0: must be at least 1"),
        ("bench", "--seconds=nan", "--seconds=nan: must be above 0"),
        ("verify", "--threads=0", "--threads=0: must be at least 1"),
        ("show", "--count=-1", "--count=-1: must be at least 1"),
        ("show", "--count=0", "--count=0: must be at least 1"),
    ],
)
def test_the_command_refuses_numbers_out_of_range(tmp_path, capsys, command, option, message):
    assert main([command, str(tmp_path / "none"), option]) == 2  # before a file is looked for
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_verify_finds_bad_records(tmp_path, capsys):
    out, half = tmp_path / "out", encode_jpeg(picture(0))[:-30]
    with RecordWriter(out, "test data") as writer:  # `build` would reject the second picture
        for name, image in (("whole", encode_jpeg(picture(1))), ("half", half)):
            attributes = np.zeros(40, np.int8)
            writer.write(
                "train",
                Record(id=name, group_id=name, image=image, captions=[], attributes=attributes),
            )
    assert main(["verify", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 records are good" in printed and "record 1 (half): damaged JPEG" in printed
    shard = out / "train-00000.array_record"
    data = bytearray(shard.read_bytes())
    data[500] ^= 0xFF
    shard.write_bytes(bytes(data))
    assert main(["verify", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "SHA-256" in printed and "record 1 (half): damaged JPEG" in printed


def test_verify_goes_on_after_a_damaged_shard(tmp_path, capsys):
    out = tmp_path / "out"
    with RecordWriter(out, "test data", shard_bytes=1) as writer:  # a record per shard
        for number in range(4):
            attributes, image = np.zeros(40, np.int8), encode_jpeg(picture(number))
            record = Record(
                id=f"{number}", group_id="a", image=image, captions=[], attributes=attributes
            )
            writer.write("train", record)
    first, second = (out / f"train-0000{number}.array_record" for number in range(2))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    assert main(["verify", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "train: 2 of 4 records are good" in printed
    assert f"{first} is missing" in printed and f"{second} has" in printed


# --- real photographs


def test_real_faces(tmp_path):
    if not (REAL_FACES / "attributes.parquet").is_file():
        pytest.skip("the CelebA sample is not on this machine; its terms forbid shipping it")
    rows = pq.read_table(REAL_FACES / "attributes.parquet").slice(480, 40)
    path = tmp_path / "rows.parquet"
    pq.write_table(rows, path)
    cfg = dataclasses.replace(CONFIG, group_prefix="celeba:", captions=3)
    report = build([(path, REAL_FACES / "images")], tmp_path / "out", cfg)
    assert report.written.total() == 40 and report.encoded_again == 0
    by_id = {row["file"]: row for row in rows.to_pylist()}
    for split in load_manifest(tmp_path / "out").splits:
        for record in RecordSource(tmp_path / "out", split):
            row = by_id[record.id]
            assert record.group_id == f"celeba:{row['identity']}" and row["split"] == split
            assert decode_image(record.image).shape == (row["height"], row["width"], 3)
            assert record.attributes.tolist() == [row[name] for name in ATTRIBUTES]
            if row["Smiling"] and not row["Blurry"]:
                assert not any("not smiling" in text for text in record.captions)
