"""Whether a run may go on from a checkpoint: which settings may differ, which may not."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Config fields under which stored arrays have another shape or meaning: a run cannot go on.
FATAL_FIELDS = ("model.*", "loss.queue_size")
# Exceptions to the above: they change how the model is computed, not what its weights are.
COMPUTE_FIELDS = (
    "model.dtype",
    "model.remat",
    "model.vision.keep_patches",
    "model.vision.attention",
    "model.text.dropout",
    "model.text.max_length",
    "model.text.init_std",
)

_log = logging.getLogger(__name__)


def check_same_run(stored: Mapping[str, Any], current: Mapping[str, Any], folder: Path) -> None:
    """Compares the meta of a checkpoint with that of the run that wants to go on from it.

    Args:
      stored, current: `config` (a dict), `vocab_hash`, `data_hash`, and `visual_tokenizer` (the
        digest of the one whose codes are predicted) or not; `stored` has `step` too.
      folder: the checkpoint, for messages.

    Raises:
      ValueError: model, vocabulary or visual tokenizer differ; all differences are listed. Others
        are logged.
    """
    differences = list(_differences(stored["config"], current["config"]))
    fatal = [line for name, line in differences if _is_fatal(name)]
    for name in ("vocab_hash", "visual_tokenizer"):
        if stored.get(name) != current.get(name):
            fatal.append(_difference(name, stored.get(name), current.get(name)))
    if fatal:
        raise ValueError(
            f"{folder} was written by a run of another model or vocabulary: {'; '.join(fatal)}. "
            "Choose a new workdir, or set these fields and what depends on them back"
        )
    allowed = [line for _, line in differences]
    if stored["data_hash"] != current["data_hash"]:
        allowed.append(_difference("data_hash", stored["data_hash"], current["data_hash"]))
    if allowed:
        _log.warning("settings changed since step %s: %s", stored["step"], "; ".join(allowed))


def _is_fatal(name: str) -> bool:
    return name not in COMPUTE_FIELDS and any(fnmatch.fnmatch(name, f) for f in FATAL_FIELDS)


def _differences(stored: Any, current: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(stored, dict) and isinstance(current, dict):
        for key in sorted(stored.keys() | current.keys()):
            inner = f"{path}.{key}" if path else key
            yield from _differences(stored.get(key, "absent"), current.get(key, "absent"), inner)
    elif stored != current:
        yield path, _difference(path, stored, current)


def _difference(name: str, stored: Any, current: Any) -> str:
    return f"{name} is {stored!r} in the checkpoint and {current!r} now"
