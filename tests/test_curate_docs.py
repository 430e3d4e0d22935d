"""The page on curation: its example runs, the fields and reasons it names exist."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("apache_beam", reason="curation needs the extra `curate`")

from flip_jax.curate.__main__ import main, parse
from flip_jax.curate.config import CurateConfig
from flip_jax.data.__main__ import main as data_main
from flip_jax.data.records import load_manifest

PAGE = ROOT / "docs" / "curate.md"
GROUPS = {item.name for item in dataclasses.fields(CurateConfig)}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("python -m flip_jax.")]


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    (script,) = blocks("python")
    exec(compile(script, str(PAGE), "exec"), {})
    build, show = commands()[:2]
    assert main(build[3:]) == 0
    printed = capsys.readouterr().out
    assert [text for text in blocks("text") if text not in printed] == []
    assert data_main(show[3:]) == 0
    assert load_manifest("data/curated").splits.keys() <= {"train", "test"}


def test_every_command_parses(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [arguments for arguments in commands() if arguments[2] == "flip_jax.curate"]
    assert len(found) >= 4
    for arguments in found:
        given = [*arguments[3:], "--config.input.paths=a.parquet"]
        if not any("output.path" in text for text in given):
            given.append("--config.output.path=data")
        parse(given)


def test_the_fields_it_names_exist():
    text = PAGE.read_text()
    names = set(re.findall(r"--config\.([\w.]+)=", text))
    names |= {
        name
        for name in re.findall(r"`(\w+\.\w+)(?:=[^`]*)?`", text)
        if name.partition(".")[0] in GROUPS and not name.endswith((".py", ".md"))
    }
    assert len(names) > 15
    names -= {"data.path"}  # of the training run that the page ends with
    for name in names:
        part = CurateConfig()
        for step in name.split("."):
            assert hasattr(part, step), name
            part = getattr(part, step)


def test_the_reasons_for_a_drop_are_on_the_page():
    text = " ".join(PAGE.read_text().split())
    names = ("rows", "sidecars", "fetch", "optout", "pictures", "captions", "faces", "attributes")
    code = "".join((ROOT / f"flip_jax/curate/{name}.py").read_text() for name in names)
    found = set(
        re.findall(r"(?:tally\.drop\([^\"]*|Refused\(|TryAgain\(|Unusable\()\"([a-z ]+)\"", code)
    )
    found |= set(re.findall(r"\"problem\"(?:\] =|,) \"([a-z ]+)\"", code))
    found -= {"problem"}
    assert len(found) > 15
    assert {reason for reason in found if reason not in text} == set()


def test_curation_does_not_start_jax():
    code = (
        "import sys, flip_jax.curate.pipeline, flip_jax.curate.faces, flip_jax.curate.attributes\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
