"""Prompts against the grammar and the vocabulary; scores of an encoder made by hand."""

import json

import numpy as np
import pytest
import tiny_downstream

from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.captions import captions
from flip_jax.data.tokenizer import Tokenizer, clean_caption
from flip_jax.downstream import zero_shot
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.face_data import FaceData
from flip_jax.downstream.tasks import run_task
from flip_jax.downstream.zero_shot import Settings, attribute_scores, classify
from flip_jax.downstream.zero_shot_prompts import (
    LABEL_SETS,
    PHRASES,
    TEMPLATES,
    attribute_prompts,
    label_prompts,
)


class Words:
    """An encoder of texts that looks for words: one dimension each, and one for anything else."""

    def __init__(self, *words):
        self.words = words
        self.params = {"temperature": np.float32(0.1)}

    def embed_texts(self, texts):
        found = np.array(
            [[*(word in text.split() for word in self.words), 1.0] for text in texts], np.float32
        )
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_every_attribute_has_prompts_of_both_kinds_and_no_prompt_is_in_both():
    assert tuple(PHRASES) == ATTRIBUTES and len(TEMPLATES) >= 3
    for name in ATTRIBUTES:
        assert all(isinstance(side, tuple) for side in PHRASES[name])
        present, absent = attribute_prompts(name)
        assert len(present) >= len(TEMPLATES) and len(absent) >= len(TEMPLATES)
        assert not set(present) & set(absent), name
        assert all("{" not in text for text in present + absent)


def test_prompts_need_no_word_that_the_small_vocabulary_lacks():
    tokenizer = Tokenizer.load("grammar", 40)
    texts = [text for name in ATTRIBUTES for side in attribute_prompts(name) for text in side]
    texts += [text for labels in LABEL_SETS.values() for la in labels for text in label_prompts(la)]
    ids, mask = tokenizer(texts)
    unknown = [
        text for text, row in zip(texts, ids, strict=True) if "[UNK]" in tokenizer.decode(row)
    ]
    assert unknown == []
    assert "[UNK]" in tokenizer.decode(tokenizer(["☃"])[0][0])
    assert not mask.all(axis=1).any()  # none is cut off


def test_the_grammar_says_of_a_face_what_the_prompts_say():
    """At least one phrase of each attribute is in captions of faces that have it."""
    missing = []
    for number, name in enumerate(ATTRIBUTES):
        said = ""
        for male in (0, 1):
            labels = np.full(40, -1, np.int8)
            labels[ATTRIBUTES.index("Male")] = male
            labels[number] = 1
            said += " ".join(clean_caption(text) for text in captions(labels, 0, 60))
        kernels = [
            clean_caption(phrase)
            .replace("{noun}", "")
            .replace("a man", "")
            .replace("a woman", "")
            .removeprefix("an ")
            .removeprefix("a ")
            .strip()
            for phrase in PHRASES[name][0]
        ]
        words = ("with ", "wearing ", "who is ")
        for word in words:
            kernels = [kernel.removeprefix(word) for kernel in kernels]
        if not any(kernel in said for kernel in kernels if kernel) and name != "Male":
            missing.append((name, kernels))
    assert missing == []


def test_free_labels_become_noun_phrases():
    assert label_prompts("a bald man") == [t.format("a bald man") for t in TEMPLATES]
    assert "the photo shows a man with black hair" in label_prompts("black hair")
    assert "the photo shows a woman wearing a hat" in label_prompts(" wearing a hat ")
    assert "the photo shows a man with receding hairline" in label_prompts("receding hairline")
    assert "here is a man with a beard" in label_prompts("with a beard")


def test_an_attribute_is_there_where_its_presence_is_nearer():
    encoder = Words("black", "glasses")
    embeds = encoder.embed_texts(["black", "glasses", "nothing"])
    scores = attribute_scores(encoder, embeds)
    black, bald = (ATTRIBUTES.index(name) for name in ("Black_Hair", "Oval_Face"))
    assert scores.shape == (3, 40) and scores.dtype == np.float32
    assert scores[0, black] > 0 > scores[1, black]
    np.testing.assert_allclose(scores[:, bald], 0, atol=1e-6)  # words this encoder does not know


def test_shares_of_free_labels_by_hand():
    encoder = Words("bald", "hat")
    embeds = encoder.embed_texts(["bald", "hat", "bald hat"])
    shares = classify(encoder, embeds, ["a bald man", "wearing a hat", "smiling"])
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    assert shares[:2].argmax(1).tolist() == [0, 1]
    cosines = np.array([1.0, 0.5, np.sqrt(0.5)])
    powers = np.exp(cosines / 0.1)
    np.testing.assert_allclose(shares[0], powers / powers.sum(), rtol=1e-4)
    assert shares[2, 0] == pytest.approx(shares[2, 1])
    for labels in (["one"], ["a", "a"], ["a", " "]):
        with pytest.raises(ValueError, match="two or more"):
            classify(encoder, embeds, labels)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero_shot")
    backbone = Backbone.load(tiny_downstream.write_model(folder / "tiny"), batch_size=32)
    data = FaceData(tiny_downstream.write_faces(folder / "drawn"), 32)
    settings = Settings(labels="a bald man; a woman; wearing a hat", by="Young", resamples=50)
    report = run_task("zero_shot", settings, backbone, data, folder / "out", ["command"])
    return report, backbone, data.split("test"), folder / "out"


def test_right_labels_by_a_loop(ran):
    faces = ran[2]
    for name, labels in LABEL_SETS.items():
        right = zero_shot.right_labels(faces, name)
        for row, found in enumerate(right):
            fitting = [
                number
                for number, wanted in enumerate(labels.values())
                if all(faces.attributes[row, ATTRIBUTES.index(a)] == v for a, v in wanted.items())
            ]
            assert found == (fitting[0] if len(fitting) == 1 else -1)
        assert (right >= 0).any()


def test_the_report_is_what_the_functions_say(ran):
    report, backbone, faces, out = ran
    embeds = backbone.embed_images(faces.images)
    names = ["AP", "balanced accuracy", *(f"R@1 {name}" for name in LABEL_SETS)]
    assert list(report.results) == ["trained", "random", "chance"]
    assert all(list(row) == names for row in report.results.values())
    present = attribute_scores(backbone, embeds) > 0
    truth = faces.attributes == 1
    balanced = [
        (present[truth[:, k], k].mean() + (~present[~truth[:, k], k]).mean()) / 2
        for k in range(40)
        if 0 < truth[:, k].sum() < len(truth)
    ]
    found = report.results["trained"]["balanced accuracy"].value
    assert found == pytest.approx(100 * np.mean(balanced), rel=1e-5)
    for name, labels in LABEL_SETS.items():
        right = zero_shot.right_labels(faces, name)
        guess = classify(backbone, embeds, list(labels)).argmax(1)
        recalls = [np.mean(guess[right == k] == k) for k in range(4) if (right == k).any()]
        found = report.results["trained"][f"R@1 {name}"].value
        assert found == pytest.approx(100 * np.mean(recalls), rel=1e-5)
        assert report.results["chance"][f"R@1 {name}"].value == pytest.approx(100 / len(recalls))
    prevalence = [truth[:, k].mean() for k in range(40) if truth[:, k].any()]
    assert report.results["chance"]["AP"].value == pytest.approx(100 * np.mean(prevalence))
    assert json.loads((out / "report.json").read_text())["by"]["trained"]["Young"]["gap"]


def test_free_labels_of_every_picture(ran):
    _, backbone, faces, out = ran
    lines = (out / "labels.csv").read_text().splitlines()
    assert lines[0] == "id,label,a bald man,a woman,wearing a hat" and len(lines) == 25
    shares = classify(backbone, backbone.embed_images(faces.images), lines[0].split(",")[2:])
    for line, record, row in zip(lines[1:], faces.ids, shares, strict=True):
        name, label, *numbers = line.split(",")
        assert name == record and label == lines[0].split(",")[2 + row.argmax()]
        np.testing.assert_allclose([float(n) for n in numbers], row, atol=6e-5)
