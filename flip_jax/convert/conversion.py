"""What every conversion shares: its error, and an output that is whole or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


class ConversionError(ValueError):
    """The weights do not fit, or source and target do not compute the same."""


@contextlib.contextmanager
def whole_or_absent(out: Path) -> Iterator[Path]:
    """Gives the block a path beside `out` to write and check at; renames it to `out` at the end.

    Whenever the process ends, `out` is checked or absent. What the block wrote is removed if it
    fails; only a process that is killed leaves it, as `.NAME.partial-PID`.

    Raises:
      FileExistsError: `out` is there; nothing is ever overwritten.
    """
    _require_absent(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}{out.suffix}")
    _remove(partial)  # of a killed process that had the same number
    try:
        yield partial
        _require_absent(out)
        partial.rename(out)
    except BaseException:
        _remove(partial)
        raise


def _require_absent(out: Path) -> None:
    if out.exists():
        raise FileExistsError(f"{out} exists; give a new path or remove it")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def import_torch():
    """PyTorch, which only conversions need.

    Raises:
      ImportError: naming the extra that brings it.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "converting weights needs PyTorch: pip install 'flip_jax[torch]'"
        ) from error
    return torch
