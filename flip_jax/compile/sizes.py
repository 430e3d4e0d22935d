"""Batch, queue and groups of candidates that fit a number of chips."""

from __future__ import annotations

from dataclasses import replace

from flip_jax.config import Config


def with_pairs_per_chip(cfg: Config, chips: int, pairs: int) -> tuple[Config, list[str]]:
    """`cfg` with a batch of `pairs` for each chip; what hangs on the batch is moved to fit.

    Returns:
      (config, what was set: `config.field=value` with the reason)

    Raises:
      ValueError: `pairs` is below 1.
    """
    if pairs < 1:
        raise ValueError(f"--pairs-per-chip={pairs}: must be at least 1")
    batch = chips * pairs
    loss, notes = cfg.loss, [f"config.data.batch_size={batch}: {pairs} for each of {chips} chips"]
    queue = max(round(loss.queue_size / batch), 1) * batch
    if queue != loss.queue_size:
        notes.append(f"config.loss.queue_size={queue}: {loss.queue_size} is no multiple of that")
        loss = replace(loss, queue_size=queue)
    if loss.candidates == "local" and batch % loss.local_batch:
        divisors = (n for n in range(1, batch + 1) if batch % n == 0)
        local = min(divisors, key=lambda n: abs(n - loss.local_batch))
        notes.append(f"config.loss.local_batch={local}: {loss.local_batch} does not divide it")
        loss = replace(loss, local_batch=local)
    return replace(cfg, data=replace(cfg.data, batch_size=batch), loss=loss), notes
