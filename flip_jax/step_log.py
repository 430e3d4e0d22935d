"""What the training loop notes about its steps: metrics, throughput, evaluations, saves."""

from __future__ import annotations

import logging
from typing import Any

import jax

from flip_jax.downstream.retrieval import Retrieval
from flip_jax.metrics import (
    MetricsWriter,
    ProgressReporter,
    StepTimer,
    check_finite,
    model_flops_per_pair,
    peak_flops,
)
from flip_jax.run import Run

Array = jax.Array
log = logging.getLogger(__name__)


class StepLog:
    """Metrics on their way from the device to the log; the guard against non-finite losses.

    Metrics stay on the device until `flush`, so that steps do not wait for each other; `flush`
    sees every step, so the first bad one is named.
    """

    def __init__(self, run: Run, start_step: int):
        self._run, self._start = run, start_step
        self._pending: list[tuple[int, dict[str, Array], Any]] = []
        self._bad_records = 0
        self._saved = start_step or None
        self._writer = MetricsWriter(run.workdir, start_step)
        cfg = run.cfg
        self._progress = ProgressReporter(run.total_steps, start_step, cfg.data.batch_size)
        peak = peak_flops(run.mesh.devices.flat[0])
        self.timer = StepTimer(
            cfg.data.batch_size,
            model_flops_per_pair(cfg),
            peak and peak * run.mesh.size,
        )

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        self._writer.close()

    def add(self, step: int, metrics: dict[str, Array], batch: dict[str, Any]) -> None:
        """Metrics of a step that was started."""
        self._pending.append((step, metrics, batch["index"]))
        self._bad_records += int((batch["bad"] > 0).sum())
        self._progress.step()
        if step == self._start + 1:
            jax.block_until_ready(metrics)
            self.timer.report()  # throughput counts from here: the first step compiled
        else:
            self.timer.step()

    def flush(self) -> None:
        """Fetch what is pending, check it, write its mean as one line."""
        if not self._pending:
            return
        fetched = jax.device_get([metrics for _, metrics, _ in self._pending])
        for (step, _, records), values in zip(self._pending, fetched, strict=True):
            names = (self._run.source[int(number)].id for number in records)
            check_finite(step, values, names, self._saved)
        last = self._pending[-1][0]
        mean = {name: sum(v[name] for v in fetched) / len(fetched) for name in fetched[0]}
        mean |= self.timer.report() | {"bad_records": self._bad_records}
        self._writer.write(last, mean)
        self._progress.log(last, mean)
        self._pending.clear()
        self._bad_records = 0

    def evaluate(self, step: int, state: dict[str, Any]) -> Retrieval:
        """Evaluate and write `eval/...`."""
        self.flush()
        with self.timer.paused():
            result = self._run.evaluator(state["params"])
            found = result.metrics()
            self._writer.write(step, {f"eval/{name}": value for name, value in found.items()})
            log.info("step %d: mean recall %.2f %%", step, found["mean_recall"])
        return result

    def save(self, step: int, state: dict[str, Any], metrics: dict | None = None) -> None:
        """Save a state whose losses are known to be finite."""
        self.flush()
        with self.timer.paused():
            self._run.checkpointer.save(step, state, metrics=metrics)
        self._saved = step
