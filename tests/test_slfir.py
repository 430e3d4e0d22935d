"""The task as a whole: `python -m flip_jax.downstream slfir`, as docs/slfir.md runs it."""

import contextlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny_downstream
from PIL import Image
from test_docs import blocks

from flip_jax.data.readers import READERS
from flip_jax.downstream import slfir
from flip_jax.downstream.__main__ import main, set_fields
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.face_data import DataLacks, FaceData
from flip_jax.downstream.slfir import Settings, load_model, run
from flip_jax.downstream.slfir_metrics import METRICS
from flip_jax.downstream.slfir_sketches import SketchFaces

PAGE = Path(__file__).parent.parent / "docs" / "slfir.md"
SHORT = Settings(steps=4, train_steps=2, captions=2, epochs=2, negatives=1, resamples=20, rerank=3)
GIVEN = [
    f"--{name.replace('_', '-')}={getattr(SHORT, name)}"
    for name in ("steps", "train_steps", "captions", "epochs", "negatives", "resamples", "rerank")
]

SMALL = ["--batch-size=8"]  # of one size only, so that each function is compiled once


def commands() -> list[list[str]]:
    """Of the page: arguments of `python -m flip_jax.X`, X first."""
    shell = "".join(text for language, text in blocks(PAGE) if language == "sh")
    lines = shell.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("python -m flip_jax.")) for line in lines]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The first command of the page, with a tiny model and less of everything."""
    folder = tmp_path_factory.mktemp("slfir")
    tiny_downstream.write_model(folder / "runs" / "demo")
    tiny_downstream.write_faces(folder / "runs" / "demo" / "data")
    task, *given = commands()[0]
    assert task == "downstream"
    with contextlib.chdir(folder):
        assert main([*given, "--cache=features", "--by=Male", *GIVEN, *SMALL]) == 0
    shared = ["--checkpoint", str(folder / "runs" / "demo")]
    shared += ["--data", str(folder / "runs" / "demo" / "data")]
    shared += ["--cache", str(folder / "features"), *GIVEN, *SMALL]
    return folder, shared


@pytest.fixture(scope="module")
def backbone(places):
    return Backbone.load(places[0] / "runs" / "demo", batch_size=8)


@pytest.fixture(scope="module")
def out(places):
    return places[0] / "runs" / "downstream" / "slfir"


@pytest.fixture(scope="module")
def report(out):
    return json.loads((out / "report.json").read_text())


def test_a_misspelt_column_is_told_before_the_training(places, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slfir, "_train", None)
    options = [*places[1], "--by=Malee", f"--out={tmp_path}", "--subjects=photo"]
    assert main(["slfir", *options]) == 1
    assert "by=Malee: is no attribute; did you mean Male?" in capsys.readouterr().err


def test_the_page(places, monkeypatch, capsys):
    monkeypatch.chdir(places[0])
    (code,) = [text for language, text in blocks(PAGE) if language == "python"]
    exec(compile(code, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 10 and re.fullmatch(r"100 % drawn: \[[ \d]+\]", printed[-1])
    _, read, fs2k = commands()
    assert read[:2] == ["data", "read"] and read[2] in READERS
    assert fs2k[:2] == ["downstream", "slfir"] and fs2k[5] == read[-1]
    assert set_fields(Settings(), fs2k[6:7]).subjects == "photo"
    for field in re.findall(r"`(--\w[\w-]*=[^`]*)`", PAGE.read_text()):
        set_fields(Settings(), shlex.split(field))


def test_the_numbers_by_loops_from_the_saved_heads(places, backbone, out, report):
    """Photos, captions and each step of each sketch through the saved heads, one by one."""
    faces = FaceData(places[0] / "runs" / "demo" / "data", backbone.image_size).split("test")
    sketches = SketchFaces(faces, SHORT.steps, hand=SHORT.hand)
    model = load_model(out / "heads-other.npz", backbone)
    first = [faces.group_ids.index(group) for group in sorted(set(faces.group_ids))]
    second = [
        next(n for n, group in enumerate(faces.group_ids) if group == faces.group_ids[f] and n != f)
        for f in first
    ]
    assert len(first) == 12
    photos = model.embed_photos(faces.take(np.array(first)).images[:])
    texts = [faces.captions[f][0] for f in first]
    sums = dict.fromkeys(("sketch", "caption", "both"), 0.0)
    for person, drawn in enumerate(second):
        grown = sketches.grown(drawn)
        text = [texts[person]] * len(grown)
        queries = {
            "sketch": model.embed_sketches(grown),
            "caption": model.embed_texts(text),
            "both": model.embed_queries(grown, text),
        }
        for name, query in queries.items():
            for vector in query:
                cosines = photos @ vector
                # Equal up to rounding would be a tie in one place and none in another.
                rank = sum(c >= cosines[person] - 1e-6 for c in cosines)
                sums[name] += 1 / rank / len(query) / len(second)
    for name, value in sums.items():
        found = report["details"]["other"]["trained"]["metrics"]["trained"][name]["m@B"]["value"]
        assert 100 * value == pytest.approx(found, abs=0.01), name
        assert report["results"]["trained"][f"other: {name} m@B"]["value"] == found


def test_the_report(out, report):
    assert set(report["results"]) == {"trained", "random", "chance"}
    assert report["results"]["chance"]["sketch m@A"] == 50
    for subject in ("photo", "other"):
        details = report["details"][subject]
        assert details["pairs"] == details["gallery"] == 12
        for label in ("trained", "random"):
            rows = details[label]["metrics"]
            ranked = {"re-ranked": {"caption", "both"}} if label == "trained" else {}
            everything = {"sketch", "caption", "both"}
            wanted = {"trained": everything, "frozen": everything} | ranked
            assert {row: set(queries) for row, queries in rows.items()} == wanted
            for queries in rows.values():
                for numbers in queries.values():
                    assert list(numbers) == list(METRICS)
                    for number in numbers.values():
                        assert number["low"] <= number["value"] <= number["high"]
            curve = details[label]["curves"]["trained"]["sketch"]
            assert curve["share"] == [0.25, 0.5, 0.75, 1]
            value = rows["trained"]["sketch"]["m@A"]["value"]
            assert np.mean(curve["percentile"]) == pytest.approx(value)
    assert set(report["by"]["trained"]["Male"]["parts"]) <= {"yes", "no"}
    assert any("24 strokes in the order of drawing" in note for note in report["notes"])
    page = (out / "report.md").read_text()
    assert "ITM re-ranked" in page and "a sketch of another picture" in page
    picture = np.asarray(Image.open(out / "report.png").convert("RGB"))
    assert picture.shape[0] > 900 and 20 < picture.std() < 120


@pytest.mark.slow
def test_again_from_cached_features(places, report, capsys):
    folder, shared = places
    before = {path: path.stat().st_mtime_ns for path in (folder / "features").iterdir()}
    given = ["--out", str(folder / "again"), "--subjects=other", "--random-backbone=false"]
    assert main(["slfir", *shared, *given]) == 0
    found = json.loads((folder / "again" / "report.json").read_text())
    assert found["results"]["trained"] == {
        name: value
        for name, value in report["results"]["trained"].items()
        if name.startswith("other: ")
    }
    assert "random" not in found["results"]
    after = {path: path.stat().st_mtime_ns for path in (folder / "features").iterdir()}
    assert after == before


def test_one_picture_per_person(tmp_path, backbone):
    tiny_downstream.write_faces(tmp_path / "drawn", pictures=1)
    data = FaceData(tmp_path / "drawn", backbone.image_size)
    options = {"random_backbone": False, "rerank": 0, "features": "class"}
    found = run(Settings(**vars(SHORT) | options), backbone, data, tmp_path)
    assert list(found.details) == ["photo"]
    assert set(found.details["photo"]["trained"]["metrics"]) == {"trained", "frozen"}
    assert any("too few people have two pictures" in note for note in found.notes)
    with pytest.raises(DataLacks, match="subjects='other' needs people with two pictures"):
        run(Settings(**vars(SHORT) | {"subjects": "other"}), backbone, data, tmp_path)


@contextlib.contextmanager
def train_twice(data):
    """The same records as another split, `again`."""
    before = (data / "manifest.json").read_text()
    manifest = json.loads(before)
    manifest["splits"]["again"] = manifest["splits"]["train"]
    (data / "manifest.json").write_text(json.dumps(manifest))
    try:
        yield
    finally:
        (data / "manifest.json").write_text(before)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("--steps=0", "settings.steps=0: must be at least 1"),
        ("--rerank=-1", "settings.rerank=-1: must be at least 0"),
        ("--hand=-1", "settings.hand=-1: must be at least 0"),
        ("--rates=fast", "settings.rates='fast': must be numbers above 0"),
        ("--subjects=photo,dog", "settings.subjects='photo,dog': must be photo or other"),
        ("--features=all", "settings.features=all: must be one of 'class', 'layers', 'grid'"),
        ("--rates=nan", "settings.rates='nan'"),
        ("--test-split=dev", "no split 'dev'"),
        ("--test-split=train", "test_split=train: must be another split than train_split"),
        ("--test-split=again", "such as 'drawn:0', are there for train and for test"),
    ],
)
def test_settings_that_cannot_be(places, capsys, field, message):
    _, shared = places
    with train_twice(places[0] / "runs" / "demo" / "data"):
        assert main(["slfir", *shared, field]) == 1
    assert message in capsys.readouterr().err


def test_heads_of_another_model_or_damaged(backbone, out, tmp_path):
    path = out / "heads-photo.npz"
    assert load_model(path, backbone).about["subject"] == "photo"
    with pytest.raises(ValueError, match=r"was trained on weights .* these are"):
        load_model(path, backbone.random_twin())
    with pytest.raises(FileNotFoundError, match="train them again"):
        load_model(tmp_path / "heads.npz", backbone)
    data = path.read_bytes()
    for number, damaged in enumerate((b"", data[: len(data) // 2], b"x" * 100)):
        (tmp_path / f"{number}.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"holds no slfir heads.*train them again"):
            load_model(tmp_path / f"{number}.npz", backbone)
