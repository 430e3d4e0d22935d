"""Labels of crops: thresholds, the input's own labels, and classifiers in ONNX."""

import dataclasses
import pickle

import numpy as np
import pytest

from flip_jax.curate.attributes import AttributeStage, labels_from_probabilities
from flip_jax.curate.config import AttributesConfig
from flip_jax.curate.stages import Sample, Tally
from flip_jax.data.transforms import encode_jpeg

GIVEN = AttributesConfig()


def labels(known, value=1):
    found = np.full(40, -1, np.int8)
    found[:known] = value
    return found


def run(stage, *samples):
    stage = pickle.loads(pickle.dumps(stage))
    stage.setup()
    tally = Tally()
    return stage.process(samples, tally), tally


def test_thresholds():
    probabilities = np.full(40, 0.5)
    probabilities[:7] = (0.851, 0.85, 0.149, 0.15, 0.0, 1.0, np.nan)
    found = labels_from_probabilities(probabilities, 0.85)
    assert found.dtype == np.int8
    assert found[:8].tolist() == [1, -1, 0, -1, 0, 1, -1, -1]
    assert (found[7:] == -1).all()
    # float32 as a model gives it: 0.85 and 0.15 are not above the limit by rounding.
    edges = np.tile(np.array([0.85, 0.15], np.float32), 20)
    assert (labels_from_probabilities(edges, 0.85) == -1).all()


@pytest.mark.parametrize(
    ("probabilities", "limit", "message"),
    [
        (np.zeros(39), 0.85, "the last axis must have 40"),
        (np.full(40, 1.5), 0.85, "must be from 0 to 1"),
        (np.zeros(40), 0.4, "min_probability=0.4: must be from 0.5 to 1"),
    ],
)
def test_bad_probabilities(probabilities, limit, message):
    with pytest.raises(ValueError, match=message):
        labels_from_probabilities(probabilities, limit)


def test_given_labels_and_too_few_of_them():
    samples = [
        Sample("six", attributes=labels(6)),
        Sample("five", attributes=labels(5)),
        Sample("absent", attributes=labels(40, 0)),
        Sample("none"),
        Sample("unknown", attributes=labels(0)),
    ]
    kept, tally = run(AttributeStage(GIVEN), *samples)
    assert [sample.id for sample in kept] == ["six"]
    np.testing.assert_array_equal(kept[0].attributes, labels(6))
    assert [(drop.sample.id, drop.reason, drop.detail) for drop in tally.drops] == [
        ("five", "few labels", "5 present"),
        ("absent", "few labels", "0 present"),
        ("none", "no labels", ""),
        ("unknown", "few labels", "0 present"),
    ]


def test_no_labels_wanted():
    samples = [Sample("none"), Sample("unknown", attributes=labels(0))]
    kept, tally = run(AttributeStage(dataclasses.replace(GIVEN, min_labels=-1)), *samples)
    assert [sample.id for sample in kept] == ["none", "unknown"] and not tally.drops


def test_given_probabilities_go_before_given_labels():
    probabilities = np.full(40, np.nan, np.float32)
    probabilities[:3] = (0.99, 0.01, 0.6)
    sample = Sample("a", attributes=labels(10), probabilities=probabilities)
    ((kept,), _) = run(AttributeStage(GIVEN), sample)
    assert kept.attributes[:11].tolist() == [1, 0, -1, 1, 1, 1, 1, 1, 1, 1, -1]
    assert kept.attributes.dtype == np.int8


class Brightness:
    """A labeller: every probability is the mean of the picture."""

    size = 8

    def setup(self):
        self.batches = []

    def __call__(self, images):
        assert images.dtype == np.uint8 and images.shape[1:] == (8, 8, 3)
        self.batches.append(len(images))
        mean = images.mean(axis=(1, 2, 3)) / 255
        return np.repeat(mean[:, None], 40, axis=1).astype(np.float32)

    def fingerprint(self):
        return "brightness"


def grey(value, side=20):
    return encode_jpeg(np.full((side, side + 6, 3), value, np.uint8))


def test_a_labeller_of_ones_own():
    cfg = dataclasses.replace(GIVEN, batch_size=2)
    stage = AttributeStage(cfg, Brightness())
    stage.setup()
    tally = Tally()
    samples = [
        Sample("light", image=grey(250)),
        Sample("dark", image=grey(5)),
        Sample("broken", image=b"nothing"),
        Sample("grey", image=grey(128)),
        Sample("light too", image=grey(240)),
    ]
    kept = stage.process(samples, tally)
    assert [sample.id for sample in kept] == ["light", "light too"]
    assert [sample.attributes[0] for sample in kept] == [1, 1]
    np.testing.assert_allclose(kept[0].probabilities, 250 / 255, atol=1e-6)
    assert {(d.sample.id, d.reason) for d in tally.drops} == {
        ("broken", "undecodable"),
        ("dark", "few labels"),
        ("grey", "few labels"),
    }
    assert stage.labeller.batches == [2, 2, 2]  # filled up, so that numbers stay the same
    assert stage.process([], tally) == []
    every = AttributeStage(dataclasses.replace(cfg, min_labels=-1), stage.labeller)
    found = every.process(samples[:1] + samples[1:2] + samples[3:4], Tally())
    assert [sample.attributes[0] for sample in found] == [1, 0, -1]
    assert stage.fingerprint() != AttributeStage(GIVEN).fingerprint()


# Classifiers in ONNX


@pytest.fixture
def onnx_files():
    pytest.importorskip("onnxruntime", reason="needs onnx and onnxruntime")
    return pytest.importorskip("onnx_files", reason="needs onnx and onnxruntime")


def colours(count, side=24):
    rng = np.random.default_rng(1)
    values = rng.integers(0, 256, (count, 3))
    return values, [
        Sample(str(n), image=encode_jpeg(np.full((side, side, 3), value, np.uint8)))
        for n, value in enumerate(values)
    ]


@pytest.mark.parametrize(("size", "batch"), [((16, 16), "b"), ((16, 16), 1), ((8, 8), 4)])
def test_probabilities_of_a_model_file(tmp_path, onnx_files, size, batch):
    """A fixed size and a fixed batch of the model are kept to."""
    path = onnx_files.mean_colour_classifier(tmp_path / "m.onnx", size, batch)
    cfg = AttributesConfig(
        labeller="onnx",
        model=path,
        image_mean=(0.0, 0.0, 0.0),
        image_std=(1.0, 0.5, 1.0),
        min_labels=-1,
        batch_size=3,
    )
    values, samples = colours(7)
    kept, tally = run(AttributeStage(cfg), *samples)
    # Number i is i / 100 of channel i % 3 as the model sees it.
    wanted = np.arange(40) / 100 * (values / 255 / [1, 0.5, 1])[:, np.arange(40) % 3]
    found = np.array([sample.probabilities for sample in kept])
    np.testing.assert_allclose(found, wanted, atol=0.005)  # JPEG
    assert found.dtype == np.float32 and not tally.drops
    alone, _ = run(AttributeStage(cfg), samples[4])
    np.testing.assert_array_equal(alone[0].probabilities, found[4])
    assert (kept[0].attributes[0], len(kept)) == (0, 7)


def test_logits_of_a_model_file(tmp_path, onnx_files):
    path = onnx_files.mean_colour_classifier(tmp_path / "m.onnx", (8, 8))
    cfg = AttributesConfig(
        labeller="onnx",
        model=path,
        model_output="logits",
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.01, 0.01, 0.01),
        min_labels=-1,
    )
    values, samples = colours(3)
    kept, _ = run(AttributeStage(cfg), *samples)
    logits = np.arange(40) / 100 * ((values / 255 - 0.5) / 0.01)[:, np.arange(40) % 3]
    found = np.array([sample.probabilities for sample in kept])
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits)), atol=0.06)


def test_model_files_that_do_not_fit(tmp_path, onnx_files):
    sample = colours(1)[1][0]

    def cfg(path, **fields):
        return AttributesConfig(labeller="onnx", model=str(path), **fields)

    with pytest.raises(ValueError, match=r"config.attributes.model='none' is not a file"):
        AttributeStage(cfg("none"))
    few = onnx_files.mean_colour_classifier(tmp_path / "few.onnx", (8, 8), numbers=39)
    with pytest.raises(ValueError, match=r"'numbers': \[16, 39\].*exactly one must be \[16, 40\]"):
        run(AttributeStage(cfg(few)), sample)
    free = onnx_files.mean_colour_classifier(tmp_path / "free.onnx", ("h", "w"))
    with pytest.raises(ValueError, match="takes pictures of any size; export it"):
        run(AttributeStage(cfg(free)), sample)
    wide = onnx_files.mean_colour_classifier(tmp_path / "wide.onnx", (16, 32))
    with pytest.raises(ValueError, match="takes pictures of 32 x 16 px; export it for square ones"):
        run(AttributeStage(cfg(wide)), sample)
    logits = onnx_files.mean_colour_classifier(tmp_path / "logits.onnx", (8, 8))
    with pytest.raises(ValueError, match=r"set config.attributes.model_output=logits"):
        run(AttributeStage(cfg(logits, image_std=(0.01, 0.01, 0.01))), sample)


def test_another_model_file_is_another_fingerprint(tmp_path, onnx_files):
    paths = [
        onnx_files.mean_colour_classifier(tmp_path / name, (8, 8), batch)
        for name, batch in (("a.onnx", 1), ("b.onnx", 1), ("c.onnx", 2))
    ]
    stages = [AttributeStage(AttributesConfig(labeller="onnx", model=path)) for path in paths]
    prints = [stage.fingerprint() for stage in stages]
    assert prints[0] == prints[1] != prints[2]
    stages[0].setup()
    assert stages[0].fingerprint() == prints[0]
