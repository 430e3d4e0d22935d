"""Where a process stands among those of its run, by the variables of the environment.

A run of one process needs none of them:

    FLIP_JAX_COORDINATOR   host:port at which process 0 listens for the others
    FLIP_JAX_PROCESSES     how many processes there are
    FLIP_JAX_PROCESS       the number of this one, from 0
    FLIP_JAX_DISTRIBUTED   `auto` in place of these three: JAX asks the cluster it finds (Cloud
                           TPU, SLURM, Open MPI, Kubernetes)
    FLIP_JAX_TIMEOUT       seconds to wait for the others at the start, 5 or more; by default 300
    FLIP_JAX_CPU_DEVICES   as how many devices the CPU of this process counts; for trying out
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PLACE_VARIABLES = ("FLIP_JAX_COORDINATOR", "FLIP_JAX_PROCESSES", "FLIP_JAX_PROCESS")
_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Place:
    """Where a process stands in its run."""

    coordinator: str  # host:port
    processes: int
    process: int
    # Devices it may use, by their number on the host; None = all. Clusters with a process for each
    # GPU name one.
    local_devices: Sequence[int] | None = None


def find_place(environ: Mapping[str, str]) -> Place | None:
    """The place that the variables name; None = the only process.

    Raises:
      ValueError: they are incomplete, contradict each other or have bad values; or JAX finds no
        cluster.
    """
    given = {name: environ.get(name, "") for name in PLACE_VARIABLES}
    method = environ.get("FLIP_JAX_DISTRIBUTED", "")
    if method not in ("", "auto"):
        raise ValueError(f"FLIP_JAX_DISTRIBUTED={method}: must be auto, or not set")
    if method and any(given.values()):
        raise ValueError(
            f"FLIP_JAX_DISTRIBUTED=auto and {', '.join(n for n in given if given[n])} are set: "
            "remove one or the other"
        )
    if method:
        return _ask_cluster(environ)
    if not any(given.values()):
        return None
    if missing := [name for name in given if not given[name]]:
        raise ValueError(
            f"{', '.join(missing)} not set: a run of several processes needs all of "
            f"{', '.join(PLACE_VARIABLES)}, or FLIP_JAX_DISTRIBUTED=auto"
        )
    coordinator = given["FLIP_JAX_COORDINATOR"]
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"FLIP_JAX_COORDINATOR={coordinator}: must be host:port of process 0, for example "
            "10.0.0.1:8476"
        )
    processes = _whole_number(environ, "FLIP_JAX_PROCESSES", 1)
    process = _whole_number(environ, "FLIP_JAX_PROCESS", 0)
    if process >= processes:
        raise ValueError(
            f"FLIP_JAX_PROCESS={process}: must be 0 to {processes - 1}, as "
            f"FLIP_JAX_PROCESSES={processes}"
        )
    return Place(coordinator, processes, process)


def timeout(environ: Mapping[str, str]) -> float:
    """Seconds to wait for the others at the start.

    Raises:
      ValueError: FLIP_JAX_TIMEOUT is not such a number.
    """
    text = environ.get("FLIP_JAX_TIMEOUT", "")
    try:
        seconds = float(text) if text else _TIMEOUT_SECONDS
    except ValueError:
        seconds = 0.0
    if not 5 <= seconds < 1e6:
        raise ValueError(f"FLIP_JAX_TIMEOUT={text}: must be a number of seconds, at least 5")
    return seconds


def cpu_devices(environ: Mapping[str, str]) -> int | None:
    """As how many devices the CPU is to count; None = as JAX has it.

    Raises:
      ValueError: FLIP_JAX_CPU_DEVICES is not such a number.
    """
    name = "FLIP_JAX_CPU_DEVICES"
    return _whole_number(environ, name, 1) if environ.get(name) else None


def _ask_cluster(environ: Mapping[str, str]) -> Place:
    # JAX has no public function for what its `initialize` finds.
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, int(timeout(environ))
    )
    if None in found[:3]:
        raise ValueError(
            "FLIP_JAX_DISTRIBUTED=auto: JAX finds no cluster here; set "
            f"{', '.join(PLACE_VARIABLES)} instead"
        )
    return Place(*found)


def _whole_number(environ: Mapping[str, str], name: str, least: int) -> int:
    text = environ[name]
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}={text}: must be a whole number from {least} on")
    return int(text)
