"""Splits as faces, bad records, a validation part of the training people, cached features."""

import json
import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_downstream

from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import Record, RecordSource
from flip_jax.data.transforms import decode_image, encode_jpeg, resize_image
from flip_jax.downstream.backbone import Backbone, image_embedding
from flip_jax.downstream.columns import read_columns
from flip_jax.downstream.face_data import DataLacks, FaceData
from flip_jax.downstream.faces import Faces
from flip_jax.downstream.features import FeatureCache
from flip_jax.downstream.tasks import run_task, task_module


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return tiny_downstream.write_faces(tmp_path_factory.mktemp("faces") / "drawn")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return Backbone.load(tiny_downstream.write_model(folder), batch_size=8)


def write(folder, records, split="test"):
    with RecordWriter(folder, "by hand") as writer:
        for record in records:
            writer.write(split, record)
    return RecordSource(folder, split)


def record(number, image=None, group=None, captions=(), id=None):
    if image is None:
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        image = encode_jpeg(pixels)
    return Record(
        id=id or f"r{number}",
        group_id=group or f"g{number}",
        image=image,
        captions=list(captions),
        attributes=np.full(40, -1, np.int8),
    )


def test_faces_hold_what_the_records_hold(drawn):
    faces = Faces(RecordSource(drawn, "test"), 32)
    assert len(faces) == len(faces.images) == 24
    for row in (0, 11, 23):
        stored = faces.record(row)
        assert faces.ids[row] == stored.id and faces.captions[row] == stored.captions
        np.testing.assert_array_equal(faces.attributes[row], stored.attributes)
        pixels = resize_image(decode_image(stored.image), 32)
        np.testing.assert_array_equal(faces.images[row : row + 1], pixels[None])
    assert len(np.unique(faces.groups)) == faces.groups.max() + 1 == 12
    for group in np.unique(faces.groups):
        assert len({faces.group_ids[row] for row in np.flatnonzero(faces.groups == group)}) == 1


def test_a_bad_picture_and_a_missing_caption(tmp_path):
    whole = record(1).image
    records = [record(0), record(1, image=whole[: len(whole) * 3 // 4]), record(2)]
    faces = Faces(write(tmp_path / "d", records), 16)
    assert faces.ids == ["r0", "r2"] and faces.numbers.tolist() == [0, 2]
    assert len(faces.bad) == 1 and "r1" in faces.bad[0]
    assert faces.captions == [[], []]
    assert Faces(faces.source, 16, limit=1).ids == ["r0"]


def test_no_usable_picture_is_an_error(tmp_path):
    cut = record(0).image
    source = write(tmp_path / "d", [record(0, image=cut[: len(cut) * 3 // 4])])
    with pytest.raises(ValueError, match="none of 1 records"):
        Faces(source, 16)
    with pytest.raises(ValueError, match="limit=0"):
        Faces(source, 16, limit=0)


def test_take_by_number_and_by_mask(drawn):
    faces = Faces(RecordSource(drawn, "test"), 32)
    some = faces.take([5, 2, 17])
    assert some.ids == [faces.ids[n] for n in (5, 2, 17)]
    np.testing.assert_array_equal(some.images[1:2], faces.images[2:3])
    np.testing.assert_array_equal(some.attributes[2], faces.attributes[17])
    mask = np.arange(24) % 3 == 0
    assert faces.take(mask).ids == faces.ids[::3]
    assert len({faces.digest, some.digest, faces.take([2, 5, 17]).digest}) == 3
    assert faces.take(np.arange(24)).digest == faces.digest
    assert Faces(faces.source, 16).digest != faces.digest


def test_validation_is_its_own_split_or_other_people_of_train(drawn, tmp_path):
    data = FaceData(drawn, 32)
    train, val, test = data.three_splits("train", "val", "test")
    assert test is data.split("test")
    assert not set(train.group_ids) & set(val.group_ids)
    assert sorted([*train.ids, *val.ids]) == sorted(data.split("train").ids)
    assert 0 < len(val) < len(train)
    names = ("train", "val", "test")
    for folder, splits in (("own", names), ("one", ("train", "test"))):
        with RecordWriter(tmp_path / folder, "by hand") as writer:
            for n, split in enumerate(splits):
                writer.write(split, record(n, group=split))
    whole = FaceData(tmp_path / "own", 32)
    assert list(whole.three_splits(*names)) == [whole.split(name) for name in names]
    with pytest.raises(DataLacks, match="too small to be divided"):
        FaceData(tmp_path / "one", 32).three_splits("train", "val", "test")
    with pytest.raises(DataLacks, match="has no split 'val'"):
        data.split("val")
    # Of another name it was asked for, and is misspelt.
    for misspelt in (lambda: data.split("dev"), lambda: data.three_splits("train", "vall", "test")):
        with pytest.raises(ValueError, match=r"has no split '(dev|vall)'; it has test, train") as e:
            misspelt()
        assert not isinstance(e.value, DataLacks)
    for names, message in {
        ("train", "train", "test"): "val_split=train: must be another split than train_split",
        ("train", "val", "train"): "test_split=train: must be another split than train_split",
        ("train", "test", "test"): "test_split=test: must be another split than val_split",
    }.items():
        with pytest.raises(ValueError, match=message):
            data.three_splits(*names)


def test_ids_of_a_table_are_texts(tmp_path):
    """`0099` is not 99, whatever the other ids look like; no number is no part."""
    source = write(tmp_path / "faces", [record(n, id=f"{n:04}") for n in (99, 1000)])
    faces = Faces(source, 32)
    (tmp_path / "t.csv").write_text("id,tone\n0099,007\n1000,2\n")
    assert read_columns(f"{tmp_path}/t.csv:tone", faces)["tone"].tolist() == ["007", "2"]
    table = pa.table({"id": ["0099", "1000"], "tone": [float("nan"), 2.0]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert read_columns(f"{tmp_path}/t.parquet:tone", faces)["tone"].tolist() == ["", "2"]


def test_a_place_where_nothing_can_be_written_is_known_before_the_work(drawn, backbone, tmp_path):
    (tmp_path / "file").touch()
    data, settings = FaceData(drawn, 32), task_module("zero_shot").Settings(labels="x; y")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            run_task("zero_shot", settings, None, data, out, [])
    with pytest.raises(ValueError, match=r"settings\.resamples"):
        wrong = replace(settings, resamples=0)
        run_task("zero_shot", wrong, backbone, data, tmp_path / "new", [])
    assert not (tmp_path / "new").exists()


def parts_of(array, calls):
    calls.append(1)
    yield array[:3]
    yield array[3:]


def test_features_are_made_once_and_made_again_when_damaged(tmp_path):
    array = np.random.default_rng(0).normal(size=(7, 2, 3)).astype(np.float16)
    said, calls = [], []
    cache = FeatureCache(tmp_path / "cache", said.append)

    def get(what):
        return cache.get(what, 7, lambda: parts_of(array, calls))

    for _ in range(2):
        found = get({"output": "a"})
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype and not found.flags.writeable
    get({"output": "b"})
    assert len(calls) == 2 and not said
    files = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(files) == 4 and not any("partial" in name for name in files)
    stored = next(
        path
        for path in (tmp_path / "cache").glob("*.json")
        if json.loads(path.read_text())["what"]["output"] == "a"
    ).with_suffix(".npy")
    # One flipped bit, a cut file, no JSON: each is noticed, and the array made again.
    whole = stored.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for number, damaged in enumerate((bytes(flipped), whole[:-8]), start=1):
        stored.write_bytes(damaged)
        np.testing.assert_array_equal(get({"output": "a"}), array)
        assert len(said) == number and str(stored) in said[-1]
    stored.with_suffix(".json").unlink()
    np.testing.assert_array_equal(get({"output": "a"}), array)
    assert len(calls) == 5 and stored.read_bytes() == whole


def test_a_feature_that_fails_leaves_nothing(tmp_path):
    cache = FeatureCache(tmp_path / "cache")

    def broken():
        yield np.zeros((3, 2), np.float32)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        cache.get({"output": "a"}, 7, broken)
    for rows, words in ((np.zeros((3, 2)), "not 7"), (np.full((7, 2), np.nan), "not finite")):
        with pytest.raises(ValueError, match=words):
            cache.get({"output": "a"}, 7, lambda rows=rows: iter([rows]))
    assert os.listdir(tmp_path / "cache") == []


def test_features_of_pictures_are_keyed_by_weights_dtype_and_pictures(drawn, tmp_path, backbone):
    data = FaceData(drawn, 32, cache=tmp_path / "cache")
    faces = data.split("test")
    np.testing.assert_array_equal(
        data.image_embeds(backbone, faces), backbone.embed_images(faces.images)
    )
    data.image_embeds(backbone, faces)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    data.image_embeds(backbone.random_twin(), faces)
    data.image_embeds(backbone, faces.take([0, 1]))
    data.features.of_images(backbone, faces, "another name", image_embedding)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 4
    uncached = FaceData(drawn, 32)
    assert np.array_equal(
        uncached.image_embeds(backbone, faces), data.image_embeds(backbone, faces)
    )


def test_columns_of_attributes_and_of_a_table(drawn, tmp_path):
    faces = Faces(RecordSource(drawn, "test"), 32)
    table = tmp_path / "tones.csv"
    rows = [f"{name},{number % 3}" for number, name in enumerate(faces.ids[:20])]
    table.write_text("\n".join(["id,tone", *rows]) + "\n")
    columns = read_columns(f"Male,{table}:tone", faces)
    assert list(columns) == ["Male", "tone"]
    assert [{"no": 0, "yes": 1}[v] for v in columns["Male"]] == faces.attributes[:, 20].tolist()
    assert columns["tone"][:4].tolist() == ["0", "1", "2", "0"]
    assert columns["tone"][20:].tolist() == [""] * 4
    faces.attributes[3, 20] = -1
    assert read_columns("Male", faces)["Male"][3] == ""
    assert read_columns("", faces) == {}
    for by, words in (
        ("Mal", "did you mean Male"),
        (f"{table}:shade", "no column shade"),
        (f"{tmp_path}/no.csv:tone", "no.csv"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            read_columns(by, faces)
    twice = table.rename(tmp_path / "twice.csv")
    with pytest.raises(ValueError, match="two columns are called tone; rename one"):
        read_columns(f"{twice}:tone,{twice}:tone", faces)
    table.write_text("id,tone\nnobody,1\n")
    with pytest.raises(ValueError, match="no value for any record"):
        read_columns(f"{table}:tone", faces)
