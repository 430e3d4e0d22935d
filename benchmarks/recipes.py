"""Pretraining recipes compared at equal pairs seen: one run per recipe, data set and seed.

    python benchmarks/recipes.py --out runs/recipes [--data drawn --data real=data/faces]
    python benchmarks/recipes.py --out runs/recipes --time

`--config` is the first row, `reference`; every other row changes one thing of it, see `RECIPES`.
After each run the tasks of `TASKS` that the data allows are run on its checkpoint; with
`--dense real=data/masks` also parsing and alignment on that data, for runs on `real`. What is there
already is not done again, so the command goes on where it stopped; it writes `recipes.md` and
`recipes.json` into OUT whenever a run is finished. `--attributes.epochs=50` and the like set fields
of the tasks. `--time` measures a step of each recipe, in turns, and adds that column: on a machine
that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import recipes_table
from flip_jax import config, partition, train
from flip_jax.config import Config
from flip_jax.data.records import load_manifest
from flip_jax.data.sources import write_drawn
from flip_jax.downstream import suite, tasks
from flip_jax.downstream.__main__ import set_fields

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("attributes", "parsing", "alignment")  # those of them that exist
DENSE = ("parsing", "alignment")

Recipe = Callable[[Config], Config]


def _loss(**fields: Any) -> Recipe:
    return lambda cfg: replace(cfg, loss=replace(cfg.loss, **fields))


def _text(part: str) -> Recipe:
    return lambda cfg: replace(cfg, data=replace(cfg.data, contrastive_text=part))


def _sigmoid(cfg: Config) -> Config:
    loss = replace(cfg.loss, contrastive="sigmoid", temperature=0.1)
    return replace(cfg, loss=loss, model=replace(cfg.model, logit_bias=-10.0))


def _keep(share: float) -> Recipe:
    def recipe(cfg: Config) -> Config:
        patches = cfg.model.vision.patches
        vision = replace(cfg.model.vision, keep_patches=max(round(share * patches), 1))
        model = replace(cfg.model, vision=vision)
        return replace(cfg, model=model, unmasked_epochs=cfg.epochs / 15)

    return recipe


def _mim(cfg: Config) -> Config:
    loss = replace(cfg.loss, weights=replace(cfg.loss.weights, mim=1.0))
    return replace(cfg, loss=loss, model=replace(cfg.model, mim_depth=1))


# Row -> (what it changes, in the words of the table; the change).
RECIPES: dict[str, tuple[str, Recipe]] = {
    "reference": ("", lambda cfg: cfg),
    "ignore": ("`loss.same_group=ignore`", _loss(same_group="ignore")),
    "positive": ("`loss.same_group=positive`", _loss(same_group="positive")),
    "global": ("`loss.candidates=global`", _loss(candidates="global")),
    "sentence": ("`data.contrastive_text=sentence`", _text("sentence")),
    "block": ("`data.contrastive_text=block`", _text("block")),
    "sigmoid": ("`loss.contrastive=sigmoid`, no twins, no queue", _sigmoid),
    "masked50": ("half of the patches, the last 1/15 of the steps all", _keep(0.5)),
    "masked75": ("a quarter of the patches, the last 1/15 of the steps all", _keep(0.25)),
    "mim": ("`loss.weights.mim=1`, one decoder block", _mim),
}


def main() -> int:
    """Returns the exit status: 1 for input that cannot be used."""
    try:
        _compare()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _compare() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for noisy in ("absl", "jax", "orbax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    args, fields = _arguments()
    settings = set_fields(_task_settings(), fields)
    suite.task_names(settings)  # a misspelt one is told before the training
    cfg = config.load(args.config)
    sets = dict(_data_set(item, cfg, args.out) for item in args.data)
    dense: dict[str, list[Path]] = {name: [] for name in sets}
    for name, path in (_named(item, "--dense") for item in args.dense):
        if name not in dense:
            raise ValueError(f"--dense {name}=...: there is no --data of that name")
        dense[name].append(path)
    command = shlex.join(["python", "benchmarks/recipes.py", *sys.argv[1:]])
    if args.time:
        times = step_times({row: RECIPES[row][1](cfg) for row in args.recipes}, args.steps)
        _write_json(args.out / recipes_table.TIMES, {"command": command, "seconds": times})
    else:
        # By seed, so that what is there when it is stopped compares all recipes.
        for seed in range(args.seeds):
            for name, path in sets.items():
                for row in args.recipes:
                    folder = args.out / name
                    run(row, cfg, seed, args.pairs, path, folder, settings, dense[name])
                    _write_table(args, cfg, command)
    print(_write_table(args, cfg, command))


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, default=ROOT / "configs" / "recipes.py", help="the first row")
    add("--data", action="append", help="`drawn` (the config's) or NAME=FOLDER; several times")
    add("--dense", action="append", default=[], help="NAME=FOLDER: masks or points for its runs")
    add("--out", type=Path, default=Path("runs/recipes"))
    add("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="all of them")
    add("--seeds", type=int, default=3, help="0 up to this many minus 1; 3")
    add("--pairs", type=int, default=24_000, help="that every run sees; 24,000")
    add("--time", action="store_true", help="measure a step of each recipe")
    add("--steps", type=int, default=20, help="with --time: of each recipe; 20")
    args, fields = parser.parse_known_args()
    args.data = args.data or ["drawn"]
    return args, fields


def _task_settings() -> suite.Settings:
    found = suite.Settings(tasks=" ".join(name for name in TASKS if name in tasks.TASKS))
    probe = replace(found.attributes, fractions="100", epochs=20, rates="0.3 0.03")
    return replace(found, attributes=probe)


def _data_set(item: str, cfg: Config, out: Path) -> tuple[str, Path]:
    """(name, folder) of one `--data`."""
    if item == "drawn":
        return item, write_drawn(cfg.data.drawn, out / "data")
    return _named(item, "--data")


def _named(item: str, option: str) -> tuple[str, Path]:
    name, _, path = item.partition("=")
    if not path:
        also = "`drawn` or " if option == "--data" else ""
        raise ValueError(f"{option} {item}: must be {also}NAME=FOLDER")
    load_manifest(path)
    return name, Path(path)


def row_config(row: str, cfg: Config, seed: int, pairs: int, data: Path) -> Config:
    """The config of one run. All that counts in epochs keeps its share of them."""
    records = load_manifest(data).splits[cfg.data.train_split].records
    per_epoch = records // cfg.data.batch_size
    if not per_epoch:
        raise ValueError(
            f"{data} has {records} records to train on, fewer than data.batch_size="
            f"{cfg.data.batch_size} of --config"
        )
    epochs = max(pairs // cfg.data.batch_size, 1) / per_epoch
    share = epochs / cfg.epochs
    cfg = replace(
        cfg,
        loss=replace(cfg.loss, alpha_ramp_epochs=cfg.loss.alpha_ramp_epochs * share),
        unmasked_epochs=cfg.unmasked_epochs * share,
        data=replace(cfg.data, path=str(data)),
        epochs=epochs,
        seed=seed,
    )
    return config.validate(RECIPES[row][1](cfg))


def run(
    row: str,
    cfg: Config,
    seed: int,
    pairs: int,
    data: Path,
    out: Path,
    settings: suite.Settings,
    dense: Sequence[Path] = (),
) -> None:
    """Trains, unless that is done, and runs the tasks that are not done yet.

    Args: dense: data sets that parsing and alignment are run on besides.

    Raises:
      ValueError: the folder of this run is of another config.
    """
    workdir = out / f"{row}-{seed}"
    cfg = row_config(row, cfg, seed, pairs, data)
    workdir.mkdir(parents=True, exist_ok=True)
    known, values = workdir / "config.json", config.to_dict(cfg)
    if known.exists() and config.from_dict(json.loads(known.read_text())) != cfg:
        raise ValueError(f"{workdir}: was made with another config; remove it or take another out")
    _write_json(known, values)
    if not (workdir / "results.json").exists():
        print(f"== {out.name}, {row}, seed {seed}", flush=True)
        start = time.process_time()
        if train.train(cfg, workdir) is None:
            sys.exit(f"{workdir}: stopped, the same command goes on")
        print(f"{workdir}: {time.process_time() - start:.0f} s of CPU time", flush=True)
        jax.clear_caches()
    if row != "reference" or seed:  # one random backbone is enough: all have the same shape
        names = suite.task_names(settings)
        parts = {n: replace(getattr(settings, n), random_backbone=False) for n in names}
        settings = replace(settings, **parts)
    _run_tasks(settings, workdir, data, "tasks")
    for number, path in enumerate(dense):
        _run_tasks(replace(settings, tasks=" ".join(DENSE)), workdir, path, f"tasks-dense-{number}")


def _run_tasks(settings: suite.Settings, workdir: Path, data: Path, out: str) -> None:
    with tempfile.TemporaryDirectory() as cache:
        given = {"checkpoint": [str(workdir)], "data": data, "out": workdir / out}
        options = {"cache": Path(cache), "tokenizer": None, "limit": None, "threads": 2}
        args = argparse.Namespace(**given, **options, batch_size=64, dtype="float32")
        suite.run(settings, args, ["python", "benchmarks/recipes.py", *sys.argv[1:]])


def step_times(rows: dict[str, Config], steps: int) -> dict[str, list[float]]:
    """Seconds of `steps` steps of each recipe, one of each after the other, on random input."""
    mesh, compiled, states, batches = None, {}, {}, {}
    for row, cfg in rows.items():
        mesh = partition.make_mesh(cfg.mesh)
        compiled[row] = train.Compiled(cfg, mesh, steps_per_epoch=1000, steps=1000)
        states[row] = compiled[row].init()
        batches[row] = partition.to_global(random_batch(cfg), mesh)
    times: dict[str, list[float]] = {row: [] for row in rows}
    for _ in range(steps + 1):
        for row in rows:
            start = time.perf_counter()
            states[row], _ = compiled[row].step(states[row], batches[row])
            jax.block_until_ready(states[row])
            times[row].append(time.perf_counter() - start)
    for row, seconds in times.items():
        del seconds[0]  # with the compilation
        print(f"{row:10} {1000 * statistics.median(seconds):8.1f} ms", flush=True)
    return times


def random_batch(cfg: Config) -> dict[str, np.ndarray]:
    """Pixels and ids; shapes are static, so that their values cost nothing."""
    rng, size = np.random.default_rng(0), cfg.model.vision.image_size
    rows, length = cfg.data.batch_size, cfg.model.text.max_length
    ids = rng.integers(5, cfg.model.text.vocab_size - 2, (rows, length)).astype(np.int32)
    mask = np.ones((rows, length), bool)
    batch = {
        "image": rng.integers(0, 256, (rows, size, size, 3)).astype(np.uint8),
        "token_ids": ids,
        "token_mask": mask,
        "group": np.arange(rows, dtype=np.int32),
    }
    part = {"part_ids": ids, "part_mask": mask}
    return batch | (part if cfg.data.contrastive_text != "caption" else {})


def _write_table(args: argparse.Namespace, cfg: Config, command: str) -> str:
    names = [item.partition("=")[0] for item in args.data]
    changes = {row: RECIPES[row][0] for row in RECIPES}
    found = recipes_table.collect(args.out, names, changes)
    found |= {"command": command, "config": str(args.config), "pairs": args.pairs}
    page = recipes_table.markdown(found)
    _write_json(args.out / "recipes.json", found)
    (args.out / "recipes.md").write_text(page + "\n")
    return page


def _write_json(path: Path, values: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
