"""The downstream tasks by name, and how one is run and written down."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from flip_jax.config import check_types
from flip_jax.data.records import load_manifest
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.face_data import FaceData
from flip_jax.downstream.task_report import FILES, TaskReport, write_report

__all__ = ["FILES", "TASKS", "open_inputs", "run_task", "task_module"]

# Name -> module, imported when it is needed. A module has a frozen dataclass `Settings`, every
# field with a default, and `run(settings, backbone, data, out) -> TaskReport`; what it writes
# besides the report goes into `out`. A field that is out of range is a ValueError naming it, a
# need that the data does not meet is `DataLacks`. The field `random_backbone` says whether the
# report has the row `random`.
TASKS = {
    "retrieval": "flip_jax.downstream.retrieval_task",
    "attributes": "flip_jax.downstream.attributes",
    "slfir": "flip_jax.downstream.slfir",
    "zero_shot": "flip_jax.downstream.zero_shot",
    "parsing": "flip_jax.downstream.parsing",
    "alignment": "flip_jax.downstream.alignment",
    "multitask": "flip_jax.downstream.multitask",
}


class Options(Protocol):
    """The command line's options that all tasks share."""

    data: Path
    tokenizer: str | None
    limit: int | None
    batch_size: int
    dtype: str
    threads: int


def task_module(name: str) -> ModuleType:
    """The module of a task.

    Raises:
      ValueError: no such task.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r} does not exist; there are {', '.join(TASKS)}")
    return importlib.import_module(TASKS[name])


def run_task(
    name: str,
    settings: Any,
    backbone: Backbone,
    data: FaceData,
    out: Path,
    command: Sequence[str],
) -> TaskReport:
    """Runs a task and writes `report.json`, `report.md` and `report.png` into `out`.

    Raises:
      ValueError: a setting is wrong, or the data lacks what the task needs.
      OSError: data cannot be read, or `out` not be written.
    """
    check_types(settings, "settings")
    _check_writable(out)
    report = task_module(name).run(settings, backbone, data, out)
    written = {"command": command, "settings": settings, "backbone": backbone, "data": data}
    write_report(report, out, **written)
    return report


def _check_writable(out: Path) -> None:
    """Before a training whose heads could not be saved. Leaves no folder that was not there.

    Raises:
      OSError: no file can be written in `out`.
    """
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
    if made:
        out.rmdir()


def open_inputs(checkpoint: str, options: Options, cache: Path) -> tuple[Backbone, FaceData]:
    """What tasks run on.

    Raises:
      ValueError, OSError: there is no such model or data, or an option is out of range.
    """
    # The data first: a mistyped folder should not cost the time to load a model.
    load_manifest(options.data)
    backbone = Backbone.load(
        checkpoint,
        tokenizer=options.tokenizer,
        batch_size=options.batch_size,
        dtype=options.dtype,
    )
    size = backbone.image_size
    limits = {"limit": options.limit, "threads": options.threads}
    return backbone, FaceData(options.data, size, cache=cache, **limits)
