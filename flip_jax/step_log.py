"""What the training loop notes about its steps: metrics, throughput, evaluations, saves."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flip_jax import distributed
from flip_jax.config import Config
from flip_jax.downstream.retrieval import Retrieval
from flip_jax.metrics import (
    MetricsWriter,
    NonFiniteLoss,
    ProgressReporter,
    StepTimer,
    check_finite,
    model_flops_per_pair,
    peak_flops,
    resume_from,
)
from flip_jax.run import Run

# Steps that the host may be ahead of the devices: enough to keep them busy, few enough that a stop
# is soon done. From 32 on, CPU devices of several processes would wait for each other for ever.
RUN_AHEAD = 4

Array = jax.Array
log = logging.getLogger(__name__)


class StepLog:
    """Metrics on their way from the device to the log; the guard against non-finite losses.

    Metrics stay on the device until `flush`, so that steps do not wait for each other; `flush`
    sees every step, so the first bad one is named. Every process has one and calls the same
    methods; process 0 writes and prints.
    """

    def __init__(self, run: Run, start_step: int):
        self._run = run
        self._pending: list[tuple[int, dict[str, Array], Any]] = []
        self._bad_records = 0
        self._saved = start_step or None
        cfg = run.cfg
        self._writer, self._progress = None, None
        if distributed.is_main():
            self._writer = MetricsWriter(run.workdir, start_step)
            self._progress = ProgressReporter(run.total_steps, start_step, cfg.data.batch_size)
        self.begin(start_step, cfg)

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._progress.close()
            self._writer.close()

    def begin(self, step: int, cfg: Config) -> None:
        """After `step` comes a step of `cfg` that is compiled first."""
        self.flush()
        self._start, self._cfg = step, cfg
        peak = peak_flops(self._run.mesh.devices.flat[0])
        self.timer = StepTimer(cfg.data.batch_size, peak and peak * self._run.mesh.size)

    def add(self, step: int, metrics: dict[str, Array], batch: dict[str, Any]) -> None:
        """Metrics of a step that was started; waits for the one `RUN_AHEAD` steps before."""
        self._pending.append((step, metrics, batch["index"]))
        self._bad_records += int((batch["bad"] > 0).sum())
        if self._progress is not None:
            self._progress.step()
        if len(self._pending) > RUN_AHEAD:
            jax.block_until_ready(self._pending[-1 - RUN_AHEAD][1])
        if step == self._start + 1:
            jax.block_until_ready(metrics)
            self.timer.report()  # throughput counts from here: the first step compiled
        else:
            widths = (batch[n].shape[1] for n in ("token_ids", "part_ids") if n in batch)
            self.timer.step(model_flops_per_pair(self._cfg, *widths))

    def flush(self) -> None:
        """Fetch what is pending, check it, write its mean as one line."""
        if not self._pending:
            return
        fetched = jax.device_get([metrics for _, metrics, _ in self._pending])
        for (step, _, records), values in zip(self._pending, fetched, strict=True):
            check_finite(step, values, self._ids(records), self._saved)
        last = self._pending[-1][0]
        mean = {name: sum(v[name] for v in fetched) / len(fetched) for name in fetched[0]}
        bad_records = sum(distributed.gather(self._bad_records))
        mean |= self.timer.report() | {"bad_records": bad_records}
        self._write(last, mean)
        if self._progress is not None:
            self._progress.log(last, mean)
        self._pending.clear()
        self._bad_records = 0

    def _ids(self, records: np.ndarray) -> Iterator[str]:
        """Of the whole batch, all processes' rows."""
        own = [self._run.source[number].id for number in records.tolist()]
        yield from itertools.chain.from_iterable(distributed.gather(own))

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._writer is not None:
            self._writer.write(step, values)

    def evaluate(self, step: int, state: dict[str, Any]) -> Retrieval:
        """Evaluate and write `eval/...`."""
        self.flush()
        with self.timer.paused():
            result = self._run.evaluator(state["params"])
            found = result.metrics()
            self._write(step, {f"eval/{name}": value for name, value in found.items()})
            log.info("step %d: mean recall %.2f %%", step, found["mean_recall"])
        return result

    def save(self, step: int, state: dict[str, Any], metrics: dict | None = None) -> None:
        """Save a state whose losses and parameters are known to be finite.

        Raises:
          NonFiniteLoss: they are not; the losses of a step are those before its update.
        """
        self.flush()
        if not _all_finite(state["params"]):
            raise NonFiniteLoss(
                f"step {step}: its update left parameters that are not finite, and is not saved. "
                f"{resume_from(self._saved)}. Resume with a lower optim.lr, with "
                "optim.clip_norm=1.0 or with model.dtype=float32; are optim.beta1, beta2 and eps "
                "as usual?"
            )
        with self.timer.paused():
            self._run.checkpointer.save(step, state, metrics=metrics)
        self._saved = step


@jax.jit
def _all_finite(params: dict[str, Any]) -> Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))
