"""The folders of checkpoints, without reading arrays: which steps are complete, what `meta` says.

`checkpoint.py` writes and reads them.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LAYOUT_VERSION = 1  # of items and names in `checkpoint.py`; raise it with any change of them
FOLDER = "checkpoints"
COMMIT_FILE = "commit_success.txt"  # Orbax's names
META_FILE = Path("meta", "metadata")


class CheckpointError(OSError):
    """A checkpoint could not be written, or what is stored is damaged."""


def writable_folder(folder: Path) -> Path:
    """The folder, made where it is not there. Raises: CheckpointError: it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"cannot write checkpoints to {folder}: {error.strerror or error}; choose another "
            "workdir or change its permissions"
        ) from error
    return folder.resolve()


def _step_numbers(folder: Path) -> list[int]:
    names = [child.name for child in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def complete_steps(folder: Path) -> list[int]:
    """Steps whose folder holds the commit file, ascending."""
    return [step for step in _step_numbers(folder) if (folder / str(step) / COMMIT_FILE).is_file()]


def incomplete_steps(folder: Path) -> list[int]:
    """Steps of a process that was killed or of a full disk, ascending."""
    return sorted(set(_step_numbers(folder)) - set(complete_steps(folder)))


def step_folder(path: Path, step: int | None) -> Path:
    """The folder of one complete step.

    Args:
      path: a workdir, its checkpoints folder or one step's folder.
      step: None = the newest complete one.

    Raises:
      FileNotFoundError: it is not there, or not complete.
    """
    path = path.resolve()  # Orbax takes absolute paths only
    # A step's items, `params` and so on, have such a file, too.
    is_step = path.name.isdecimal() or (path / META_FILE).is_file()
    if step is None and is_step and (path / COMMIT_FILE).is_file():
        return path
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    complete = complete_steps(folder)
    if not complete or (step is not None and step not in complete):
        what = "complete checkpoint" if step is None else f"complete checkpoint of step {step}"
        raise FileNotFoundError(
            f"no {what} in {folder}; complete steps: {complete}, unfinished: "
            f"{incomplete_steps(folder)}. Give a workdir, its {FOLDER} folder or a step folder"
        )
    return folder / str(complete[-1] if step is None else step)


def read_step_meta(folder: Path) -> dict[str, Any]:
    """The `meta` of a step's folder.

    Raises:
      CheckpointError: it is damaged. ValueError: it is of another layout version.
    """
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        found = meta["layout_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder, f"meta cannot be read: {brief(error)}") from error
    if found != LAYOUT_VERSION:
        raise ValueError(
            f"{folder} has layout version {found!r}, this flip_jax reads {LAYOUT_VERSION}; use the "
            f"flip_jax that wrote it ({meta.get('versions')})"
        )
    if json_crc32(meta) != meta.get("meta_crc32"):
        raise damaged(folder, "meta does not have the checksum it was written with")
    return meta


def json_crc32(meta: Mapping[str, Any]) -> int:
    """Checksum of all of `meta` but the field `meta_crc32`."""
    rest = {key: value for key, value in meta.items() if key != "meta_crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def damaged(folder: Path, what: str) -> CheckpointError:
    """The error to raise: what is damaged, and which other steps there are."""
    others = [step for step in complete_steps(folder.parent) if str(step) != folder.name]
    if others:
        advice = f"other complete steps there: {others}; move {folder} away to use {others[-1]}"
    else:
        advice = "there is no other complete step"
    return CheckpointError(f"checkpoint {folder} is damaged: {what}. Nothing restored; {advice}")


def brief(error: BaseException) -> str:
    """Its type and text in one line, without the specification that TensorStore appends."""
    text = " ".join(str(error).split("[tensorstore_spec")[0].split())
    return f"{type(error).__name__}: {text[:1000]}"
