"""LFWA as published, through its reader, to the attribute table: two commands."""

import json

import numpy as np
import published_layouts as layouts
import pytest
import tiny_downstream

from flip_jax.data.__main__ import main as data_main
from flip_jax.data.readers.lfw import Lfwa
from flip_jax.downstream.__main__ import main
from flip_jax.downstream.attributes import load_probe

PEOPLE = {f"Person_{letter}": 1 + number % 2 for number, letter in enumerate("ABCDEFGHIJKLMNOPQR")}
TEST_PEOPLE = 6  # the last ones


def test_lfwa_from_the_published_files_to_the_table(tmp_path, capsys):
    pytest.importorskip("h5py")
    root, data, out = tmp_path / "lfwa", tmp_path / "data", tmp_path / "out"
    pictures, tested = sum(PEOPLE.values()), sum(list(PEOPLE.values())[-TEST_PEOPLE:])
    rows = range(1, pictures + 1)
    layouts.lfwa(root, tuple(rows[:-tested]), tuple(rows[-tested:]), PEOPLE)
    assert data_main(["read", "lfwa", "--root", str(root), "--out", str(data)]) == 0
    model = tiny_downstream.write_model(tmp_path / "tiny")
    given = ["--checkpoint", str(model), "--data", str(data), "--out", str(out), "--batch-size=32"]
    given += ["--fractions=100", "--epochs=3", "--rates=0.003", "--resamples=20"]
    assert main(["attributes", *given, "--random-backbone=false"]) == 0, capsys.readouterr().err

    found = json.loads((out / "report.json").read_text())
    # All people, validation among the training people, and nobody in two places.
    splits = {split["split"]: split for split in found["data"]["splits"]}
    assert {name: split["records"] for name, split in splits.items()} == {
        "train": pictures - tested,
        "test": tested,
    }
    samples = {split: list(Lfwa(root, split)) for split in Lfwa.SPLITS}
    people = {split: {sample.group_id for sample in found} for split, found in samples.items()}
    assert len(people["test"]) == TEST_PEOPLE and not people["train"] & people["test"]
    # The accuracy on the page is that of the saved probe on the published pictures and labels.
    probe = load_probe(out / "probe")
    shares = probe.probabilities([sample.image for sample in samples["test"]])
    right = (shares > 0.5) == np.stack([sample.attributes for sample in samples["test"]])
    accuracy = found["results"]["trained"]["accuracy"]["value"]
    assert accuracy == pytest.approx(100 * right.mean(), abs=1e-3)
