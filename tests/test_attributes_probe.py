"""The attributes task from records to report, and the probe it leaves behind."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_downstream

from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.transforms import BadImage, resize_image
from flip_jax.downstream import attributes
from flip_jax.downstream.attribute_head import head_logits, init_head, normalize_states
from flip_jax.downstream.attributes import Settings, load_probe
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.face_data import DataLacks, FaceData
from flip_jax.downstream.probe import save_probe
from flip_jax.downstream.tasks import run_task

SETTINGS = Settings(fractions="10 100", epochs=4, rates="0.03", by="Male", resamples=50)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return Backbone.load(tiny_downstream.write_model(folder), batch_size=16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    drawn = tiny_downstream.write_faces(folder / "drawn", train_identities=40)
    return FaceData(drawn, 32, cache=folder / "features")


@pytest.fixture(scope="module")
def ran(backbone, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "attributes"
    return run_task("attributes", SETTINGS, backbone, data, out, ["a", "command"]), out


def test_the_report_says_what_ran_on_what(ran, backbone, data):
    out = ran[1]
    found = json.loads((out / "report.json").read_text())
    assert found["task"] == "attributes" and found["command"] == "a command"
    assert found["settings"] == dataclasses.asdict(SETTINGS)
    assert found["checkpoint"]["digest"] == backbone.origin["digest"]
    assert found["checkpoint"]["step"] == 7 and found["checkpoint"]["dtype"] == "float32"
    assert found["data"]["manifest_sha256"] == data.split("test").source.manifest_hash
    assert [s["split"] for s in found["data"]["splits"]] == ["train", "test"]
    assert list(found["results"]) == ["trained", "random", "chance"]
    for row in found["results"].values():
        assert list(row) == ["accuracy", "balanced accuracy", "AP"]
        for number in row.values():
            assert number["low"] <= number["high"] and 0 <= number["value"] <= 100
    assert found["results"]["chance"]["balanced accuracy"]["value"] == 50
    page = (out / "report.md").read_text()
    tenth = round(len(attributes._faces(SETTINGS, data).train) / 10)
    for words in (f"| 10 % | {tenth} | trained |", "best on test", "## By Male, random"):
        assert words in page
    assert all(f"| {name} |" in page for name in ATTRIBUTES)
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.partial"))


def test_parts_by_gender_are_the_numbers_of_those_faces(ran, data, backbone):
    """From the saved probe: accuracy on the women alone."""
    report, out = ran
    faces = data.split("test")
    women = faces.attributes[:, 20] == 0
    probe = load_probe(out / "probe")
    present = probe.probabilities(faces.images[:]) > 0.5
    right = present == (faces.attributes == 1)
    (found,) = report.breakdowns["trained"]
    rows, numbers = found.parts["no"]
    assert rows == women.sum()
    assert numbers[0].value == pytest.approx(100 * right[women].mean(), abs=1e-3)
    assert report.results["trained"]["accuracy"].value == pytest.approx(
        100 * right.mean(), abs=1e-3
    )


def test_subsets_are_nested_and_depend_on_the_seed_alone(data):
    one, again = (attributes._faces(SETTINGS, data) for _ in range(2))
    other = attributes._faces(dataclasses.replace(SETTINGS, seed=1), data)
    assert one.train.ids == again.train.ids != other.train.ids
    assert sorted(one.train.ids) == sorted(other.train.ids)
    people = [set(part.group_ids) for part in (one.train, one.val, one.test)]
    assert sum(map(len, people)) == len(set.union(*people))
    assert all(part.source.split == "train" for part in (one.train, one.val))


def test_cached_states_are_those_of_the_pictures_in_any_order(backbone, data):
    faces = data.split("test").take([7, 3, 19, 0])
    found = attributes._states("flip", backbone, faces, data)
    wanted = normalize_states(backbone.pooled_states(faces.images))
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, wanted, atol=4e-3)


def test_a_second_run_encodes_nothing_and_gives_the_same(
    ran, backbone, data, tmp_path, monkeypatch
):
    report, _ = ran

    def fail(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(Backbone, "stream_rows", fail)
    again = run_task("attributes", SETTINGS, backbone, data, tmp_path / "out", ["again"])
    assert again.results == report.results


def test_settings_out_of_range_and_data_without_labels(backbone, data, tmp_path):
    for field, value in (
        ("fractions", "0 10"),
        ("fractions", "101"),
        ("fractions", ""),
        ("rates", "fast"),
        ("epochs", 0),
        ("resamples", 0),
        ("seed", -1),
        ("by", "Man"),
    ):
        settings = dataclasses.replace(SETTINGS, **{field: value})
        with pytest.raises(ValueError, match=field):
            attributes.run(settings, backbone, data, tmp_path)
    bare = FaceData(data.path, 32)
    bare.split("test").attributes[:] = -1
    with pytest.raises(DataLacks, match="no picture has a known attribute"):
        attributes.run(SETTINGS, backbone, bare, tmp_path)


def test_numbers_that_are_not_defined(backbone, data, tmp_path):
    """No label says yes: no AP and no balanced accuracy, but a report with its picture."""
    rare = FaceData(data.path, 32)
    for split in ("train", "test"):
        rare.split(split).attributes[:] = 0
    found = run_task("attributes", SETTINGS, backbone, rare, tmp_path / "out", ["command"])
    assert np.isnan(found.results["trained"]["AP"].value)
    assert found.results["trained"]["accuracy"].value > 0
    assert (tmp_path / "out" / "report.png").is_file()


@pytest.mark.parametrize("kind", ["flip", "facer"])
def test_a_probe_says_what_backbone_and_head_say(backbone, data, tmp_path, kind):
    head = init_head(kind, 12, 32, 40, jax.random.key(0))
    save_probe(tmp_path / "probe", backbone, kind, head, {"note": "by hand"})
    probe = load_probe(tmp_path / "probe")
    faces = data.split("test")
    function = backbone.state_function(last_normed=kind == "flip")
    states = normalize_states(backbone.map_rows(function, faces.images))
    wanted = jax.nn.sigmoid(head_logits(kind, head, states))
    found = probe.probabilities(faces.images[:], batch_size=16)
    assert found.dtype == np.float32 and found.shape == (24, 40)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert probe.about["note"] == "by hand" and probe.image_size == 32
    assert probe.attributes == ATTRIBUTES


def test_a_probe_takes_arrays_and_files_of_any_size(ran, data):
    probe = load_probe(ran[1] / "probe")
    files = [data.split("test").record(row).image for row in range(3)]
    arrays = [np.random.default_rng(n).integers(0, 256, (40 + n, 50, 3), np.uint8) for n in (0, 1)]
    together = probe.probabilities([*files, *arrays])
    alone = np.concatenate([probe.probabilities([one]) for one in (*files, *arrays)])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    squashed = [resize_image(array, 32) for array in arrays]
    np.testing.assert_array_equal(probe.probabilities(squashed), probe.probabilities(arrays))
    assert probe.probabilities([]).shape == (0, 40)
    with pytest.raises(BadImage, match="picture 1"):
        probe.probabilities([files[0], files[1][:100]])
    for wrong in (arrays[0].astype(np.float32), arrays[0][..., 0], "a.png"):
        with pytest.raises(ValueError, match="picture 0 is"):
            probe.probabilities([wrong])


def test_a_damaged_or_foreign_probe_is_refused(ran, backbone, tmp_path):
    head = init_head("flip", 12, 32, 40, jax.random.key(0))
    folder = tmp_path / "probe"
    with pytest.raises(FileNotFoundError, match=r"no probe\.json"):
        load_probe(folder)

    def spoil(name, change):
        save_probe(folder, backbone, "flip", head, {})
        path = folder / name
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(ValueError, match=str(folder)):
            load_probe(folder)

    spoil("arrays.npz", lambda data: data[:-20])
    spoil("arrays.npz", lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    other = init_head("flip", 12, 32, 40, jax.random.key(1))
    save_probe(tmp_path / "other", backbone, "flip", other, {})
    spoil("arrays.npz", lambda _: (tmp_path / "other" / "arrays.npz").read_bytes())
    spoil("probe.json", lambda data: data[:30])
    spoil("probe.json", lambda data: data.replace(b'"version": 1', b'"version": 2'))
    spoil("probe.json", lambda data: data.replace(b'"kind": "flip"', b'"kind": "linear"'))
    save_probe(folder, backbone, "flip", head, {})
    load_probe(folder)
