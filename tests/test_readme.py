"""The README's commands: they parse, their files exist, and the main one does what it says."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flip_jax import main
from flip_jax.data.__main__ import main as data_main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


def block_after(marker):
    return re.search(rf"<!-- {marker} -->\n```sh\n(.*?)```", README, re.DOTALL).group(1)


def test_every_module_that_is_called_exists():
    modules = {c[c.index("-m") + 1] for c in COMMANDS if "-m" in c} - {"venv", "pip", "pytest"}
    assert {"flip_jax.main", "flip_jax.data", "flip_jax.convert"} <= modules
    for module in modules:
        path = ROOT / Path(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("command", [c for c in COMMANDS if "flip_jax.main" in c], ids=" ".join)
def test_main_commands_parse(command):
    cfg, _, _ = main.parse(command[command.index("flip_jax.main") + 1 :])
    assert cfg.epochs > 0


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if "flip_jax.data" in c], ids=lambda c: c[3]
)
def test_data_commands_reach_the_missing_files(command, capsys):
    assert data_main(command[command.index("flip_jax.data") + 1 :]) == 2
    assert re.search(r"faces.csv|data/faces", capsys.readouterr().err)


def test_ci_runs_the_test_command():
    """The script's own extraction yields the block, line by line."""
    script = (ROOT / ".ci" / "run").read_text()
    (extraction,) = re.findall(r"command=\$\((.*)\)", script)
    found = subprocess.run(["bash", "-c", extraction], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == block_after("test-command")
    assert "-m pytest" in found.stdout


def test_files_and_configs_that_are_named_exist():
    for name in re.findall(r"`((?:configs|flip_jax|tests|benchmarks|docs)/[\w/.]+)`", README):
        assert (ROOT / name).exists(), name


@pytest.mark.slow
def test_the_main_command(tmp_path):
    """Learns beyond doubt: R@10 text to image, on people never seen, ten times chance."""
    (line,) = [x for x in block_after("main-command").splitlines() if "flip_jax.main" in x]
    command = [sys.executable, *shlex.split(line)[1:], "--workdir", str(tmp_path)]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=2400)
    assert run.returncode == 0, run.stderr
    assert "text -> image" in run.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    chance = results["chance"]["t2i/R@10"]
    assert results["trained"]["cosine/t2i/R@10"] >= 10 * chance
    assert results["start"]["cosine/t2i/R@10"] < 3 * chance
    assert (tmp_path / "report.png").is_file() and list(tmp_path.glob("checkpoints/*/params"))
