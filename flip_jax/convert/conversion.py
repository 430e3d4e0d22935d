"""What every conversion shares: its error, and an output that is whole or absent."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


class ConversionError(ValueError):
    """The weights do not fit, or source and target do not compute the same."""


@contextlib.contextmanager
def whole_or_absent(out: Path) -> Iterator[Path]:
    """Removes `out`, a file or folder, if the block that writes and checks it fails.

    Raises:
      FileExistsError: `out` is there before; nothing is ever overwritten.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; give a new path or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield out
    except BaseException:
        if out.is_dir():
            shutil.rmtree(out)
        else:
            out.unlink(missing_ok=True)
        raise


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
