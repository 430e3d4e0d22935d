"""A trace of some steps of a run, for XProf or TensorBoard."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax

from flip_jax.config import ProfileConfig

log = logging.getLogger(__name__)


class StepProfile:
    """Traces the steps `profile.steps` into a folder, device and host; all processes take part.

    A run that starts or ends between the two steps traces those it does.

    Args:
      cfg: `steps` None = nothing is traced.
      folder: made at the first traced step.
    """

    def __init__(self, cfg: ProfileConfig, folder: Path):
        self._first, self._last = cfg.steps or (0, -1)
        self._folder, self._active = folder, False

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def begin(self, step: int) -> None:
        """Call before a step is started."""
        if self._first <= step <= self._last and not self._active:
            jax.profiler.start_trace(self._folder)
            self._active = True

    def end(self, step: int, outputs: Any) -> None:
        """Call after it; the last traced step is waited for."""
        if self._active and step == self._last:
            jax.block_until_ready(outputs)
            self._stop()

    def _stop(self) -> None:
        if self._active:
            jax.profiler.stop_trace()
            self._active = False
            log.info("profile: steps %d to %d are in %s", self._first, self._last, self._folder)
