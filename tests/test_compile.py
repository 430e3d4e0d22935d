"""`python -m flip_jax.compile`: the command as a whole, its sweep, and what it refuses."""

import contextlib
import csv
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flip_jax.compile import gpus, report, sweep, topology
from flip_jax.compile.__main__ import BAD_INPUT, DOES_NOT_FIT, FITS, main, parse
from flip_jax.compile.memory import Memory
from flip_jax.compile.step import CompiledStep
from flip_jax.config import from_dict, load, override, to_dict
from flip_jax.metrics import model_flops_per_pair

ROOT = Path(__file__).parent.parent
DEBUG = str(ROOT / "configs" / "debug.py")
# Products that the formula leaves out, as of the loss, weigh less than with one layer.
DEEPER = ("--config.model.vision.depth=2", "--config.model.text.depth=2")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the compiler for TPU is not installed: pip install 'flip_jax[tpu]'",
)
needs_cuda = pytest.mark.skipif(
    gpus.plugin() is None,
    reason="the compiler for GPU is not installed: pip install 'flip_jax[gpu]'",
)


@pytest.fixture
def environment(monkeypatch):
    """What the command sets for itself does not outlive the test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def command(*arguments):
    """The command in a process of its own, where libtpu may set what it likes."""
    options = {"capture_output": True, "text": True, "cwd": ROOT, "check": False}
    return subprocess.run([sys.executable, "-m", "flip_jax.compile", *arguments], **options)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """(exit status, JSON, HLO, text) of the debug config on the eight devices of this process.

    Four pairs each: with one the compiler sees through the exchange of negatives.
    """
    folder = tmp_path_factory.mktemp("compile")
    arguments = ["--config", DEBUG, *DEEPER, "--topology", "cpu", "--config.mesh.fsdp=2"]
    files = ["--json", str(folder / "step.json"), "--hlo", str(folder / "step.hlo")]
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        patch.setattr(os, "environ", os.environ.copy())
        status = main([*arguments, *files, "--pairs", "1000", "--pairs-per-chip", "4"])
    values = json.loads((folder / "step.json").read_text())
    return status, values, (folder / "step.hlo").read_text(), text.getvalue()


def test_the_command_on_cpu(on_cpu):
    status, values, hlo, text = on_cpu
    assert status == FITS
    assert values["mesh"] == {"data": 4, "fsdp": 2} and values["chips"] == 8
    assert values["steps"] == 3 * (1000 // 32)
    assert values["verdict"] == "unknown" and values["estimate"] is None  # of a CPU's memory
    assert "ENTRY" in hlo
    for heading in ("memory of one chip", "work of one chip", "collectives of one chip"):
        assert heading in text


def test_arguments_are_the_parts(on_cpu):
    memory = on_cpu[1]["memory"]
    # A CPU pads nothing, so the parts are all of it.
    assert sum(memory["parts"].values()) == memory["arguments"]
    parts = memory["parts"]
    assert parts["opt_state"] > parts["params"] > parts["queue"] > 0
    # What stands at the end, gradients among it, is not told as a peak on CPUs.
    assert memory["temporaries"] > parts["params"]


def test_the_formula_is_what_is_compiled(on_cpu):
    """`metrics.model_flops_per_pair` against the matrix products of the compiled step."""
    values = on_cpu[1]
    cfg = from_dict(values["config"])
    assert cfg.data.batch_size == 32
    assert values["model_flops"] == model_flops_per_pair(cfg) * 4
    assert 1 <= values["dot_flops"] / values["model_flops"] < 1.02


def test_only_the_exchange_of_negatives_depends_on_the_data(on_cpu):
    values = on_cpu[1]
    marked = {c["kind"] for c in values["collectives"] if c["per_round"]}
    assert marked == {"all-to-all"} and values["unknown_loops"] == 2  # there and back
    assert "all-to-all over data+fsdp *" in on_cpu[3] and "* one round of 2 loops" in on_cpu[3]


def test_gradients_and_parameters_are_exchanged(on_cpu):
    """Each gradient is reduced and each cut parameter gathered, so bytes have a floor."""
    found = on_cpu[1]["collectives"]
    params = on_cpu[1]["memory"]["parts"]["params"]
    reduced = [c for c in found if c["kind"] in ("all-reduce", "reduce-scatter")]
    assert sum(c["exchanged_bytes"] for c in reduced) >= params
    gathered = [c for c in found if c["kind"] == "all-gather" and c["axes"] == "fsdp"]
    assert sum(c["exchanged_bytes"] for c in gathered) >= params
    assert {c["axes"] for c in found} <= {"data", "fsdp", "data+fsdp"}
    heaviest = on_cpu[1]["heaviest"]
    assert len(heaviest) == 5 and all("jit(" in c["what"] for c in heaviest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5litepod:16"], "v5litepod:16: unknown. There are v5e and v6e as 1x1"),
        (["--topology", "v5e:16x32"], "v5e:16x32: unknown"),
        (["--topology", "cpu:0"], "cpu:0: unknown"),
        (["--topology", "cpu", "--slices", "2"], "only a TPU --topology has slices"),
        (["--topology", "h200:8", "--slices", "2"], "only a TPU --topology has slices"),
        (["--topology", "h200:0"], "h200:0: unknown"),
        (["--topology", "h200:2x4"], "h200:2x4: unknown"),
        (["--slices", "0"], "--slices=0: must be at least 1"),
        (["--topology", "cpu", "--pairs-per-chip", "4,8"], "lists need --sweep DIR"),
        (["--topology", "cpu", "--pairs", "3"], "at least config.data.batch_size=8"),
        (["--efficiency", "0"], "--efficiency=0.0: must be above 0"),
        (["--config", DEBUG], "2 --config: more than one needs --sweep"),
        (["--topology", "cpu", "--config.mesh.fsdp=3"], "mesh.fsdp=3 does not make the 8 devices"),
        (["--config.optim.lr=fast"], "config.optim.lr=fast: must be"),
        (
            ["--topology", "cpu", "--config.data.batch_size=20", "--config.loss.queue_size=40"],
            "batch_size=20: must be a multiple of the 8 devices, for example 16 or 24; "
            "--pairs-per-chip 2 or 3",
        ),
        (["--json", "absent/step.json"], "there is no folder absent"),
        (["--sweep", "folder"], "--sweep needs --topology and --pairs-per-chip"),
        (
            ["--sweep", "folder", "--topology", "cpu", "--pairs-per-chip", "4,x"],
            "'x' is no number above 0",
        ),
    ],
)
def test_bad_input_is_told(environment, capsys, arguments, message):
    assert main(["--config", DEBUG, *arguments]) == BAD_INPUT
    assert message in capsys.readouterr().err


def test_an_unknown_argument(capsys):
    with pytest.raises(SystemExit):
        parse(["--config", DEBUG, "--optim.lr=1"])
    assert "--config.optim.lr" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "extra"), [("v5e:4x4", "tpu"), ("h200:8", "gpu")])
def test_without_the_compiler(monkeypatch, capsys, name, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main(["--config", DEBUG, "--topology", name]) == BAD_INPUT
    assert f"pip install 'flip_jax[{extra}]'" in capsys.readouterr().err


def test_chips_have_a_peak():
    """The table of chips and that of peak FLOP/s know the same kinds."""
    from flip_jax.metrics import peak_flops

    for kind in topology.CHIPS:
        assert peak_flops(SimpleNamespace(device_kind=kind)) is not None
    assert topology.chip_of(SimpleNamespace(device_kind="TPU v5 lite")).name == "TPU v5e"
    assert topology.chip_of(SimpleNamespace(device_kind="TPU v5")).name == "TPU v5p"
    assert topology.chip_of(SimpleNamespace(device_kind="cpu")) is None
    for gpu in gpus.GPUS.values():
        chip = topology.chip_of(SimpleNamespace(device_kind=gpu.device_kind))
        assert chip.hbm_bytes == 0.75 * gpu.memory
        assert chip.hbm_bandwidth == gpu.bandwidth


COORDS = """
import itertools, sys
from flip_jax.compile import topology
from flip_jax.config import MeshConfig
for name in sys.argv[1:]:
    topology.prepare(name)
    devices = topology.devices(name)
    from flip_jax import partition
    for fsdp in (2, 4, 8, 16):
        grid = partition.make_mesh(MeshConfig(fsdp=fsdp), devices).devices
        for group in grid:
            sides = [len({d.coords[axis] for d in group}) for axis in range(3)]
            assert sides[0] * sides[1] * sides[2] == fsdp, (name, fsdp, sides)
    hosts = [d.process_index for d in grid.flat]
    assert hosts == sorted(hosts), name
"""


@needs_libtpu
def test_groups_of_fsdp_are_neighbours():
    """Chips that share parameters form a full rectangle of the slice, hosts are whole stretches."""
    names = ["v5e:4x4", "v5e:8x16", "v6e:16x16", "v5p:4x4x8"]
    child = subprocess.run(
        [sys.executable, "-c", COORDS, *names], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr


@needs_libtpu
def test_a_step_for_tpu(tmp_path):
    out = tmp_path / "step.json"
    child = command(
        *("--config", "configs/debug.py", *DEEPER, "--topology", "v5e:2x2"),
        *("--config.mesh.fsdp=2", "--json", str(out), "--price-per-chip-hour", "2"),
    )
    assert child.returncode == FITS, child.stderr
    values = json.loads(out.read_text())
    assert values["device_kind"] == "TPU v5 lite" and values["peak"] == 197e12
    assert values["memory"]["capacity"] == 15.75 * 2**30 and values["verdict"] == "fits"
    assert 1 <= values["dot_flops"] / values["model_flops"] < 1.02
    assert {"data", "fsdp"} <= {c["axes"] for c in values["collectives"]}
    assert values["unknown_loops"] == 2
    estimate = values["estimate"]
    assert 0 < estimate["step"]["best"] <= estimate["step"]["worst"]
    assert estimate["price"]["best"] == pytest.approx(2 * estimate["chip_hours"]["best"])
    assert "largest temporaries" in child.stdout and "of 16128.00: fits" in child.stdout


@needs_cuda
def test_a_step_for_gpus(tmp_path):
    out = tmp_path / "step.json"
    child = command(
        *("--config", "configs/debug.py", *DEEPER, "--topology", "h200:4"),
        *("--config.mesh.fsdp=2", "--json", str(out)),
    )
    assert child.returncode == FITS, child.stderr
    values = json.loads(out.read_text())
    assert values["device_kind"] == "NVIDIA H200" and values["peak"] == 989e12
    assert values["chips"] == 4 and values["verdict"] == "fits"
    assert 1 <= values["dot_flops"] / values["model_flops"] < 1.02
    assert {"data", "fsdp"} <= {c["axes"] for c in values["collectives"]}
    assert 0 < values["estimate"]["step"]["best"] <= values["estimate"]["step"]["worst"]


def test_a_compiler_without_its_libraries(monkeypatch):
    def absent(name):
        if name.startswith("nvidia"):
            raise gpus.metadata.PackageNotFoundError(name)
        return "0.10"

    monkeypatch.setattr(gpus, "plugin", lambda: "12")
    monkeypatch.setattr(gpus.metadata, "version", absent)
    with pytest.raises(ValueError, match=r"nvidia-cuda-runtime-cu12 is not .*jax.cuda12.==0\.10"):
        gpus.devices("h200", 8)


@needs_cuda
def test_flash_attention_for_gpus(tmp_path):
    """cuDNN's kernel is in the whole step, and keeps no attention weights."""
    tower = "vision.image_size=96", "vision.patch_size=4", "vision.depth=3", "text.depth=2"
    sizes = (f"--config.model.{field}" for field in tower)  # 577 tokens
    options = "--config", "configs/debug.py", *sizes, "--topology", "h100"
    temporaries = {}
    for how in ("plain", "flash"):
        out, hlo = tmp_path / f"{how}.json", tmp_path / f"{how}.hlo"
        changed = f"--config.model.vision.attention={how}", "--config.model.dtype=bfloat16"
        child = command(*options, *changed, "--json", str(out), "--hlo", str(hlo))
        assert child.returncode == FITS, child.stderr
        temporaries[how] = json.loads(out.read_text())["memory"]["temporaries"]
        assert ("__cudnn$fmha" in hlo.read_text()) == (how == "flash")
    assert temporaries["flash"] < 0.6 * temporaries["plain"]


@needs_libtpu
def test_flash_attention_for_tpu(tmp_path):
    """Its kernel compiles in the whole step, on several chips, and keeps no attention weights."""
    tower = "vision.image_size=96", "vision.patch_size=4", "vision.depth=3", "text.depth=2"
    sizes = (f"--config.model.{field}" for field in tower)  # 577 tokens
    options = "--config", "configs/debug.py", *sizes, "--topology", "v5e:2x2"
    temporaries = {}
    for how in ("plain", "flash"):
        out, hlo = tmp_path / f"{how}.json", tmp_path / f"{how}.hlo"
        changed = f"--config.model.vision.attention={how}"
        child = command(*options, changed, "--json", str(out), "--hlo", str(hlo))
        assert child.returncode == FITS, child.stderr
        temporaries[how] = json.loads(out.read_text())["memory"]["temporaries"]
        assert ("tpu_custom_call" in hlo.read_text()) == (how == "flash")
    assert temporaries["flash"] < 0.6 * temporaries["plain"]


@needs_libtpu
def test_a_state_that_is_too_large_is_not_compiled(tmp_path):
    out = tmp_path / "step.json"
    child = command(
        *("--config", "configs/huge.py", "--topology", "v5e:2x2", "--pairs-per-chip", "80"),
        *("--config.mesh.fsdp=1", "--json", str(out)),
    )
    assert child.returncode == DOES_NOT_FIT, child.stderr
    assert "not compiled" in child.stdout and "--config.mesh.fsdp=4" in child.stdout
    values = json.loads(out.read_text())
    assert values["verdict"] == "does not fit" and values["compile_seconds"] is None
    assert values["memory"]["arguments"] > values["memory"]["capacity"]


@needs_libtpu
@pytest.mark.slow
def test_the_reference_recipe_for_tpu(tmp_path):
    out = tmp_path / "step.json"
    child = command(
        *("--config", "configs/base.py", "--topology", "v5e:4x4", "--pairs-per-chip", "160"),
        *("--json", str(out)),
    )
    # Far too much without recomputation, which the compiler finds out soon.
    assert child.returncode == DOES_NOT_FIT, child.stderr
    values = json.loads(out.read_text())
    assert values["memory"]["total"] > 2 * values["memory"]["capacity"]
    # The formula counts keys and values of an image once; of a negative they are made again.
    assert 1 <= values["dot_flops"] / values["model_flops"] < 1.1
    assert any("model.remat=dots" in line for line in values["advice"])


def finished(topology_name, pairs, verdict):
    """What a child process writes."""
    memory = Memory({"params": 1e9}, 1e9, 2e9, 0.0, 3e9, 4e9 if verdict == "fits" else 2e9)
    step = CompiledStep("TPU", {"data": 4, "fsdp": 1}, 1, 1e12, None, memory, (), 1e12)
    values = report.to_dict(step, None) | {"config": to_dict(load(DEBUG))}
    bounds = {"best": 50.0 * pairs, "worst": 20.0 * pairs}
    names = ("step", "pairs_per_second", "chip_hours")
    return values | {"estimate": dict.fromkeys(names, bounds)}


@pytest.fixture
def children(monkeypatch):
    """Child processes that answer at once: the points that were asked for."""
    asked = []

    def run(arguments, **_):
        point = dict(zip(arguments[3::2], arguments[4::2], strict=True))
        name, pairs = point["--topology"], int(point["--pairs-per-chip"])
        asked.append((name, pairs))
        if pairs == 3:
            return SimpleNamespace(stderr="warning\nerror: three is bad\n", returncode=1)
        verdict = "fits" if pairs < 16 else "does not fit"
        Path(point["--json"]).write_text(json.dumps(finished(name, pairs, verdict)))
        return SimpleNamespace(stderr="", returncode=0)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    return asked


def test_a_sweep_goes_on_and_takes_up_where_it_was(tmp_path, children, capsys):
    arguments = ["--config", DEBUG, "--topology", "cpu:2,cpu:4", "--sweep", str(tmp_path)]
    assert main([*arguments, "--pairs-per-chip", "16,3,8"]) == BAD_INPUT
    assert children == [(name, n) for name in ("cpu:2", "cpu:4") for n in (16, 3, 8)]
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["verdict"] for row in rows] == ["does not fit", "error", "fits"] * 2
    assert rows[1]["message"] == "error: three is bad" and rows[0]["hbm_gib"] == "2.794"
    assert rows[2]["pairs_per_second_worst"] == "160.0"
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    children.clear()
    assert main([*arguments, "--pairs-per-chip", "8,3,4"]) == BAD_INPUT
    assert children == [("cpu:2", 3), ("cpu:2", 4), ("cpu:4", 3), ("cpu:4", 4)]
    children.clear()
    assert main([*arguments, "--pairs-per-chip", "4,8,16"]) == FITS
    assert children == []
    assert "does not fit, 2.794 of 1.863 GiB" in capsys.readouterr().out


def test_a_table_of_another_version_is_left_alone(tmp_path, capsys):
    (tmp_path / "sweep.csv").write_text("a,b\n1,2\n")
    arguments = ["--topology", "cpu", "--pairs-per-chip", "4", "--sweep", str(tmp_path)]
    assert main(["--config", DEBUG, *arguments]) == BAD_INPUT
    assert "other columns" in capsys.readouterr().err


def test_a_child_that_fails_is_told(tmp_path):
    """A real child process, which does not get as far as JAX."""
    child = command(
        *("--config", DEBUG, "--topology", "cpu", "--pairs-per-chip", "4"),
        *("--sweep", str(tmp_path), "--config.optim.lr=fast"),
    )
    assert child.returncode == BAD_INPUT
    assert "error: config.optim.lr=fast: must be" in child.stdout


def test_the_page_shows_commands_that_parse():
    text = (ROOT / "docs" / "compile.md").read_text()
    shell = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    lines = shell.replace("\\\n", " ").splitlines()
    assert lines
    for line in lines:
        args, fields = parse(shlex.split(line.removeprefix("python -m flip_jax.compile ")))
        for name in args.topology.split(","):
            assert topology.known(name)
        for item in fields:
            path, _, value = item.removeprefix("--config.").partition("=")
            override(load(ROOT / args.config[0]), path, value)
    flags = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", text)) - {"--config"}
    assert {f"--{name.replace('_', '-')}" for name in vars(args)} - {"--config"} <= flags
