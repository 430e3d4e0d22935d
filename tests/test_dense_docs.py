"""docs/dense.md: its commands and its Python run, and its fields exist."""

import re
import shlex
from pathlib import Path

import pytest
import tiny_downstream
from test_docs import blocks

from flip_jax.config import load
from flip_jax.data.readers import READERS
from flip_jax.data.records import load_manifest
from flip_jax.downstream.__main__ import main, set_fields
from flip_jax.downstream.tasks import task_module

# Heads are trained here, which is mostly compiling.
pytestmark = pytest.mark.release


PAGE = Path(__file__).parent.parent / "docs" / "dense.md"
QUICK = [
    *("--channels=4", "--size=32", "--epochs=1", "--resamples=10"),
    # Not divided among devices: compiles faster.
    *("--batch_size=11", "--random-backbone=False"),
]
FAST = {"parsing": QUICK, "multitask": QUICK}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny_downstream.write_model(folder / "runs" / "demo")
    tiny_downstream.write_faces(folder / "runs" / "demo" / "data")
    return folder


def commands():
    """Arguments of `python -m flip_jax.X`, X first."""
    shell = "".join(text for language, text in blocks(PAGE) if language == "sh")
    lines = shell.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("python -m flip_jax.")) for line in lines]


def test_the_page_runs(folder, monkeypatch, capsys):
    """On the demo's data; what needs downloads is only taken apart."""
    monkeypatch.chdir(folder)
    ran = set()
    for program, task, *given in commands():
        if program == "data":
            assert task == "read" and given[0] in READERS
        elif program == "main":
            assert task == "--config" and load(PAGE.parent.parent / given[0])
        elif "runs/demo" in given:
            assert main([task, *given, *FAST[task]]) == 0, capsys.readouterr().err
            ran.add(task)
        else:
            fields = [word for word in given if "=" in word]
            set_fields(task_module(task).Settings(), fields).resolved(224)
    assert ran == {*FAST}
    for language, text in blocks(PAGE):
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), {})
    assert "background" in capsys.readouterr().out
    assert load_manifest("data/masks").splits["train"].records == 14
    for name in ("overlays.png", "worst.png", "parser.npz"):
        assert (folder / "runs" / "downstream" / "parsing" / name).is_file()
    for name in ("overlays.png", "reader.npz"):
        assert (folder / "runs" / "downstream" / "multitask" / name).is_file()


def test_fields_exist():
    """`--field=value` in the text is accepted by the task of its section."""
    tried = 0
    for section in PAGE.read_text().split("\n## ")[1:]:
        name = section.split("\n")[0].lower()
        if name not in FAST:
            continue
        for field in re.findall(r"`(--\w[\w.]*=[^`]*)`", section):
            set_fields(task_module(name).Settings(), shlex.split(field)).resolved(64)
            tried += 1
    assert tried >= 10
