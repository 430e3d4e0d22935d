"""The multi-task head: one map for three tasks, from records to report, overlay and reader."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
import tiny_downstream
from flax import nnx
from matplotlib.figure import Figure

from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.drawn_faces import PARSING_CLASSES, draw_face
from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import RecordSource
from flip_jax.data.transforms import BadImage
from flip_jax.downstream import multitask_figure
from flip_jax.downstream.alignment_scoring import Truth, metrics_of
from flip_jax.downstream.attribute_scores import attribute_statistic
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.dense_augment import Augment
from flip_jax.downstream.dense_pictures import DensePicture, read_picture
from flip_jax.downstream.face_data import DataLacks, FaceData
from flip_jax.downstream.multitask import OVERLAY, Settings, load_reader
from flip_jax.downstream.multitask_scoring import Frame, Reading, joint_loss
from flip_jax.downstream.parsing_metrics import confusion, parsing_statistic
from flip_jax.downstream.parsing_scoring import cross_entropy
from flip_jax.downstream.tasks import run_task
from flip_jax.losses.heatmap import landmark_loss
from flip_jax.models.heads import MultitaskHead

# 11 pictures are divided among no two devices: such a step compiles faster.
SETTINGS = Settings(
    size=64, channels=4, epochs=2, batch_size=11, evaluate_every=1, resamples=50, by="Male"
)


def test_the_loss_is_the_weighted_sum_of_the_three():
    """Value and gradient; an attribute's logit is the mean over its map, unknown ones count not."""
    rng = np.random.default_rng(0)
    maps = rng.normal(0, 2, (3, 4, 4, 5 + 2 + 40)).astype(np.float32)
    labels = rng.integers(-1, 2, (3, 40)).astype(np.int8)
    batch = {
        "mask": rng.integers(0, 5, (3, 16, 16)).astype(np.uint8),
        "points": rng.uniform(0, 15, (3, 2, 2)).astype(np.float32),
        "known": rng.random((3, 2)) < 0.7,
        "attributes": labels,
    }

    def plain(maps):
        losses = []
        for row in range(3):
            for k in range(40):
                if labels[row, k] >= 0:
                    share = jax.nn.sigmoid(jnp.sum(maps[row, :, :, 7 + k]) / 16)
                    losses.append(-jnp.log(share if labels[row, k] else 1 - share))
        points = landmark_loss(maps[..., 5:7], batch["points"], batch["known"], 16)[0]
        return (
            0.5 * cross_entropy(maps[..., :5], batch) + 2 * points + 3 * sum(losses) / len(losses)
        )

    loss = joint_loss((5, 2, 40), 16, (0.5, 2.0, 3.0))
    value, gradient = jax.value_and_grad(loss)(maps, batch)
    wanted, by = jax.value_and_grad(plain)(maps)
    assert float(value) == pytest.approx(float(wanted), rel=1e-6)
    np.testing.assert_allclose(gradient, by, atol=1e-7)
    assert loss is joint_loss((5, 2, 40), 16, (0.5, 2.0, 3.0))


def test_a_batch_without_labels_has_a_loss():
    batch = {
        "mask": np.zeros((1, 4, 4), np.uint8),
        "points": np.zeros((1, 2, 2), np.float32),
        "known": np.zeros((1, 2), bool),
        "attributes": np.full((1, 40), -1, np.int8),
    }
    loss = joint_loss((3, 2, 40), 4, (1.0, 1.0, 1.0))
    value, gradient = jax.value_and_grad(loss)(jnp.zeros((1, 2, 2, 45)), batch)
    assert float(value) == pytest.approx(np.log(3)) and np.isfinite(gradient).all()


def test_heatmaps_start_empty_and_nothing_else():
    head = MultitaskHead(8, (3, 2, 4), nnx.Rngs(0), bias=-5.0)
    assert head.bias[...].tolist() == [0] * 3 + [-5] * 2 + [0] * 4
    assert head(jnp.ones((1, 2, 2, 8))).shape == (1, 2, 2, 9)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    drawn = tiny_downstream.write_faces(folder / "drawn", train_identities=16, test_identities=6)
    return FaceData(drawn, 32)


def test_an_example_is_consistent(data):
    """Of a picture that is mirrored: mask and points agree with what they are without that, seen
    in a mirror, and the labels stay."""
    frame, faces = Frame(PARSING_CLASSES, 68, 64), data.split("train")
    picture = read_picture(faces, 3)
    still = {"shift": 0.0, "rotate": 0.0, "scale": 0.0, "gray": 0.0, "gamma": 0.0, "blur": 0.0}
    plain, mirrored = (
        frame.example(Augment(**still, flip=flip), picture, np.random.default_rng(0))
        for flip in (0.0, 1.0)
    )
    assert np.array_equal(plain["attributes"], faces.attributes[3])
    assert np.array_equal(mirrored["attributes"], plain["attributes"])
    corner, other = plain["points"][36], mirrored["points"][45]  # outer corners of the eyes
    np.testing.assert_allclose(other, (63 - corner[0], corner[1]), atol=1e-3)
    left, right = PARSING_CLASSES.index("l_brow"), PARSING_CLASSES.index("r_brow")
    seen = mirrored["mask"][:, ::-1]
    assert (plain["mask"] == left).any()
    assert np.array_equal(plain["mask"] == left, seen == right)


def test_the_numbers_are_those_of_the_three_tasks(data):
    """Of random readings: the columns of `parsing`, `alignment` and `attributes`."""
    faces, rng = data.split("test"), np.random.default_rng(0)
    frame = Frame(PARSING_CLASSES, 68, 64)
    truth = Truth.of(frame.marks, faces)
    found = []
    for row in range(len(faces)):
        picture = read_picture(faces, row)
        mask = rng.integers(0, 19, picture.shape).astype(np.uint8)
        points = picture.landmarks + rng.normal(0, 2, (68, 2)).astype(np.float32)
        found.append((picture, Reading(mask, points, rng.random(40).astype(np.float32))))
    weights = rng.integers(0, 3, (4, len(faces))).astype(np.float32)
    numbers = frame.statistic(found, faces, truth)(weights)
    names = frame.metrics()
    assert names == ["F1", "pixel accuracy", *metrics_of(68), "accuracy", "balanced accuracy", "AP"]
    confusions = np.stack([confusion(one.mask, p.mask, 19) for p, one in found])
    np.testing.assert_allclose(numbers[:, :2], parsing_statistic(confusions)(weights)[:, :2])
    errors = truth.numbers(np.stack([one.points for _, one in found]))
    np.testing.assert_allclose(numbers[:, 2:-3], weights @ errors / weights.sum(1)[:, None])
    shares = np.stack([one.attributes for _, one in found])
    wanted = attribute_statistic(shares > 0.5, shares, faces.attributes)(weights)[:, :3]
    np.testing.assert_allclose(numbers[:, -3:], wanted)


def test_the_truth_is_read_back(data):
    """Maps made of the true mask, points and labels give nearly full marks."""
    faces, size = data.split("test"), 128
    frame = Frame(PARSING_CLASSES, 68, size)

    def predict(squares):
        for row in range(len(squares)):
            picture = read_picture(faces, row)
            place = frame.masks.place(picture)
            mask = place.place_mask(picture.mask)[..., None] == np.arange(19)
            x, y = place.forward(picture.landmarks).T
            grid = np.arange(size)
            far = (grid[None, :, None] - x) ** 2 + (grid[:, None, None] - y) ** 2
            labels = np.broadcast_to(np.where(picture.attributes == 1, 9.0, -9.0), (size, size, 40))
            maps = np.concatenate([20.0 * mask, 5 - far, labels], axis=-1)
            yield maps[None].astype(np.float32)

    statistic = frame.statistic(frame.read(predict, faces), faces, Truth.of(frame.marks, faces))
    found = dict(zip(frame.metrics(), statistic(np.ones((1, len(faces))))[0], strict=True))
    assert found["F1"] > 95 and found["NME ocular"] < 0.5
    assert found["accuracy"] == found["AP"] == 100


def test_brackets_around_what_is_not_labelled_so():
    labels = np.full(40, -1, np.int8)
    labels[:2] = 1, 0
    shares = np.where(np.arange(40) < 3, 0.9 - 0.1 * np.arange(40), 0.1).astype(np.float32)
    image = np.zeros((4, 4, 3), np.uint8)
    picture = DensePicture(image, None, None, None, attributes=labels)
    axis = Figure().subplots()
    found = Reading(np.zeros((4, 4), np.uint8), np.zeros((2, 2), np.float32), shares)
    multitask_figure._face(axis, picture, found, np.zeros((1, 3)))
    assert axis.get_title() == "5 o Clock Shadow\n(Arched Eyebrows)\n(Attractive)"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return Backbone.load(tiny_downstream.write_model(folder), batch_size=8)


@pytest.fixture(scope="module")
def ran(backbone, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "multitask"
    settings = dataclasses.replace(SETTINGS, fractions="50 100")
    return run_task("multitask", settings, backbone, data, out, ["a", "command"]), out


@pytest.mark.slow  # heads are trained, which is mostly compiling
def test_the_report(ran, data):
    out = ran[1]
    found = json.loads((out / "report.json").read_text())
    assert list(found["results"]) == ["trained", "random", "chance"]
    for label in ("trained", "random"):
        assert list(found["details"][label]) == ["50 %", "100 %"]
        whole = found["details"][label]["100 %"]
        assert whole["AP"] == found["results"][label]["AP"]
        assert whole["epoch"] == 1 + np.argmax(whole["val_score"])
        named = {n: found["results"][label][n]["value"] for n in ("F1", "AP", "NME ocular")}
        score = (named["F1"] + named["AP"] + 100 - named["NME ocular"]) / 3
        assert whole["test_score"][whole["epoch"] - 1] == pytest.approx(score, rel=1e-5)
    page = (out / "report.md").read_text()
    for words in ("image tower frozen", "19 classes, 68 points", "## By Male, random"):
        assert words in page
    for name in ("report.png", OVERLAY):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_chance_is_what_is_most_usual(ran, data):
    train, _, test = data.three_splits("train", "val", "test")
    chance = ran[0].results["chance"]
    usual = (train.attributes == 1).mean(0) > 0.5
    assert chance["accuracy"].value == pytest.approx(100 * (test.attributes == usual).mean())
    present = (test.attributes == 1).mean(0)
    assert chance["AP"].value == pytest.approx(100 * present[present > 0].mean(), rel=1e-5)
    marks = [read_picture(train, row).landmarks for row in range(len(train))]
    frame = Frame(PARSING_CLASSES, 68, 64)
    errors = Truth.of(frame.marks, test).errors(
        "ocular", np.broadcast_to(np.mean(marks, 0), (len(test), 68, 2))
    )
    assert chance["NME ocular"].value == pytest.approx(100 * errors.mean(), rel=1e-4)


@pytest.mark.slow
def test_the_reader_finds_what_was_scored(ran, backbone, data):
    report, out = ran
    reader, faces = load_reader(out / "reader.npz", backbone), data.split("test")
    assert reader.classes == PARSING_CLASSES and reader.points == 68
    records = [faces.record(row) for row in range(len(faces))]
    found = reader.read([record.image for record in records], batch_size=11)
    pictures = [read_picture(faces, row) for row in range(len(faces))]
    frame = Frame(PARSING_CLASSES, 68, 64)
    pairs = zip(pictures, found, strict=True)
    statistic = frame.statistic(pairs, faces, Truth.of(frame.marks, faces))
    numbers = statistic(np.ones((1, len(faces)), np.float32))[0]
    wanted = [number.value for number in report.results["trained"].values()]
    np.testing.assert_allclose(numbers, wanted, rtol=1e-6)
    wide = draw_face(0, 3, 0, 96).image[:60]
    (one,) = reader.read([wide])
    assert one.mask.shape == (60, 96) and one.points.shape == (68, 2)
    assert one.attributes.shape == (len(ATTRIBUTES),) and reader.read([]) == []
    with pytest.raises(BadImage, match="picture 1"):
        reader.read([wide, b"nothing"])
    with pytest.raises(ValueError, match="of 'multitask', not of 'parsing'"):
        from flip_jax.downstream.parsing import load_parser

        load_parser(out / "reader.npz", backbone)


def test_data_that_lacks_one_of_the_two(backbone, data, tmp_path):
    """Every record has a mask or landmarks, none has both."""
    folder = tmp_path / "halves"
    with RecordWriter(folder, "test", mask_classes=PARSING_CLASSES) as writer:
        for split in ("train", "test"):
            source = RecordSource(data.path, split)
            for number in range(12):
                half = {"mask": None} if number % 2 else {"landmarks": None, "visible": None}
                writer.write(split, msgspec.structs.replace(source[number], **half))
    with pytest.raises(DataLacks, match="no record has both a mask and landmarks"):
        halves = FaceData(folder, 32)
        run_task("multitask", SETTINGS, backbone, halves, tmp_path / "out", ["command"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "settings.epochs=0: must be at least 1"),
        ({"weights": "1 1"}, "settings.weights='1 1': must be three numbers"),
        ({"weights": "1 0 1"}, "settings.weights='1 0 1': must be numbers above 0"),
        ({"size": 40}, "settings.size=40: must be a multiple of the patch size 16"),
    ],
)
def test_settings_out_of_range(change, message, backbone, data, tmp_path):
    settings = dataclasses.replace(SETTINGS, **change)
    with pytest.raises(ValueError, match=message):
        run_task("multitask", settings, backbone, data, tmp_path / "out", ["command"])
    assert not (tmp_path / "out").exists()


def test_default_settings():
    full = Settings().resolved(64)
    assert (full.size, full.finetune, full.three_weights()) == (64, False, (1.0, 1.0, 1.0))
    assert full.augment.gray == 0
