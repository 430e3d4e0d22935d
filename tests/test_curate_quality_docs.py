"""The page on the quality report: its commands run, and it names every file and option."""

import re
import shlex

import pytest
from conftest import ROOT

pytest.importorskip("apache_beam", reason="curation needs the extra `curate`")

from flip_jax.curate.__main__ import main
from flip_jax.curate.quality.card import FIGURES
from flip_jax.curate.quality.command import _parser
from flip_jax.curate.quality.report import ReportConfig
from flip_jax.data.__main__ import main as data_main

PAGE = ROOT / "docs" / "quality.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for line in "".join(blocks("sh")).splitlines():
        command = shlex.split(line)
        assert {"flip_jax.data": data_main, "flip_jax.curate": main}[command[2]](command[3:]) == 0
    printed = capsys.readouterr().out
    assert [text for text in blocks("text") if text not in printed] == []


def test_the_page_names_every_file_and_option():
    text = PAGE.read_text()
    assert [name for name in FIGURES if f"`{name}`" not in text] == []
    options = {option for action in _parser()._actions for option in action.option_strings}
    options -= {"-h", "--help", "--out", "--threads"}
    assert [option for option in options if f"`{option}" not in text] == []
    defaults = ReportConfig()
    assert f"`--sample N` ({defaults.sample})" in text
    assert f"`--min-share S` ({defaults.min_share})" in text
