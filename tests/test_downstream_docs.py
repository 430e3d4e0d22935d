"""docs/downstream.md: its commands and its Python run, and its fields exist."""

import re
import shlex
from pathlib import Path

import pytest
import tiny_downstream
from test_docs import blocks

from flip_jax.downstream import suite
from flip_jax.downstream.__main__ import main, set_fields
from flip_jax.downstream.tasks import task_module

PAGE = Path(__file__).parent.parent / "docs" / "downstream.md"
FAST = {
    "retrieval": ["--epochs=1", "--resamples=10", "--rerank=4"],
    "attributes": ["--epochs=2", "--resamples=10", "--rates=0.03"],
    "zero_shot": ["--resamples=10"],
    "suite": [
        *("--tasks=attributes zero_shot", "--attributes.resamples=10", "--zero_shot.resamples=10"),
        *("--attributes.fractions=100", "--attributes.rates=0.03"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    tiny_downstream.write_model(folder / "runs" / "demo")
    tiny_downstream.write_model(folder / "runs" / "other", seed=4)
    # Beside an export instead of in a workdir: the same two paths.
    tiny_downstream.write_faces(folder / "runs" / "demo" / "data")
    return folder


def commands():
    shell = "\n".join(text for language, text in blocks(PAGE) if language == "sh")
    start = "python -m flip_jax.downstream "
    lines = [line for line in shell.replace("\\\n", " ").splitlines() if line]
    assert all(line.startswith(start) for line in lines)
    return [shlex.split(line.removeprefix(start)) for line in lines]


@pytest.mark.release
def test_the_page_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for arguments in commands():
        assert main([*arguments, *FAST[arguments[0]]]) == 0, capsys.readouterr().err
    for language, text in blocks(PAGE):
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out
    assert "Young" in printed and "(8, 40)" in printed
    for path in ("attributes/report.png", "zero_shot/labels.csv", "suite/comparison.md"):
        assert (folder / "runs" / "downstream" / path).is_file()


def test_the_page_shows_every_task_of_its_own():
    assert {arguments[0] for arguments in commands()} == {*FAST}


def test_fields_exist():
    """`--field=value` in the text is accepted by the task of its section."""
    tried = 0
    for section in PAGE.read_text().split("\n## ")[1:]:
        name = section.split("\n")[0].lower().replace("-", "_")
        settings = {
            "suite": suite.Settings,
            "protocols": task_module("attributes").Settings,
            "measured": task_module("attributes").Settings,
        }.get(name) or task_module(name).Settings
        for field in re.findall(r"`(--\w[\w.]*=[^`]*)`", section):
            set_fields(settings(), shlex.split(field))
            tried += 1
    assert tried >= 4
