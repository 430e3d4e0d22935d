"""All tasks that the data allows, on one or several checkpoints, and a page that compares them.

    OUT/comparison.html                the page, with all pictures inside; also .md, .json, .png
    OUT/CHECKPOINT/TASK/report.*       what each task found, see `task_report`
    OUT/CHECKPOINT/TASK/done.json      what it was found on

A task whose `done.json` fits is not run again, so that a suite that was stopped goes on, and one
more checkpoint or one more task costs no more than that.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import flip_jax
from flip_jax import config
from flip_jax.data.records import MANIFEST, file_sha256
from flip_jax.downstream import (
    alignment,
    attributes,
    multitask,
    parsing,
    retrieval_task,
    slfir,
    zero_shot,
)
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.face_data import DataLacks, FaceData
from flip_jax.downstream.suite_page import PAGE_FILES, Entry, write_page
from flip_jax.downstream.task_report import FILES, write_text
from flip_jax.downstream.tasks import TASKS, Options, open_inputs, run_task
from flip_jax.short_names import short_names

__all__ = ["PAGE_FILES", "Settings", "labels_of", "read_settings", "run"]

_DONE = "done.json"


@dataclass(frozen=True)
class Settings:
    """Which tasks, and the settings of each: `--tasks="attributes slfir" --attributes.epochs=20`.

    Or a file with `get_config() -> Settings` as `--config`.
    """

    tasks: str = " ".join(TASKS)
    by: str = ""  # columns to break all results down by; a task's own `by` comes first
    retrieval: retrieval_task.Settings = field(default_factory=retrieval_task.Settings)
    attributes: attributes.Settings = field(default_factory=attributes.Settings)
    slfir: slfir.Settings = field(default_factory=slfir.Settings)
    zero_shot: zero_shot.Settings = field(default_factory=zero_shot.Settings)
    parsing: parsing.Settings = field(default_factory=parsing.Settings)
    alignment: alignment.Settings = field(default_factory=alignment.Settings)
    multitask: multitask.Settings = field(default_factory=multitask.Settings)


class Arguments(Options, Protocol):
    """The command line, see `flip_jax.downstream.__main__`."""

    checkpoint: list[str]
    out: Path | None
    cache: Path | None


def read_settings(path: Path | None) -> Settings:
    """The defaults, or what the file says.

    Raises:
      ValueError: no such file, or one without `get_config() -> Settings`.
    """
    return Settings() if path is None else config.load(path, Settings)


def run(settings: Settings, args: Arguments, command: Sequence[str]) -> None:
    """Runs the tasks that are not done yet and writes the page.

    A task that the data does not allow is left out, and the page says why. One that fails does not
    keep the others from running: the page names it, and it is an error in the end.

    Raises:
      ValueError: an unknown task, a wrong setting, or a task that failed.
      OSError: a checkpoint or data cannot be read, or `OUT` not be written.
    """
    config.check_types(settings, "settings")
    names = task_names(settings)
    out = args.out or Path("runs/downstream/suite")
    entries: list[Entry] = []
    randoms: dict[Any, set[str]] = {}
    for path, label in zip(args.checkpoint, labels_of(args.checkpoint), strict=True):
        backbone, data = open_inputs(path, args, args.cache or out / "features")
        entry = Entry(label)
        # One random backbone of each shape is enough, the first whose task came to its end.
        shown = randoms.setdefault(_shape(backbone), set())
        for name in names:
            own = _settings_of(settings, name, with_random=name not in shown)
            print(f"== {label}: {name}", flush=True)
            _add(entry, _Task(name, own, out / label / name), backbone, data, args.limit, command)
            shown |= {name} & set(entry.reports)
        entries.append(entry)
    write_page(out, entries, names, command)
    print(f"wrote {', '.join(str(out / name) for name in PAGE_FILES)}")
    if failed := [f"{e.label}/{n}: {why}" for e in entries for n, why in e.failed.items()]:
        raise ValueError(f"{len(failed)} of the tasks failed. {'; '.join(failed)}")


def labels_of(checkpoints: Sequence[str]) -> list[str]:
    """Short names of folders: the last part of a path, as much more as tells them apart.

    Raises:
      ValueError: the same folder twice.
    """
    # Without `..`, which would be a label that leaves OUT; a link keeps its own name.
    parts = [Path(os.path.abspath(path)).parts[1:] for path in checkpoints]
    try:
        # The other columns of the page have names, too.
        return short_names(parts, "-", taken=("random", "chance"))
    except ValueError as error:
        raise ValueError(f"--checkpoint={' '.join(checkpoints)}: {error}") from error


def _shape(backbone: Backbone) -> Any:
    """All that a random backbone depends on: not how a step of training is computed."""
    model = backbone.cfg.model
    vision = dataclasses.replace(model.vision, keep_patches=None, attention="plain")
    return (
        dataclasses.replace(model, vision=vision, remat="none"),
        backbone.cfg.loss.temperature,
    )


def task_names(settings: Settings) -> list[str]:
    names = list(dict.fromkeys(settings.tasks.replace(",", " ").split()))
    if not names or (unknown := sorted(set(names) - set(TASKS))):
        wrong = ", ".join(unknown) if names else "nothing"
        raise ValueError(f"settings.tasks names {wrong}; there are {', '.join(TASKS)}")
    return names


def _settings_of(settings: Settings, name: str, with_random: bool) -> Any:
    own = getattr(settings, name)
    wanted = own.random_backbone and with_random
    return dataclasses.replace(own, by=own.by or settings.by, random_backbone=wanted)


@dataclass(frozen=True)
class _Task:
    """A task, its settings and its folder."""

    name: str
    settings: Any
    folder: Path

    def key(self, backbone: Backbone, data: FaceData, limit: int | None) -> dict[str, Any]:
        """All that its numbers depend on; JSON types. Without the random backbone: a report that
        has it serves those who do not ask for it."""
        fields = dataclasses.asdict(self.settings)
        del fields["random_backbone"]
        tables = [part.rpartition(":")[0].strip() for part in fields["by"].split(",")]
        return {
            "task": self.name,
            "settings": fields,
            "tables": {path: file_sha256(Path(path)) for path in tables if Path(path).is_file()},
            "weights": backbone.identity,
            "manifest_sha256": file_sha256(data.path / MANIFEST),
            "limit": limit,
            "versions": {"flip_jax": flip_jax.__version__, "jax": metadata.version("jax")},
        }

    def done(self, key: dict[str, Any]) -> bool:
        """Whether the folder holds the report of this key, with what is asked for."""
        report = self.folder / "report.json"
        try:
            noted = json.loads((self.folder / _DONE).read_text(encoding="utf-8"))
            return (
                noted["key"] == key
                and noted["report_sha256"] == file_sha256(report)
                and (noted["random_backbone"] or not self.settings.random_backbone)
                and all((self.folder / name).is_file() for name in FILES)
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def note(self, key: dict[str, Any]) -> None:
        noted = {
            "key": key,
            "random_backbone": self.settings.random_backbone,
            "report_sha256": file_sha256(self.folder / "report.json"),
        }
        write_text(self.folder / _DONE, json.dumps(noted, indent=1) + "\n")


def _add(
    entry: Entry,
    task: _Task,
    backbone: Backbone,
    data: FaceData,
    limit: int | None,
    command: Sequence[str],
) -> None:
    """Runs a task unless it is done, and puts what came of it into the entry."""
    key = task.key(backbone, data, limit)
    try:
        if task.done(key):
            print(f"{task.folder}: is done, with the same weights, data and settings", flush=True)
        else:
            (task.folder / _DONE).unlink(missing_ok=True)
            run_task(task.name, task.settings, backbone, data, task.folder, command)
            task.note(key)
        entry.reports[task.name] = json.loads((task.folder / "report.json").read_text("utf-8"))
    except DataLacks as error:
        entry.left_out[task.name] = str(error)
        print(f"left out: {error}", flush=True)
    except (ValueError, OSError, FloatingPointError) as error:
        entry.failed[task.name] = str(error)
        print(f"failed: {error}", flush=True)
