"""The comparison of recipes: what each row changes, and the arithmetic of the table."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import recipes, recipes_table  # noqa: E402
from flip_jax import config  # noqa: E402
from flip_jax.data.sources import write_drawn  # noqa: E402

DEBUG = config.load(ROOT / "configs" / "debug.py")


def changed(old, new, path=""):
    if not isinstance(old, dict):
        return set() if old == new else {path}
    return {p for name in old for p in changed(old[name], new[name], f"{path}.{name}".lstrip("."))}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return write_drawn(DEBUG.data.drawn, tmp_path_factory.mktemp("recipes") / "data", processes=1)


def test_a_row_changes_one_thing(drawn):
    base, *rows = (recipes.row_config(row, DEBUG, 3, 80, drawn) for row in recipes.RECIPES)
    assert base.epochs == 10 / 6 and base.loss.alpha_ramp_epochs == pytest.approx(10 / 9)
    assert (base.seed, base.data.path) == (3, str(drawn))
    found = dict(zip(list(recipes.RECIPES)[1:], rows, strict=True))
    fields = {row: changed(config.to_dict(base), config.to_dict(cfg)) for row, cfg in found.items()}
    assert fields == {
        "ignore": {"loss.same_group"},
        "positive": {"loss.same_group"},
        "global": {"loss.candidates"},
        "sentence": {"data.contrastive_text"},
        "block": {"data.contrastive_text"},
        "sigmoid": {"loss.contrastive", "loss.temperature", "model.logit_bias"},
        "masked50": {"model.vision.keep_patches", "unmasked_epochs"},
        "masked75": {"model.vision.keep_patches", "unmasked_epochs"},
        "mim": {"loss.weights.mim", "model.mim_depth"},
    }
    kept = [found[name].model.vision.keep_patches for name in ("masked50", "masked75")]
    assert kept == [2, 1] and found["masked50"].unmasked_epochs == base.epochs / 15


def test_all_that_is_in_epochs_keeps_its_share(drawn):
    vision = replace(DEBUG.model.vision, keep_patches=2)
    masked = replace(DEBUG, model=replace(DEBUG.model, vision=vision), unmasked_epochs=1.0)
    cfg = recipes.row_config("reference", masked, 3, 80, drawn)
    assert cfg.unmasked_epochs / cfg.epochs == pytest.approx(1 / DEBUG.epochs)


def test_the_small_config_is_the_reference_but_for_sizes_and_cures():
    small, base = config.load(ROOT / "configs" / "recipes.py"), config.Config()
    same = ("contrastive", "candidates", "same_group", "momentum", "alpha", "weights")
    assert all(getattr(small.loss, n) == getattr(base.loss, n) for n in same)
    assert small.data.batch_size / small.loss.local_batch == base.data.batch_size / 80


def test_the_best_config_is_the_reference_but_for_what_was_measured():
    best, base = (config.to_dict(config.load(ROOT / "configs" / n)) for n in ("best.py", "base.py"))
    assert changed(base, best) == {"loss.candidates"} and best["loss"]["candidates"] == "global"


def test_mean_deviation_and_interval():
    reference = {"0": {"x": 1.0}, "1": {"x": 2.0}, "2": {"x": 6.0}}
    runs = {"0": {"x": 2.0, "y": 1.0}, "1": {"x": 5.0}, "2": {"x": 8.0}}
    found = recipes_table._summary(runs, reference)
    assert found["seeds"] == 3
    number = found["metrics"]["x"]
    assert number["mean"] == 5 and number["deviation"] == 3 and number["difference"] == 2
    # Student's t with two degrees of freedom: 4.303 standard errors.
    assert number["half_width"] == pytest.approx(4.303 * 1 / np.sqrt(3), rel=1e-3)
    assert found["metrics"]["y"] == {"mean": 1.0, "deviation": None, "seeds": 1}
    assert recipes_table._cell(number) == "5.00 ± 3.00 (+2.00 ± 2.48)"
    assert recipes_table.half_width([1.0]) is None
    # With ten degrees of freedom 2.228, where the normal has 1.960.
    values = [float(n) for n in range(11)]  # their deviation is sqrt(11)
    assert recipes_table.half_width(values) == pytest.approx(2.228, 1e-3)


def test_dense_tasks_on_data_of_their_own(tmp_path, monkeypatch, drawn):
    """Asked for by the name of the training data; run on each, found by the table."""
    assert recipes._named(f"real={drawn}", "--dense") == ("real", drawn)
    with pytest.raises(ValueError, match="--dense real: must be NAME=FOLDER"):
        recipes._named("real", "--dense")
    with pytest.raises(ValueError, match="--data real: must be `drawn` or NAME=FOLDER"):
        recipes._named("real", "--data")
    ran = []

    def run_suite(settings, args, command):
        ran.append((settings.tasks, args.data, args.out.name))
        for task, metric in (("attributes", "AP"), ("parsing", "F1"), ("alignment", "NME ocular")):
            if task in settings.tasks and (task == "attributes") == (args.data == drawn):
                folder = args.out / "x" / task
                folder.mkdir(parents=True)
                results = {"trained": {metric: {"value": len(ran)}}}
                (folder / "report.json").write_text(json.dumps({"results": results}))

    monkeypatch.setattr(recipes.suite, "run", run_suite)
    workdir = tmp_path / "sentence-1"
    workdir.mkdir()
    (workdir / "results.json").write_text("{}")
    settings = recipes._task_settings()
    settings = recipes.replace(settings, tasks="attributes")
    recipes.run(
        "sentence", DEBUG, 1, 80, drawn, tmp_path, settings, [Path("masks"), Path("points")]
    )
    assert ran == [
        ("attributes", drawn, "tasks"),
        ("parsing alignment", Path("masks"), "tasks-dense-0"),
        ("parsing alignment", Path("points"), "tasks-dense-1"),
    ]
    numbers = recipes_table._task_numbers(workdir, "trained")
    assert numbers == {"probe AP": 1, "parsing F1": 2, "alignment NME": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=attribute"], "settings.tasks names attribute; there are"),
        (["--data", "foo"], "--data foo: must be `drawn` or NAME=FOLDER"),
        (["--data", "x=nowhere"], "nowhere"),
        (["--bogus=1"], "settings.bogus does not exist"),
    ],
)
def test_what_is_wrong_is_told_before_the_training(
    arguments, message, tmp_path, monkeypatch, capsys
):
    debug = str(ROOT / "configs" / "debug.py")
    line = ["recipes.py", "--config", debug, "--out", str(tmp_path), *arguments]
    monkeypatch.setattr(sys, "argv", line)
    monkeypatch.setattr(recipes, "run", None)
    assert recipes.main() == 1
    assert message in capsys.readouterr().err


def test_fewer_records_than_a_batch_are_refused(drawn):
    cfg = recipes.replace(DEBUG, data=recipes.replace(DEBUG.data, batch_size=4096))
    with pytest.raises(ValueError, match=r"has \d+ records to train on, fewer than data.batch_siz"):
        recipes.row_config("reference", cfg, 0, 8192, drawn)


def test_numbers_of_dense_data_come_first(tmp_path):
    for folder, metric, value in (
        ("tasks", "NME box", 7.0),
        ("tasks-dense-0", "NME ocular", 5.0),
    ):
        (tmp_path / folder / "x" / "alignment").mkdir(parents=True)
        results = {"trained": {metric: {"value": value}}}
        report = tmp_path / folder / "x" / "alignment" / "report.json"
        report.write_text(json.dumps({"results": results}))
    assert recipes_table._task_numbers(tmp_path, "trained") == {"alignment NME": 5.0}


@pytest.mark.release
def test_the_command(tmp_path):
    """Two recipes, one stopped and gone on with; the second call does nothing but the table."""
    fields = ["--attributes.epochs=1", "--attributes.rates=0.1", "--attributes.resamples=10"]
    command = [sys.executable, str(ROOT / "benchmarks" / "recipes.py"), "--config"]
    command += [str(ROOT / "configs" / "debug.py"), "--out", str(tmp_path), "--seeds=1"]
    command += ["--pairs=24", "--recipes", "reference", "sentence", *fields]

    def call(*more):
        run = subprocess.run(
            [*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=500
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    first, second = call(), call()
    assert "== drawn, sentence, seed 0" in first and "== drawn, sentence" not in second
    assert second.count("is done, with the same weights") == 2 * len(recipes.TASKS)
    assert "reference" in call("--time", "--steps=2")
    page = (tmp_path / "recipes.md").read_text().splitlines()
    assert page[0].startswith("| data | recipe | seeds | mean recall, cosine |")
    assert page[0].endswith("step time |")
    names = [line.split(" | ")[1] for line in page[2:]]
    assert names == ["chance", "before training", "reference", "sentence"]
    found = json.loads((tmp_path / "recipes.json").read_text())
    run = found["runs"]["drawn"]["sentence"]["0"]
    results = json.loads((tmp_path / "drawn" / "sentence-0" / "results.json").read_text())
    assert run["recall reranked"] == pytest.approx(results["trained"]["mean_recall"])
    assert 0 < run["probe AP"] <= 100
