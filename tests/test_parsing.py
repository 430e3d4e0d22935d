"""Face parsing: its metric, and the task from records to report, overlays and parser."""

import dataclasses
import json

import jax
import msgspec
import numpy as np
import pytest
import tiny_downstream

from flip_jax.data.drawn_faces import PARSING_CLASSES, draw_face
from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import MANIFEST, RecordSource
from flip_jax.data.transforms import BadImage
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.dense_augment import Augment
from flip_jax.downstream.dense_pictures import DensePicture, read_picture
from flip_jax.downstream.face_data import DataLacks, FaceData
from flip_jax.downstream.parsing import (
    OVERLAYS,
    RECIPES,
    Settings,
    _faces,
    class_names,
    load_parser,
)
from flip_jax.downstream.parsing_figure import class_colours, overlay
from flip_jax.downstream.parsing_metrics import confusion, parsing_statistic, picture_f1
from flip_jax.downstream.parsing_scoring import Frame, cross_entropy
from flip_jax.downstream.tasks import run_task

# Heads are trained here, which is mostly compiling.
pytestmark = pytest.mark.slow


# 11 pictures are divided among no two devices: such a step compiles faster.
SETTINGS = Settings(
    size=64, channels=4, epochs=2, batch_size=11, evaluate_every=1, resamples=50, by="Male"
)


def test_f1_by_hand():
    """Two pictures of 2 x 2 pixels and 4 classes, of which class 3 is nowhere."""
    truth = np.array([[[0, 1], [1, 2]], [[1, 1], [0, 0]]], np.uint8)
    found = np.array([[[0, 1], [2, 2]], [[1, 0], [1, 0]]], np.uint8)
    matrices = np.stack([confusion(f, t, 4) for f, t in zip(found, truth, strict=True)])
    assert matrices[0].tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    numbers = parsing_statistic(matrices)(np.array([[1, 1], [1, 0], [2, 1]], np.float32))
    # Class 1: 2 hits, 4 true, 3 found; class 2: 1 hit, 1 true, 2 found. 5 of 8 pixels are right.
    one, two = 100 * 2 * 2 / 7, 100 * 2 * 1 / 3
    np.testing.assert_allclose(numbers[0], [(one + two) / 2, 62.5, one, two, np.nan])
    np.testing.assert_allclose(numbers[1], [200 / 3, 75, 200 / 3, 200 / 3, np.nan])
    # Weight 2 is the picture twice.
    np.testing.assert_allclose(numbers[2, 2], 100 * 2 * 3 / (6 + 4))
    # By itself the second has class 1 only: 1 hit, 2 true, 2 found.
    np.testing.assert_allclose(picture_f1(matrices), [200 / 3, 50])


def test_f1_against_a_loop():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 5, (2, 6, 9, 7)).astype(np.uint8)
    weights = rng.integers(0, 3, (4, 6)).astype(np.float32)
    matrices = np.stack([confusion(f, t, 5) for f, t in zip(found, truth, strict=True)])
    numbers = parsing_statistic(matrices)(weights)
    for row, own in zip(numbers, weights.tolist(), strict=True):
        scores = []
        for k in range(1, 5):
            hits = wrong = missed = 0
            for f, t, weight in zip(found, truth, own, strict=True):
                for a, b in zip(f.ravel(), t.ravel(), strict=True):
                    hits += weight * (a == k and b == k)
                    wrong += weight * (a == k and b != k)
                    missed += weight * (a != k and b == k)
            precision, recall = hits / (hits + wrong), hits / (hits + missed)
            scores.append(100 * 2 * precision * recall / (precision + recall))
        np.testing.assert_allclose(row[2:], scores, rtol=1e-12)
        assert row[0] == pytest.approx(np.mean(scores), rel=1e-12)


def test_a_class_that_is_only_found_counts_as_zero():
    matrices = confusion(np.array([2, 1]), np.array([1, 1]), 3)[None]
    numbers = parsing_statistic(matrices)(np.ones((1, 1)))[0]
    np.testing.assert_allclose(numbers, [100 / 3, 50, 200 / 3, 0])


def test_the_loss_against_torch():
    """Logits at a quarter of the size: value and gradient."""
    torch = pytest.importorskip("torch", reason="the oracle needs PyTorch (extra `torch`)")
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 4, 4, 5)).astype(np.float32)
    mask = rng.integers(0, 5, (2, 16, 16)).astype(np.uint8)
    value, gradient = jax.value_and_grad(cross_entropy)(logits, {"mask": mask})
    theirs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    large = torch.nn.functional.interpolate(
        theirs.permute(0, 3, 1, 2), (16, 16), mode="bilinear", align_corners=False
    )
    wanted = torch.nn.functional.cross_entropy(large, torch.tensor(mask.astype(np.int64)))
    wanted.backward()
    assert float(value) == pytest.approx(wanted.item(), rel=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad, atol=1e-7)


@pytest.mark.parametrize(("align", "warp"), [("none", 0.0), ("points", 0.8), ("none", 0.8)])
def test_the_truth_scores_nearly_all(align, warp, tmp_path):
    """Masks placed as training has them and taken back as predictions: F1 close to 100."""
    data = tiny_downstream.write_faces(tmp_path / "faces", train_identities=4, size=96)
    faces = FaceData(data, 32).split("train")
    frame = Frame(PARSING_CLASSES, 256, align, warp)

    def predict(squares):
        for row in range(len(squares)):
            picture = read_picture(faces, row)
            placed = frame.place(picture).place_mask(picture.mask)
            yield (placed[None, ..., None] == np.arange(19)).astype(np.float32)

    numbers = parsing_statistic(frame.confusions(predict, faces))(np.ones((1, len(faces))))[0]
    # Alignment cuts off some of hat, neck and clothes; the warp keeps the whole picture.
    assert numbers[0] > 95 and numbers[1] > 98


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return Backbone.load(tiny_downstream.write_model(folder), batch_size=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    drawn = tiny_downstream.write_faces(folder / "drawn", train_identities=16, test_identities=6)
    return FaceData(drawn, 32)


@pytest.fixture(scope="module")
def ran(backbone, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "parsing"
    settings = dataclasses.replace(SETTINGS, fractions="50 100", epochs=2)
    return run_task("parsing", settings, backbone, data, out, ["a", "command"]), out


def test_the_report(ran, data):
    out = ran[1]
    found = json.loads((out / "report.json").read_text())
    assert found["task"] == "parsing" and list(found["results"]) == ["trained", "random", "chance"]
    for row in found["results"].values():
        assert list(row) == ["F1", "pixel accuracy"]
        for number in row.values():
            assert 0 <= number["low"] <= number["high"] <= 100
    for label in ("trained", "random"):
        assert list(found["details"][label]) == ["50 %", "100 %"]
        whole = found["details"][label]["100 %"]
        each = whole["F1 of each"]
        assert list(each) == list(PARSING_CLASSES[1:])
        values = [one["value"] for one in each.values() if one["value"] is not None]
        assert whole["F1"]["value"] == pytest.approx(np.mean(values))
        # All pixels of the test split, as they are in its own masks.
        pixels = np.zeros(19, int)
        faces = data.split("test")
        for row in range(len(faces)):
            pixels += np.bincount(read_picture(faces, row).mask.ravel(), minlength=19)
        assert np.array(whole["confusion"]).sum(1).tolist() == pixels.tolist()
        assert len(whole["test_f1"]) == 2 and whole["best_on_test"] == max(whole["test_f1"])
        assert whole["epoch"] == 1 + np.argmax(whole["val_f1"])
    train = sum(1 for _ in data.three_splits("train", "val", "test")[0].ids)
    assert found["details"]["trained"]["50 %"]["pictures"] == round(train / 2)
    page = (out / "report.md").read_text()
    for words in ("| l_brow |", "image tower frozen", "best on test", "## By Male, random"):
        assert words in page
    for name in ("report.png", *OVERLAYS):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_chance_is_the_most_frequent_class_of_each_place(ran, data):
    train = data.three_splits("train", "val", "test")[0]
    masks = np.stack([read_picture(train, row).mask for row in range(len(train))])
    counts = (masks[..., None] == np.arange(19)).sum(0)
    faces, always = data.split("test"), counts.argmax(-1)
    matrices = [confusion(always, read_picture(faces, r).mask, 19) for r in range(len(faces))]
    wanted = parsing_statistic(np.stack(matrices))(np.ones((1, len(faces))))[0]
    chance = ran[0].results["chance"]
    assert chance["F1"].value == pytest.approx(wanted[0])
    assert chance["pixel accuracy"].value == pytest.approx(wanted[1])


def test_the_parser_finds_what_was_scored(ran, backbone, data):
    """Its masks of the test pictures give the confusions of the report."""
    report, out = ran
    parser, faces = load_parser(out / "parser.npz", backbone), data.split("test")
    assert parser.classes == PARSING_CLASSES
    assert parser.about["data"]["path"] == str(data.path)
    records = [faces.record(row) for row in range(len(faces))]
    masks = parser.parse([record.image for record in records], batch_size=11)
    total = sum(
        confusion(mask, read_picture(faces, row).mask, 19) for row, mask in enumerate(masks)
    )
    assert np.array_equal(total, report.details["trained"]["100 %"]["confusion"])
    wide = draw_face(0, 3, 0, 96).image[:60]
    assert parser.parse([wide])[0].shape == (60, 96) and parser.parse([]) == []
    with pytest.raises(BadImage, match="picture 1"):
        parser.parse([wide, b"nothing"])


def test_parts_are_the_numbers_of_those_faces(ran, data):
    report, _ = ran
    (found,) = report.breakdowns["trained"]
    faces = data.split("test")
    assert found.parts["yes"][0] == (faces.attributes[:, 20] == 1).sum()
    whole = report.results["trained"]["pixel accuracy"].value
    parts = [(count, numbers[1].value) for count, numbers in found.parts.values()]
    assert sum(n * v for n, v in parts) / sum(n for n, _ in parts) == pytest.approx(whole)


def test_warp_and_alignment_run_with_a_fine_tuned_tower(backbone, data, tmp_path):
    settings = dataclasses.replace(
        SETTINGS, epochs=1, by="", align="points", warp=0.8, finetune=True, random_backbone=False
    )
    report = run_task("parsing", settings, backbone, data, tmp_path / "out", ["command"])
    assert list(report.results) == ["trained", "chance"]
    assert "align `points`, warp 0.8" in report.notes[0] and "fine-tuned" in report.notes[0]
    parser = load_parser(tmp_path / "out" / "parser.npz", backbone)
    face = draw_face(0, 2, 0, 96)
    (mask,) = parser.parse([face.image], [face.landmarks])
    assert mask.shape == (96, 96)
    with pytest.raises(ValueError, match="of 0 landmarks"):
        parser.parse([face.image])


def test_five_points_in_one_place_name_the_picture():
    picture = DensePicture(np.zeros((9, 9, 3), np.uint8), None, np.ones((68, 2)), None, name="it")
    with pytest.raises(ValueError, match=r"it: the five points are one.*align=none"):
        Frame(PARSING_CLASSES, 64, "points", 0.0).place(picture)


def write_like(data, folder, change, classes=PARSING_CLASSES):
    """Some records of a data set, changed."""
    with RecordWriter(folder, "test", mask_classes=classes) as writer:
        for split in ("train", "test"):
            source = RecordSource(data.path, split)
            for number in range(12):
                writer.write(split, change(number, source[number]))
    return FaceData(folder, 32)


def test_data_without_masks_or_points(backbone, data, tmp_path):
    bare = write_like(data, tmp_path / "bare", lambda _, r: msgspec.structs.replace(r, mask=None))
    with pytest.raises(DataLacks, match="no record has a mask"):
        run_task("parsing", SETTINGS, backbone, bare, tmp_path / "out", ["command"])
    blind = write_like(
        data, tmp_path / "blind", lambda _, r: msgspec.structs.replace(r, landmarks=None)
    )
    settings = dataclasses.replace(SETTINGS, align="points")
    with pytest.raises(DataLacks, match="align=points needs 5, 68, 98, 106 landmarks"):
        run_task("parsing", settings, backbone, blind, tmp_path / "out", ["command"])
    assert not (tmp_path / "out").exists()


def test_names_of_the_classes(backbone, data, tmp_path):
    """From the manifest; without names, numbers; a number beyond the names is an error."""
    faces = data.split("train")
    assert class_names(data, faces) == PARSING_CLASSES
    unnamed = write_like(data, tmp_path / "unnamed", lambda _, r: r, classes=())
    masks = [read_picture(faces, row).mask for row in range(12)]
    found = class_names(unnamed, unnamed.split("train"))
    assert found[:2] == ("background", "class 1") and len(found) == 1 + np.max(masks)
    mirrored = dataclasses.replace(SETTINGS, augment=Augment(flip=0.5))
    with pytest.raises(ValueError, match="does not name the classes of its masks"):
        run_task("parsing", mirrored, backbone, unnamed, tmp_path / "out", ["command"])
    few = write_like(data, tmp_path / "few", lambda _, r: r, classes=("background", "face"))
    with pytest.raises(ValueError, match=r"record .*build the data set again with all names"):
        run_task("parsing", SETTINGS, backbone, few, tmp_path / "out", ["command"])


def test_a_manifest_of_before_is_read(data, tmp_path):
    """Data sets that are there have no names in their manifest."""
    copy = write_like(data, tmp_path / "old", lambda _, r: r)
    manifest = json.loads((copy.path / MANIFEST).read_text())
    del manifest["mask_classes"]
    (copy.path / MANIFEST).write_text(json.dumps(manifest))
    assert FaceData(copy.path, 32).manifest.mask_classes == []


def test_pictures_without_masks_are_left_out(data, tmp_path):
    some = write_like(
        data,
        tmp_path / "some",
        lambda n, r: msgspec.structs.replace(r, mask=None) if n % 2 else r,
    )
    found = _faces(SETTINGS.resolved(32), some)
    assert len(found.test) == 6 and len(found.train) + len(found.val) == 6
    again = _faces(dataclasses.replace(SETTINGS, seed=1).resolved(32), some)
    assert found.train.ids != again.train.ids and {*found.train.ids} == {*again.train.ids}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "settings.epochs=0: must be at least 1"),
        ({"warp": 1.5}, "settings.warp=1.5: must be from 0 to 1"),
        ({"rates": "1e-3"}, "must be four numbers"),
        ({"rates": "1 1 1 x"}, "settings.rates='1 1 1 x': must be numbers above 0"),
        ({"fractions": "0 10"}, "settings.fractions='0 10'"),
        ({"size": 40}, "settings.size=40: must be a multiple of the patch size 16"),
    ],
)
def test_settings_out_of_range(change, message, backbone, data, tmp_path):
    settings = dataclasses.replace(SETTINGS, **change)
    with pytest.raises(ValueError, match=message):
        run_task("parsing", settings, backbone, data, tmp_path / "out", ["command"])
    assert not (tmp_path / "out").exists()


def test_recipes():
    """FaRL's numbers; what is given comes first."""
    lapa = Settings(recipe="lapa", epochs=3).resolved(224)
    assert (lapa.size, lapa.channels, lapa.epochs, lapa.batch_size) == (448, 768, 3, 40)
    assert (lapa.warp, lapa.align, lapa.finetune) == (0.8, "points", True)
    assert lapa.dense_recipe(8, 8).rates == (1e-4, 1e-3, 1e-3, 1e-3)
    assert (lapa.augment.shift, lapa.augment.rotate, lapa.augment.scale) == (0.01, 0.314, 0.1)
    celeba = Settings(recipe="celeba_hq").resolved(224)
    assert (celeba.warp, celeba.align, celeba.epochs) == (0.0, "none", 300)
    assert Settings().resolved(64).size == 64 and not Settings().resolved(64).finetune
    assert {*RECIPES} == {"small", "celeba_hq", "lapa"}


def test_overlays_show_the_classes():
    colours = class_colours(19)
    assert len({tuple(c) for c in colours}) == 19
    assert np.array_equal(class_colours(11), colours[:11])
    image = np.full((2, 2, 3), 100, np.uint8)
    found = overlay(image, np.array([[0, 1], [1, 2]], np.uint8), colours)
    assert np.array_equal(found[0, 0], image[0, 0]) and np.array_equal(found[0, 1], found[1, 0])
    np.testing.assert_allclose(found[1, 1], 40 + 0.6 * 255 * colours[2], atol=1)
