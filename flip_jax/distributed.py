"""Several processes that make one run: they start, stop and fail together.

The environment tells a process its place, see `flip_jax.place`. What a process alone calls here
does nothing, or answers for itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flip_jax.peers import Peers
from flip_jax.place import cpu_devices, find_place, timeout

_SEEN_SECONDS = 30.0  # after which a network file system should show a new file

_peers: Peers | None = None


def start() -> None:
    """Joins the processes that the environment names; before anything touches a device.

    Raises:
      ValueError: see `flip_jax.place`.
      OSError: process 0 does not answer in time. If others are missing, a message says so and the
        process ends.
    """
    global _peers
    if (devices := cpu_devices(os.environ)) is not None:
        jax.config.update("jax_num_cpu_devices", devices)
    place = find_place(os.environ)
    if place is not None and _peers is None:
        _peers = Peers(place, timeout(os.environ))


@contextlib.contextmanager
def session() -> Iterator[None]:
    """A run among its processes: `start`, and an end that the others learn of.

    With several processes an error inside is printed and ends the process here, with status 1:
    the ordinary way out waits for the others at a barrier.
    """
    start()
    try:
        yield
        gather(None)  # process 0 may still be writing, and fail at it
    except BaseException as error:
        if _peers is None:
            raise
        _peers.end(error)
    if _peers is not None:
        _peers.close()


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order. All call it, at the same point of the run.

    Args:
      value: JSON types; kilobytes rather than megabytes.
    """
    if _peers is None:
        return [value]
    return _peers.gather(value)


def stops_at(step: int, wanted: bool) -> bool:
    """Whether all processes stop after `step` steps; all call it once with every step.

    Args:
      wanted: whether this process has been asked to stop. One such process is enough; the answer
        turns to True on all of them at the same step, a second or two later.
    """
    return wanted if _peers is None else _peers.stops_at(step, wanted)


def of_main(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Process 0's arrays on all processes; shapes and dtypes are equal, integers fit in int32."""
    received = multihost_utils.broadcast_one_to_all(arrays)
    return {name: received[name].astype(array.dtype) for name, array in arrays.items()}


def check_started() -> None:
    """Raises ValueError if JAX has several processes that this module knows nothing of."""
    if jax.process_count() > 1 and _peers is None:
        raise ValueError(
            f"JAX has {jax.process_count()} processes that flip_jax did not start: call "
            "flip_jax.distributed.start() in place of jax.distributed.initialize()"
        )


def check_same(facts: Mapping[str, str]) -> None:
    """Compares facts about the processes by name.

    Raises:
      ValueError: one differs; the message says which, and what it is on which process. On all.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if len(set(gather(digest))) == 1:
        return
    everyone, names = gather(dict(facts)), gather(_peers.name)
    differences = []
    for fact in dict.fromkeys(name for one in everyone for name in one):
        holders: dict[str, list[str]] = {}
        for name, one in zip(names, everyone, strict=True):
            holders.setdefault(one.get(fact, "absent"), []).append(name)
        if len(holders) > 1:
            values = (f"{value} on {_few(who)}" for value, who in holders.items())
            differences.append(f"{fact} is {', but '.join(values)}")
    raise ValueError(
        f"the processes of this run differ: {'; '.join(differences)}. Start all of them with the "
        "same command, installation and data"
    )


def check_shared(folder: Path) -> None:
    """Makes the folder; all processes must see the same one.

    Raises:
      ValueError: some do not see what process 0 wrote there. On all.
      OSError: process 0 cannot write there.
    """
    if _peers is None:
        return
    marker = folder / f".shared-{gather(secrets.token_hex(4))[0]}"
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    gather(None)
    seen = gather([_peers.name, _appears(marker)])
    if is_main():
        marker.unlink()
    if blind := [name for name, sees in seen if not sees]:
        raise ValueError(
            f"workdir {folder}: {_few(blind)} cannot see what process 0 writes there; take a "
            "folder that all hosts share, under the same path"
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
