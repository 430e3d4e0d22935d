"""`python -m flip_jax.downstream`: one task, and input that cannot be used."""

import json
from pathlib import Path

import pytest
import tiny_downstream

from flip_jax.downstream import tasks
from flip_jax.downstream.__main__ import main


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    tiny_downstream.write_model(folder / "one")
    tiny_downstream.write_faces(folder / "drawn")
    return folder


def arguments(places):
    paths = {"checkpoint": "one", "data": "drawn", "out": "out"}
    return [word for name, path in paths.items() for word in (f"--{name}", str(places / path))]


def test_one_task(places, capsys):
    out = places / "out" / "single"
    given = [*arguments(places)[:-1], str(out), "--resamples", "20", "--by=Male"]
    assert main(["zero_shot", *given]) == 0
    printed = capsys.readouterr().out
    assert "| trained |" in printed and str(out / "report.md") in printed
    found = json.loads((out / "report.json").read_text())
    assert found["command"].startswith("python -m flip_jax.downstream zero_shot --checkpoint")
    assert found["settings"]["resamples"] == 20 and list(found["by"]["trained"]) == ["Male"]


@pytest.mark.parametrize(
    ("task", "extra", "words"),
    [
        ("attributes", ["--epoch=3"], "did you mean settings.epochs"),
        ("attributes", ["--epochs=many"], "settings.epochs=many: must be int"),
        ("attributes", ["epochs=3"], "unknown argument 'epochs=3'"),
        ("attributes", ["--epochs"], "--epochs: needs a value"),
        ("attributes", ["--checkpoint", "b"], "are for suite, not attributes"),
        ("attributes", ["--batch-size=0"], "batch_size=0"),
        ("attributes", ["--dtype=half"], "dtype='half'"),
        ("attributes", ["--limit=0"], "limit=0"),
        ("zero_shot", ["--test-split=dev"], "no split 'dev'; it has test, train"),
        ("zero_shot", ["--labels=one"], "two or more"),
        ("zero_shot", ["--config=none.py"], "--config and several --checkpoint are for suite"),
    ],
)
def test_what_cannot_be_used_is_named(places, capsys, task, extra, words):
    assert main([task, *arguments(places), *extra]) == 1
    assert words in capsys.readouterr().err


def test_no_such_model_or_data(places, capsys, tmp_path):
    given = arguments(places)
    for position, words in ((1, "nowhere"), (3, "data folder")):
        wrong = [*given]
        wrong[position] = str(tmp_path / "nowhere")
        assert main(["zero_shot", *wrong]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_every_task_of_the_table_has_a_module():
    root = Path(tasks.__file__).parents[2]
    for name, module in tasks.TASKS.items():
        assert (root / (module.replace(".", "/") + ".py")).is_file(), name
    with pytest.raises(ValueError, match="does not exist"):
        tasks.task_module("alchemy")
