"""The pages under docs: their commands run, and the fields, files and metrics they name exist."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flip_jax import main
from flip_jax.config import Config
from flip_jax.data.__main__ import main as data_main
from flip_jax.metrics import LINE

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DATA, TRAIN = (ROOT / "docs" / f"{name}.md" for name in ("data", "train"))
GROUPS = "|".join(f.name for f in dataclasses.fields(Config) if f.name != "seed")


def blocks(page):
    """(language, text) of every fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page, module):
    """Arguments of every `python -m module` line."""
    shell = "\n".join(text for language, text in blocks(page) if language == "sh")
    start = f"python -m {module} "
    lines = shell.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix(start)) for line in lines if line.startswith(start)]


def fields(text):
    """Dotted config fields: `config.optim.lr` anywhere, `optim.lr` in backticks."""
    full = re.findall(r"(?<![\w/.])config\.(?!py\b|json\b)(\w+(?:\.\w+)*)", text)
    short = re.findall(rf"`((?:{GROUPS})\.(?!(?:py|safetensors)`)\w+(?:\.\w+)*)(?:=[^`]*)?`", text)
    return {*full, *short}


def exists(path):
    part = Config()
    for name in path.split("."):
        if not dataclasses.is_dataclass(part) or not hasattr(part, name):
            return False
        part = getattr(part, name)
    return True


def test_the_compiler_knows_the_flags_that_pages_name():
    flags = {flag for page in PAGES for flag in re.findall(r"--xla_\w+=\w+", page.read_text())}
    assert len(flags) >= 4
    code = "import jax; jax.jit(lambda x: x + 1)(1.0)"
    environment = os.environ | {"XLA_FLAGS": " ".join(sorted(flags)), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


def test_the_data_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    expected = []
    for language, text in blocks(DATA):
        if language == "python":
            exec(compile(text, str(DATA), "exec"), {})
        elif language == "text":
            expected.append(text)
        elif "flip_jax.data" in text:
            for line in text.replace("\\\n", " ").splitlines():
                assert data_main(shlex.split(line)[3:]) == 0, line
    printed = capsys.readouterr().out
    assert expected and all(text in printed for text in expected)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "data" / "drawn" / "manifest.json").is_file()


def test_the_data_page_shows_every_command():
    shown = {arguments[0] for arguments in commands(DATA, "flip_jax.data")}
    assert shown == {"build", "draw", "show", "verify", "bench"}


@pytest.mark.parametrize("page", [DATA, TRAIN], ids=lambda page: page.stem)
def test_runs_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands(page, "flip_jax.main")
    assert found
    for arguments in found:
        main.parse(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_fields_files_and_links_exist(page):
    text = page.read_text()
    if page.stem != "curate":  # of a config of its own, see test_curate_docs.py
        assert [name for name in sorted(fields(text)) if not exists(name)] == []
    files = re.findall(r"`((?:flip_jax|configs|tests|benchmarks)/[^`\s]*)`", text)
    assert [name for name in files if not (ROOT / name).exists()] == []
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_a_field_that_does_not_exist_is_found():
    text = "`optim.lr=1e-4`, `optim.rate`, `optim.py`, --config.eval.rerank=0, config.loss.alfa"
    assert {name for name in fields(text) if not exists(name)} == {"optim.rate", "loss.alfa"}
    assert {"optim.lr", "eval.rerank"} <= fields(text)


def test_every_number_of_the_log_line_is_explained():
    text = TRAIN.read_text()
    assert [name for name, _ in LINE if f"`{name}`" not in text] == []
