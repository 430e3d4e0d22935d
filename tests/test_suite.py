"""The suite: every task on two checkpoints, the page, and what is not done twice."""

import html.parser
import json

import pytest
import tiny_downstream

from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import RecordSource
from flip_jax.downstream import suite
from flip_jax.downstream.__main__ import main
from flip_jax.downstream.suite_page import Entry, comparison, write_page
from flip_jax.downstream.task_report import FILES
from flip_jax.downstream.tasks import TASKS

QUICK = """
from flip_jax.downstream import (
    alignment, attributes, multitask, parsing, retrieval_task, slfir, suite, zero_shot
)

def get_config():
    return suite.Settings(
        retrieval=retrieval_task.Settings(epochs=1, rerank=2, resamples=20),
        attributes=attributes.Settings(epochs=2, fractions="100", resamples=20),
        slfir=slfir.Settings({slfir}),
        zero_shot=zero_shot.Settings(resamples=20),
        parsing=parsing.Settings(size=32, channels=4, epochs=1, batch_size=11, resamples=20),
        alignment=alignment.Settings(size=32, channels=4, epochs=1, batch_size=11, resamples=20),
        multitask=multitask.Settings(size=32, channels=4, epochs=1, batch_size=11, resamples=20),
    )
"""
SLFIR = 'steps=4, train_steps=2, subjects="photo", epochs=1, negatives=1, rerank=2, resamples=20'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two checkpoints of one shape, drawn faces, quick settings."""
    place = tmp_path_factory.mktemp("suite")
    tiny_downstream.write_model(place / "a", seed=1)
    tiny_downstream.write_model(place / "b", seed=2)
    tiny_downstream.write_faces(place / "faces")
    (place / "quick.py").write_text(QUICK.format(slfir=SLFIR))
    return place


def run(place, *more, data="faces", checkpoints=("a", "b"), out="out"):
    arguments = ["suite", "--data", str(place / data), "--out", str(place / out)]
    for name in checkpoints:
        arguments += ["--checkpoint", str(place / name)]
    return main([*arguments, "--config", str(place / "quick.py"), "--batch-size", "8", *more])


@pytest.fixture(scope="module")
def done(place):
    assert run(place, "--by=Male") == 0
    return place / "out", json.loads((place / "out" / "comparison.json").read_text())


@pytest.mark.release
def test_every_task_of_every_checkpoint(done):
    out, page = done
    assert list(page["results"]) == [*TASKS]
    for task, rows in page["results"].items():
        assert list(rows) == ["a", "b", "random", "chance"], task
        for label in ("a", "b"):
            assert page["checkpoints"][label]["left_out"] == {}
            for name in FILES:
                assert (out / label / task / name).is_file()
            report = json.loads((out / label / task / "report.json").read_text())
            assert rows[label] == report["results"]["trained"]
            # One random backbone serves both: they have one shape.
            assert ("random" in report["results"]) == (label == "a")
            assert list(report["by"]["trained"]) == ["Male"]
            assert list(page["checkpoints"][label]["tasks"][task]["by"]["trained"]) == ["Male"]
        assert rows["a"] != rows["b"]


class _Page(html.parser.HTMLParser):
    """Counts what a page has, and sees that its tags close."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.cells = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.sources.append(dict(attributes)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data.strip())


@pytest.mark.release
def test_the_page(done):
    out, page = done
    text = (out / "comparison.html").read_text()
    parsed = _Page()
    parsed.feed(text)
    assert parsed.open == []
    assert len(parsed.sources) == 1 + 2 * 6
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in parsed.sources)
    assert "http" not in text.replace("http-equiv", "")
    markdown = (out / "comparison.md").read_text()
    for rows in page["results"].values():
        for metric, number in rows["a"].items():
            assert f"| {metric} |" in markdown and metric in parsed.cells
            cell = f"{number['value']:.2f}"
            assert cell in parsed.cells and f"| {cell} [" in markdown
    assert "### By Male, a" in markdown and "| gap |" in markdown.replace("yes", "")
    for line in markdown.splitlines():
        if line.startswith("!["):
            assert (out / line.partition("](")[2].rstrip(")")).is_file()


@pytest.mark.release
def test_what_is_done_is_not_done_again(place, done, capsys):
    out, before = done
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/*/report.json")}
    assert len(times) == 12
    # A setting of one task, on one checkpoint; the other is as it was.
    assert run(place, "--by=Male", "--attributes.seed=1", checkpoints=("a",)) == 0
    again = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert again == {out / "a" / "attributes" / "report.json"}
    assert capsys.readouterr().out.count("is done, with the same weights") == len(TASKS) - 1
    # A report that is not the one that was noted, and one that is cut.
    path = out / "b" / "zero_shot" / "report.json"
    path.write_text(path.read_text()[:-20])
    assert run(place, "--by=Male", "--attributes.seed=1", "--tasks=zero_shot attributes") == 0
    page = json.loads((out / "comparison.json").read_text())
    assert page["results"]["zero_shot"] == before["results"]["zero_shot"]
    assert list(page["results"]) == ["zero_shot", "attributes"]
    said = capsys.readouterr().out
    assert said.count("is done, with the same weights") == 2  # b/attributes has another seed


def test_a_table_of_ones_own_that_changes(place, capsys):
    table = place / "tones.csv"
    source = RecordSource(place / "faces", "test")
    ids = [source[number].id for number in range(len(source))]
    one = {"checkpoints": ("a",), "out": "tones"}
    for tones, again in (("ab", True), ("ab", False), ("ba", True)):
        rows = [f"{name},{tones[n % 2]}" for n, name in enumerate(ids)]
        table.write_text("\n".join(["id,tone", *rows]))
        assert run(place, f"--by={table}:tone", "--tasks=zero_shot", **one) == 0
        assert ("is done" in capsys.readouterr().out) != again
    page = json.loads((place / "tones" / "comparison.json").read_text())
    parts = page["checkpoints"]["a"]["tasks"]["zero_shot"]["by"]["trained"]["tone"]["parts"]
    assert {value: part["rows"] for value, part in parts.items()} == {"a": 12, "b": 12}


def test_data_that_allows_less(place):
    """Pictures with labels, and nothing else."""
    with RecordWriter(place / "labels", "by hand") as writer:
        for split in ("train", "test"):
            source = RecordSource(place / "faces", split)
            for number in range(len(source)):
                record = source[number]
                kept = ("id", "group_id", "image", "attributes")
                fields = {name: getattr(record, name) for name in kept}
                writer.write(split, record.__class__(**fields, captions=[]))
    assert run(place, data="labels", checkpoints=("a",), out="less") == 0
    page = json.loads((place / "less" / "comparison.json").read_text())
    assert list(page["results"]) == ["attributes", "zero_shot"]
    left_out = page["checkpoints"]["a"]["left_out"]
    assert list(left_out) == ["retrieval", "slfir", "parsing", "alignment", "multitask"]
    assert "has a caption" in left_out["retrieval"]
    for name in ("comparison.md", "comparison.html"):
        assert "retrieval is left out: " in (place / "less" / name).read_text()


def test_a_task_that_fails(place, capsys):
    more = ["--tasks=attributes zero_shot", "--attributes.rates=0"]
    assert run(place, *more, checkpoints=("a",), out="failed") == 1
    assert "a/attributes: settings.rates='0'" in capsys.readouterr().err
    page = json.loads((place / "failed" / "comparison.json").read_text())
    assert list(page["results"]) == ["zero_shot"]
    assert "attributes failed: settings.rates" in (place / "failed" / "comparison.md").read_text()


def test_bad_input(place, capsys):
    for more, message in (
        (["--tasks=dancing"], "settings.tasks names dancing; there are retrieval"),
        (["--tasks="], "settings.tasks names nothing"),
        (["--retrieval.epoch=3"], "did you mean settings.retrieval.epochs"),
    ):
        assert run(place, *more, checkpoints=("a",), out="bad") == 1
        assert message in capsys.readouterr().err
    assert run(place, checkpoints=("a", "a"), out="bad") == 1
    assert "tell" in (said := capsys.readouterr().err) and "apart; is one twice?" in said
    assert not (place / "bad").exists()


def test_a_random_backbone_of_each_shape(place, capsys):
    """The first of a shape that came to its end shows it; masking of patches is no shape."""
    tiny_downstream.write_model(place / "masked", seed=3, keep_patches=2)
    tiny_downstream.write_model(place / "broken", spread=float("nan"))
    checkpoints = ("broken", "masked", "b")
    assert run(place, "--tasks=zero_shot", checkpoints=checkpoints, out="shapes") == 1
    assert "broken/zero_shot" in capsys.readouterr().err
    random = []
    for label in checkpoints[1:]:
        report = json.loads((place / "shapes" / label / "zero_shot" / "report.json").read_text())
        random.append("random" in report["results"])
    assert random == [True, False]


def test_a_report_without_its_picture_is_not_done(place, capsys):
    more, one = "--tasks=zero_shot", {"checkpoints": ("a",), "out": "picture"}
    assert run(place, more, **one) == 0
    (place / "picture" / "a" / "zero_shot" / "report.png").unlink()
    assert run(place, more, **one) == 0
    assert "is done" not in capsys.readouterr().out


def test_labels_of():
    assert suite.labels_of(["runs/demo"]) == ["demo"]
    assert suite.labels_of(["runs/demo/data/.."]) == ["demo"]
    assert suite.labels_of(["x/one/model", "x/two/model"]) == ["one-model", "two-model"]
    assert suite.labels_of(["runs/random", "a"])[0] == "runs-random"


def report(**rows):
    numbers = {
        label: {
            "R@1": {"value": v, "low": v - 1, "high": v + 1},
            "median rank": {"value": 3.0, "low": None, "high": None},
        }
        for label, v in rows.items()
        if label != "chance"
    }
    about = {
        "checkpoint": {"checkpoint": "<runs>", "step": 1, "digest": "0" * 64, "dtype": "float32"},
        "data": {"path": "d", "manifest_sha256": "1" * 64, "splits": []},
    }
    results = numbers | {"chance": {"R@1": rows["chance"], "median rank": 9.5}}
    rest = {"units": "a < b", "notes": ["`k` & more"], "by": {}, "settings": {}}
    return about | rest | {"results": results}


def test_page_of_two_shapes_by_hand(tmp_path):
    """Escaping, a random backbone for each shape, a number that is not defined."""
    entries = [
        Entry("one", {"t": report(trained=5, random=2, chance=1.0)}),
        Entry("two", {"t": report(trained=6, random=3, chance=1.0)}, {"u": "no <sketches>"}),
    ]
    for entry in entries:
        (tmp_path / entry.label / "t").mkdir(parents=True)
        (tmp_path / entry.label / "t" / "report.png").write_bytes(b"\x89PNG")
    rows = comparison(entries, "t")
    assert list(rows) == ["one", "two", "random, shape of one", "random, shape of two", "chance"]
    write_page(tmp_path, entries, ["t", "u"], ["python", "-m", "x", "--by=a b"])
    markdown = (tmp_path / "comparison.md").read_text()
    assert "| R@1 | 5.00 [4.00, 6.00] | 6.00 [5.00, 7.00] | 2.00 [1.00, 3.00] | " in markdown
    assert "python -m x '--by=a b'" in markdown
    page = (tmp_path / "comparison.html").read_text()
    assert "a &lt; b" in page and "<code>k</code> &amp; more" in page
    assert "u is left out: no &lt;sketches&gt;" in page and "&lt;runs&gt;" in page
    assert page.count("data:image/png;base64,") == 3
    assert not list(tmp_path.glob("*.partial"))


def test_one_random_backbone_for_one_shape_and_notes_of_whom_they_are(tmp_path):
    """Both were run with one, each by itself; their heads chose different epochs."""
    first, second = (report(trained=n, random=2, chance=1.0) for n in (5, 6))
    first["notes"], second["notes"] = ["epoch 3", "same"], ["epoch 9", "same"]
    entries = [Entry("one", {"t": first}), Entry("two", {"t": second})]
    assert list(comparison(entries, "t")) == ["one", "two", "random", "chance"]
    for entry in entries:
        (tmp_path / entry.label / "t").mkdir(parents=True)
        (tmp_path / entry.label / "t" / "report.png").write_bytes(b"\x89PNG")
    write_page(tmp_path, entries, ["t"], ["command"])
    markdown = (tmp_path / "comparison.md").read_text()
    assert "* one: epoch 3\n* two: epoch 9\n* same\n" in markdown
