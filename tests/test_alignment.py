"""Face alignment as a whole, as docs/alignment.md runs it."""

import contextlib
import dataclasses
import json
import re
import shlex
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny_downstream
from test_docs import blocks

from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import RecordSource
from flip_jax.downstream import alignment
from flip_jax.downstream.__main__ import main, set_fields
from flip_jax.downstream.alignment import Settings, load_aligner
from flip_jax.downstream.alignment_scoring import Frame, Truth, crop_matrix, metrics_of
from flip_jax.downstream.alignment_settings import AUGMENT, RECIPES
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.dense_augment import Augment
from flip_jax.downstream.dense_pictures import read_picture
from flip_jax.downstream.face_data import DataLacks, FaceData

# Heads are trained here, which is mostly compiling.
pytestmark = pytest.mark.slow


PAGE = Path(__file__).parent.parent / "docs" / "alignment.md"
# One batch size throughout, so that each function is compiled once.
FAST = ["--epochs=2", "--channels=4", "--batch_size=8", "--resamples=20", "--fractions=50 100"]
HIDDEN = [7, 50]
NOTHING = Augment(**{name: 0.0 for name in vars(AUGMENT) if name != "normal"})


def commands():
    """Of the page: arguments of `python -m flip_jax.downstream`."""
    shell = "".join(text for language, text in blocks(PAGE) if language == "sh")
    lines = shell.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("python -m flip_jax.downstream ")) for line in lines]


def rewrite(folder, out, change):
    """The records of a data set, each changed by `change(split, number, record)`."""
    with RecordWriter(out, "test") as writer:
        for split in ("train", "test"):
            source = RecordSource(folder, split)
            for number in range(len(source)):
                writer.write(split, change(split, number, source[number]))
    return out


def mark(split, number, record):
    """Hidden points in every third picture, two subsets of the test split, one box missing."""
    visible = np.ones(68, np.int8)
    visible[HIDDEN] = 0
    subsets = [["common"], ["challenging"], ["challenging", "pose"]][number % 3]
    return msgspec.structs.replace(
        record,
        visible=visible if number % 3 == 0 else None,
        subsets=subsets if split == "test" else [],
        box=None if number == 1 else record.box,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The first command of the page, with a tiny model and less of everything."""
    place = tmp_path_factory.mktemp("alignment")
    tiny_downstream.write_model(place / "runs" / "demo")
    few = {"train_identities": 12, "test_identities": 6}
    drawn = tiny_downstream.write_faces(place / "drawn", **few)
    rewrite(drawn, place / "runs" / "demo" / "data", mark)
    with contextlib.chdir(place):
        assert main([*commands()[0], *FAST]) == 0
    return place


@pytest.fixture(scope="module")
def report(place):
    return json.loads((place / "runs" / "downstream" / "alignment" / "report.json").read_text())


@pytest.fixture(scope="module")
def backbone(place):
    return Backbone.load(place / "runs" / "demo", batch_size=8)


@pytest.fixture(scope="module")
def data(place):
    return FaceData(place / "runs" / "demo" / "data", 32)


def frame_of(**fields):
    return Frame(**{"points": 68, "size": 64, "cells": 16, "crop": 0.8, "hidden": "leave"} | fields)


def test_the_report(place, report):
    out = place / "runs" / "downstream" / "alignment"
    assert list(report["results"]) == ["trained", "random", "chance"]
    for row in report["results"].values():
        assert list(row) == metrics_of(68)
        for number in row.values():
            assert number["low"] <= number["value"] <= number["high"]
    assert list(report["by"]["trained"]) == ["Male"]
    for name in ("report.png", *alignment.OVERLAYS):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    page = (out / "report.md").read_text()
    for words in ("| 50 % | ", "best on test", "## By subset", "hidden points are left out"):
        assert words in page
    assert (
        "0 faces without a box that is not empty or without a known point are left out; 2" in page
    )
    trained = report["details"]["trained"]["100 %"]
    assert trained["epochs"] == [2] and trained["test_nme"][0] == pytest.approx(
        report["results"]["trained"]["NME ocular"]["value"], rel=1e-5
    )
    assert trained["best_on_test"] == min(trained["test_nme"])
    # Half of the pictures, as many steps, of which an epoch of theirs has fewer.
    half = report["details"]["trained"]["50 %"]
    steps = [max(1, round(one["pictures"] / 8)) for one in (half, trained)]
    assert half["epochs"] == [2 * steps[1] // steps[0]] and steps[0] < steps[1]
    assert not list(out.glob("*.partial"))


def test_the_mean_shape_by_a_loop(report, data):
    """In units of the box, drawn into every box: the row `chance`."""
    train = data.three_splits("train", "val", "test")[0]
    shapes = [[] for _ in range(68)]
    for row in range(len(train)):
        record = train.record(row)
        seen = np.ones(68) if record.visible is None else record.visible
        centre, side = _square(record, seen)
        for p in np.flatnonzero(seen):
            shapes[p].append((record.landmarks[p] - centre) / side)
    mean = np.array([np.mean(shape, axis=0) for shape in shapes])
    errors = {"all": [], "common": [], "pose": []}
    test = data.split("test")
    for row in range(len(test)):
        record = test.record(row)
        seen = np.ones(68) if record.visible is None else record.visible
        centre, side = _square(record, seen)
        distance = np.linalg.norm(centre + side * mean - record.landmarks, axis=1)
        ocular = np.linalg.norm(record.landmarks[36] - record.landmarks[45])
        errors["all"].append(distance[seen == 1].mean() / ocular)
        for name in {"common", "pose"} & set(record.subsets):
            errors[name].append(errors["all"][-1])
    found = report["results"]["chance"]
    assert found["NME ocular"]["value"] == pytest.approx(100 * np.mean(errors["all"]), rel=1e-5)
    wanted = 100 * (np.array(errors["all"]) > 0.1).mean()
    assert found["FR 10% ocular"]["value"] == pytest.approx(wanted)
    trained = report["details"]["trained"]["100 %"]["subsets"]
    assert sorted(trained) == ["challenging", "common", "pose"]


def _square(record, seen):
    """Middle and longer side of the box, or of what is around the points that are seen."""
    points = record.landmarks[seen == 1]
    box = record.box
    low, high = (points.min(0), points.max(0)) if box is None else (box[:2], box[2:])
    return (np.float64(low) + high) / 2, max(high - low)


def test_the_saved_aligner_finds_what_was_reported(place, report, backbone, data):
    path = place / "runs" / "downstream" / "alignment" / "aligner.npz"
    aligner = load_aligner(path, backbone)
    assert aligner.points == 68
    faces, frame = data.split("test"), frame_of()
    records = [faces.record(row) for row in range(len(faces))]
    boxes = [frame.box(record) for record in records]
    found = aligner.align([record.image for record in records], boxes)
    assert found.shape == (len(faces), 68, 2) and found.dtype == np.float32
    numbers = Truth.of(frame, faces).numbers(found).mean(0)
    for name, value in zip(metrics_of(68), numbers, strict=True):
        assert report["results"]["trained"][name]["value"] == pytest.approx(value, rel=1e-3)
    with pytest.raises(ValueError, match="1 boxes for 2 pictures, one for each"):
        aligner.align([records[0].image] * 2, boxes[:1])
    with pytest.raises(ValueError, match=r"box 0 is \[5.0, 5.0, 5.0, 9.0\]: must be x0 < x1"):
        aligner.align([records[0].image], [(5, 5, 5, 9)])
    with pytest.raises(ValueError, match="picture 0"):
        aligner.align([b"no picture"], boxes[:1])
    assert aligner.align([], []).shape == (0, 68, 2)
    other = Backbone.load(tiny_downstream.write_model(place / "other", seed=9))
    with pytest.raises(ValueError, match="was trained on weights"):
        load_aligner(path, other)


def test_the_crop_by_hand():
    matrix = crop_matrix(np.array([10.0, 20, 30, 60]), 0.8, 96)
    place = np.array([(20, 40), (20, 20), (10, 40)]) @ matrix[:, :2].T + matrix[:, 2]
    # The middle of the box is that of the square; its 40 pixels take 0.8 of 96.
    np.testing.assert_allclose(place, [(47.5, 47.5), (47.5, 47.5 - 38.4), (47.5 - 19.2, 47.5)])


def test_an_example_moves_points_with_the_picture(data):
    faces, frame = data.split("train"), frame_of()
    picture = read_picture(faces, 0)
    rng = np.random.default_rng(0)
    plain = frame.example(NOTHING, picture, rng)
    assert plain["image"].shape == (64, 64, 3) and plain["points"].dtype == np.float32
    assert np.flatnonzero(~plain["known"]).tolist() == HIDDEN
    assert frame_of(hidden="count").example(NOTHING, picture, rng)["known"].all()
    flipped = frame.example(dataclasses.replace(NOTHING, flip=1.0), picture, rng)
    np.testing.assert_allclose(flipped["image"].mean(), plain["image"].mean(), rtol=0.01)
    assert np.abs(flipped["image"].astype(int) - plain["image"][:, ::-1]).mean() < 4
    for p, other in ((36, 45), (45, 36), (8, 8), (7, 9), (50, 52)):
        x, y = plain["points"][other]
        np.testing.assert_allclose(flipped["points"][p], (63 - x, y), atol=1e-3)
    assert np.flatnonzero(~flipped["known"]).tolist() == [9, 52]
    moved = frame.example(AUGMENT, picture, rng)
    again = frame.place(picture)
    assert np.abs(moved["points"] - again.forward(picture.landmarks)).max() < 0.3 * 64
    assert not np.array_equal(moved["image"], plain["image"])


def test_recipes_are_the_published_ones():
    full = Settings(recipe="300w").resolved(224, 16)
    assert (full.size, full.heatmap, full.crop, full.finetune) == (448, 128, 0.8, True)
    recipe = full.dense_recipe(8, 8)
    assert recipe.rates == (1e-4, 1e-2, 1e-2, 1e-2) and recipe.epochs == 250
    assert recipe.decay_at * recipe.epochs == 200
    assert RECIPES["aflw19"].crop == 1.0 and RECIPES["aflw19"].hidden == "count"
    small = Settings(epochs=3).resolved(64, 8)
    assert (small.size, small.heatmap) == (64, 32)
    assert small.dense_recipe(160, 1600).epochs == 30
    # 2,690 pictures are 168 steps of 16; of 27 an epoch is two, of 5 still one.
    assert [small.dense_recipe(n, 2690).epochs for n in (2690, 27, 5)] == [3, 252, 504]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rates": "1e-3"}, "settings.rates='1e-3': must be four numbers"),
        ({"crop": 0.0}, "settings.crop=0.0"),
        ({"decay_at": 1.5}, "settings.decay_at=1.5"),
        ({"fractions": "0"}, "settings.fractions='0'"),
        ({"epochs": 0}, "settings.epochs=0: must be at least 1"),
        ({"heatmap": 1}, "settings.heatmap=1: must be at least 2"),
        ({"augment": Augment(shift=2.0)}, "settings.augment.shift=2.0"),
        ({"normalizer": "nose"}, "settings.normalizer='nose': must be ocular"),
        ({"size": 40}, "settings.size=40: must be a multiple of the patch size"),
    ],
)
def test_bad_settings(backbone, data, tmp_path, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        alignment.run(Settings(**fields), backbone, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_data_lacks(backbone, data, place, tmp_path):
    def run_on(name, change, **fields):
        folder = rewrite(place / "drawn", tmp_path / name, change)
        alignment.run(Settings(**fields), backbone, FaceData(folder, 32), tmp_path / "out")

    def points_of(count):
        def change(split, number, record):
            few = count if number == 3 or split == "test" else 68
            points = record.landmarks[:few] if few else None
            return msgspec.structs.replace(record, landmarks=points)

        return change

    with pytest.raises(DataLacks, match="faces with 5, 68 landmarks"):
        run_on("mixed", points_of(5))
    with pytest.raises(DataLacks, match="split 'test': no record has landmarks"):
        run_on("none", points_of(0))

    def few(split, number, record):
        return msgspec.structs.replace(record, landmarks=record.landmarks[:7])

    with pytest.raises(ValueError, match="normalizer='ocular': 7 points have no such length"):
        run_on("seven", few, normalizer="ocular")
    with pytest.raises(ValueError, match="of 7 landmarks are mirror images is not known"):
        run_on("again", few, augment=dataclasses.replace(AUGMENT, flip=0.5))

    def hide(split, number, record):
        visible = (np.arange(68) != 36).astype(np.int8)
        return msgspec.structs.replace(record, visible=visible)

    with pytest.raises(DataLacks, match="no face of the val split has the length 'ocular'"):
        run_on("hidden", hide)

    def flat(split, number, record):
        return msgspec.structs.replace(record, box=np.array([5, 5, 5, 9], np.float32))

    with pytest.raises(DataLacks, match="no face has both a box that is not empty and a known"):
        run_on("flat", flat)


def test_the_page(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for language, text in blocks(PAGE):
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), {})
    assert re.search(r"\[\s*\d+\.\d+", capsys.readouterr().out)
    tried = [
        set_fields(Settings(), shlex.split(field))
        for field in re.findall(r"`(--\w[\w.]*=[^`]*)`", PAGE.read_text())
    ]
    assert len(tried) > 8
    for command in commands()[1:]:
        given = [word for word in command if re.match(r"--\w+=", word)]
        set_fields(Settings(), given)
