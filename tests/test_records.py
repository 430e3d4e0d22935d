"""The record format: round trips, random access, and every way a data set can be broken."""

import errno
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import (
    MANIFEST,
    BadRecord,
    Record,
    RecordSource,
    decode_record,
    encode_record,
    group_number,
    join_strokes,
    load_manifest,
)
from flip_jax.data.transforms import BadImage, encode_jpeg

JPEG = encode_jpeg(np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3))
FIVE = np.zeros((5, 2), np.float32)


def record(number: int = 0, **fields) -> Record:
    rng = np.random.default_rng(number)
    values = {
        "id": f"id{number}",
        "group_id": f"person:{number // 2}",
        "image": JPEG,
        "captions": [f"caption {number}", "two words"],
        "attributes": rng.integers(-1, 2, 40, dtype=np.int8),
    }
    return Record(**{**values, **fields})


def write(folder: Path, count: int = 20, **options) -> Path:
    """Writes `count` training and 5 test records, in shards of a few records each."""
    with RecordWriter(folder, "test data", shard_bytes=6 * len(JPEG), **options) as writer:
        for number in range(count):
            writer.write("train", record(number))
        for number in range(5):
            writer.write("test", record(1000 + number))
    return folder


def edit_manifest(folder: Path, **fields) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **fields}))


def assert_equal(a: Record, b: Record) -> None:
    for field in Record.__struct_fields__:
        x, y = getattr(a, field), getattr(b, field)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        else:
            assert x == y


def test_imports_no_jax():
    code = "import sys, flip_jax.data.record_writer; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_record_round_trip_with_all_fields():
    lines = [np.ones((3, 2)), np.zeros((1, 2)), np.full((2, 2), 0.5)]
    full = record(
        box=np.array([1, 2, 3, 4.5], np.float32),
        landmarks=np.random.default_rng(0).random((68, 2), dtype=np.float32),
        visible=np.arange(68, dtype=np.int8) % 2,
        subsets=["challenging", "pose"],
        mask=b"\x89PNG",
        polylines=join_strokes(lines),
        drawings=[b"\x89PNG", b"\xff\xd8"],
    )
    for line, stored in zip(lines, decode_record(encode_record(full)).strokes, strict=True):
        np.testing.assert_array_equal(stored, line)
    assert record().strokes == record(polylines=join_strokes([])).strokes == []
    assert_equal(decode_record(encode_record(full)), full)
    assert_equal(decode_record(encode_record(record())), record())
    # Fields without a value take no space, and those of older records are absent.
    assert not any(name in encode_record(record()) for name in (b"drawings", b"visible", b"subs"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": ""}, "id and group_id"),
        ({"group_id": ""}, "id and group_id"),
        ({"captions": ["fine", "  "]}, "empty"),
        ({"attributes": np.zeros(39, np.int8)}, "attributes"),
        ({"attributes": np.zeros(40, np.int32)}, "attributes"),
        ({"attributes": np.full(40, 2, np.int8)}, "-1, 0 or 1"),
        ({"box": np.zeros(3, np.float32)}, "box"),
        ({"box": np.full(4, np.nan, np.float32)}, "NaN"),
        ({"landmarks": np.zeros((5, 3), np.float32)}, "landmarks"),
        ({"visible": np.ones(5, np.int8)}, r"visible is int8\[5\], must be int8\[0\]"),
        ({"landmarks": FIVE, "visible": np.ones(4, np.int8)}, r"visible .* must be int8\[5\]"),
        ({"landmarks": FIVE, "visible": np.full(5, -1, np.int8)}, "visible must be 0 or 1"),
        ({"polylines": np.zeros((4, 2), np.float32)}, "polylines"),
    ],
)
def test_record_checks_its_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        record(**fields)


def test_bytes_that_are_no_record():
    good = msgspec.msgpack.decode(encode_record(record()))
    strange_array = ["|O", [1], b"12345678"]
    for data in (
        b"",
        b"\xff\x00garbage",
        encode_record(record())[:-3],
        msgspec.msgpack.encode([1, 2]),
        msgspec.msgpack.encode({**good, "attributes": strange_array}),
        msgspec.msgpack.encode({**good, "captions": "one string"}),
        msgspec.msgpack.encode({k: v for k, v in good.items() if k != "image"}),
    ):
        with pytest.raises(ValueError, match="not a record"):
            decode_record(data)


def test_random_access_over_shards(tmp_path):
    folder = write(tmp_path / "data")
    source = RecordSource(folder, "train")
    assert source.damaged_shards() == []
    assert len(source.manifest.splits["train"].shards) > 2
    assert len(source) == 20 and len(RecordSource(folder, "test")) == 5
    for number in (0, 19, 7, np.int64(11), 7):
        assert_equal(source[number], record(int(number)))
    assert [r.id for r in source] == [f"id{n}" for n in range(20)]
    for number in (-1, 20):
        with pytest.raises(IndexError):
            source[number]
    assert [source.where(n).split("/")[-1] for n in (0, 19)] == [
        "train-00000.array_record record 0",
        f"{source.manifest.splits['train'].shards[-1].file} record 1",
    ]


def test_source_in_threads_and_pickled(tmp_path):
    source = RecordSource(write(tmp_path / "data"), "train")
    order = np.random.default_rng(0).integers(0, 20, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda n: source[n].id, order))
    assert ids == [f"id{n}" for n in order]
    copy = pickle.loads(pickle.dumps(source))
    assert copy[13].id == "id13" and copy.manifest_hash == source.manifest_hash


def test_manifest_counts(tmp_path):
    folder = write(tmp_path / "data")
    manifest = load_manifest(folder)
    train = manifest.splits["train"]
    assert (train.records, train.groups, train.captions) == (20, 10, 40)
    assert train.words_per_caption.mean == pytest.approx(2.0)
    assert (train.image_height.least, train.image_width.greatest) == (12, 10)
    assert manifest.source == "test data" and manifest.groups_in_several_splits == 0
    for shard in train.shards:
        assert (folder / shard.file).stat().st_size == shard.bytes


def test_a_person_in_two_splits_is_counted(tmp_path):
    with RecordWriter(tmp_path / "data", "test data") as writer:
        writer.write("train", record(0))
        writer.write("test", record(1))
    assert load_manifest(tmp_path / "data").groups_in_several_splits == 1


def test_same_records_same_bytes(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    assert all((b / p.name).read_bytes() == p.read_bytes() for p in a.iterdir())


def test_long_caption_and_no_caption(tmp_path):
    words = " ".join(["word"] * 10_000)
    with RecordWriter(tmp_path / "data", "test data") as writer:
        writer.write("train", record(0, captions=[words]))
        writer.write("train", record(1, captions=[]))
    source = RecordSource(tmp_path / "data", "train")
    assert source[0].captions == [words] and source[1].captions == []


# --- the writer refuses


def test_writer_refuses_bad_records(tmp_path):
    with (
        pytest.raises(ValueError, match="'id0' was written before"),
        RecordWriter(tmp_path / "data", "x") as writer,
    ):
        writer.write("train", record(0))
        writer.write("test", record(0))
    with RecordWriter(tmp_path / "data", "x") as writer:
        writer.write("train", record(0))
        with pytest.raises(BadImage, match="JPEG"):
            writer.write("train", record(1, image=b"\x89PNG"))
        with pytest.raises(BadImage):
            writer.write("train", record(2, image=JPEG[:9]))
        with pytest.raises(ValueError, match="split"):
            writer.write("../train", record(3))
    assert len(RecordSource(tmp_path / "data", "train")) == 1


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no record"), RecordWriter(tmp_path / "data", "x"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_existing_folder(tmp_path):
    folder = write(tmp_path / "data")
    with pytest.raises(ValueError, match="not empty"):
        write(folder)
    write(folder, count=3, overwrite=True)
    assert len(RecordSource(folder, "train")) == 3
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a data set"):
        write(precious, overwrite=True)
    assert (precious / "thesis.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "precious"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_there_meanwhile_is_kept(tmp_path, overwrite):
    folder = tmp_path / "data"
    message = "more than a data set" if overwrite else "not empty"
    with (
        pytest.raises(ValueError, match=message),
        RecordWriter(folder, "slow", overwrite=overwrite) as slow,
    ):
        slow.write("train", record())
        write(folder)
        (folder / "notes.txt").write_text("years of work")
    assert load_manifest(folder).source == "test data"
    assert (folder / "notes.txt").exists() and [p.name for p in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("manifest", "extra", "message"),
    [
        ('{"name": "a web page"}', "index.html", "not the manifest of a data set"),
        (None, "notes.txt", r"more than a data set \(notes.txt\)"),
        (None, "val-00000.array_record", "val-00000"),
    ],
)
def test_folders_with_anything_else_are_not_overwritten(tmp_path, manifest, extra, message):
    folder = write(tmp_path / "data")
    if manifest:
        (folder / MANIFEST).write_text(manifest)
    (folder / extra).write_text("years of work")
    with pytest.raises(ValueError, match=message):
        write(folder, overwrite=True)
    assert (folder / extra).read_text() == "years of work"


def test_a_set_of_another_schema_version_can_be_overwritten(tmp_path):
    folder = write(tmp_path / "data")
    edit_manifest(folder, schema_version=7, splits={"train": [], "test": "elsewhere"})
    write(folder, count=3, overwrite=True)
    assert len(RecordSource(folder, "train")) == 3


def test_an_error_leaves_nothing_behind(tmp_path):
    folder = write(tmp_path / "data")
    before = load_manifest(folder)
    with (
        pytest.raises(RuntimeError, match="midway"),
        RecordWriter(folder, "x", overwrite=True) as writer,
    ):
        writer.write("train", record(0))
        raise RuntimeError("midway")
    assert load_manifest(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


FILL_DISK = """
import os, sys, signal, resource
sys.path.insert(0, os.path.join(os.getcwd(), "tests"))
from test_records import RecordWriter, record
from pathlib import Path
out = Path(sys.argv[1])
if sys.argv[2] == "limit":  # a write beyond 200 kB fails like one on a full disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    with RecordWriter(out, "x") as writer:
        for number in range(100):
            # random trailing bytes: incompressible, and still a JPEG header
            writer.write("train", record(number, image=record().image + os.urandom(20_000)))
except OSError as error:
    print(error)
    sys.exit(7 if not list(out.parent.iterdir()) else 8)
"""


@pytest.mark.parametrize("kind", ["limit", "tmpfs"])
def test_full_disk(tmp_path, kind):
    root = Path(__file__).resolve().parent.parent
    if kind == "tmpfs":
        options = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)]
        if sys.platform != "linux" or subprocess.run(options, capture_output=True).returncode:
            pytest.skip("mounting a small file system needs Linux and root")
    try:
        done = subprocess.run(
            [sys.executable, "-c", FILL_DISK, str(tmp_path / "data"), kind],
            capture_output=True,
            text=True,
            cwd=root,
        )
    finally:
        if kind == "tmpfs":
            subprocess.run(["umount", str(tmp_path)], check=True)
    assert done.returncode == 7, done.stdout + done.stderr
    assert os.strerror(errno.ENOSPC if kind == "tmpfs" else errno.EFBIG) in done.stdout


# --- the reader refuses


def test_missing_folder_and_manifest(tmp_path):
    for path, message in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "no manifest.json")):
        with pytest.raises(FileNotFoundError, match=message) as error:
            RecordSource(path, "train")
        assert "python -m flip_jax.data" in str(error.value)


def test_unknown_split_lists_the_others(tmp_path):
    with pytest.raises(ValueError, match="no split 'val'; it has test, train"):
        RecordSource(write(tmp_path / "data"), "val")


def test_schema_version(tmp_path):
    folder = write(tmp_path / "data")
    edit_manifest(folder, schema_version=7)
    with pytest.raises(ValueError, match="schema version 7, this release reads 1"):
        RecordSource(folder, "train")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 1}', '{"schema_version":"1"}'])
def test_broken_manifest(tmp_path, text):
    folder = write(tmp_path / "data")
    (folder / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match="not a manifest"):
        RecordSource(folder, "train")


def test_missing_and_truncated_shard(tmp_path):
    folder = write(tmp_path / "data")
    shard = folder / "train-00001.array_record"
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"train-00001.* bytes, not"):
        RecordSource(folder, "train")
    assert len(RecordSource(folder, "test")) == 5
    lenient = RecordSource(folder, "train", check=False)
    assert lenient[0].id == "id0" and len(lenient.damaged_shards()) == 1
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00001.* is missing"):
        RecordSource(folder, "train")


def damage(folder: Path, name: str, number: int) -> None:
    """Flips bytes inside the JPEG of one record of a shard."""
    file = folder / name
    data = bytearray(file.read_bytes())
    position = -1
    for _ in range(number + 1):
        position = data.index(b"\x7f\x7e\x7d", position + 1)
    for offset in range(8):
        data[position + offset] ^= 0xFF
    file.write_bytes(bytes(data))


def test_flipped_bytes_spoil_one_record_only(tmp_path):
    noise = np.random.default_rng(0).bytes(200)
    marked = JPEG + b"\x7f\x7e\x7d" + noise  # trailing bytes do not harm a JPEG
    with RecordWriter(tmp_path / "data", "x") as writer:
        for number in range(6):
            writer.write("train", record(number, image=marked))
    damage(tmp_path / "data", "train-00000.array_record", 3)
    source = RecordSource(tmp_path / "data", "train")
    for number in range(6):
        if number == 3:
            with pytest.raises(BadRecord, match=r"train-00000\.array_record record 3"):
                source[number]
        else:
            assert source[number].id == f"id{number}"
    (complaint,) = source.damaged_shards()
    assert "train-00000.array_record does not have the SHA-256" in complaint


def test_damaged_index_is_an_error_of_the_shard(tmp_path):
    folder = write(tmp_path / "data")
    file = folder / "train-00000.array_record"
    data = bytearray(file.read_bytes())
    data[-65536:] = bytes(65536)
    file.write_bytes(bytes(data))
    with pytest.raises(OSError, match="train-00000"):
        RecordSource(folder, "train")[0]


# --- group numbers


def test_group_number_is_stable_and_spread():
    assert group_number("celeba:1234") == 1685199603
    numbers = {group_number(f"celeba:{n}") for n in range(20_000)}
    assert len(numbers) > 19_995
    assert min(numbers) >= 0 and max(numbers) < 2**31
    assert np.mean([n > 2**30 for n in numbers]) == pytest.approx(0.5, abs=0.02)
