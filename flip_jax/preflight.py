"""`python -m flip_jax.preflight --config configs/base.py ...`: may this run start on these hosts?

Started on every host, with the arguments that `flip_jax.main` will get. Process 0 prints the
findings. The checks, in order:

  1. All processes answer; those that do not are named.
  2. They agree on versions, commit, every config field, vocabulary, data and compiler flags.
  3. The workdir can be written and is one folder for all.
  4. JAX starts, all hosts have the same devices, and `config.mesh` fits them.
  5. A sum over all devices is right.

Exit status: 0 all is well; 1 a check failed; 2 a wrong option; 3 a process did not answer, ended or
hangs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import operator
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flip_jax import config
from flip_jax.config import Config
from flip_jax.main import parse
from flip_jax.place import find_place
from flip_jax.roll_call import Absent, RollCall

FAILED, WRONG, MISSING = 1, 2, 3
PACKAGES = (
    *("flip_jax", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "flax", "optax"),
    *("orbax-checkpoint", "grain", "array-record", "numpy", "transformers"),
)
# Hosts that compile different programs wait for each other for ever.
COMPILER_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64")
ROOT = Path(__file__).parent.parent
_POLL_SECONDS = 0.1
_MOST_NAMES = 8


class Failed(ValueError):
    """What is wrong, a line each."""


class _Hangs(Exception):
    pass


def check(cfg: Config, workdir: Path, call: RollCall) -> Iterator[str]:
    """Runs the checks; yields a line of findings after each.

    Raises:
      Absent: a process did not answer, went away or hangs.
      Failed: anything else is wrong; the same on all processes.
    """
    everyone = range(len(call.hosts))
    call.gather("start", None)
    yield f"processes: {', '.join(map(call.name, everyone))}"

    facts = _gather(call, "facts", lambda: host_facts(cfg))
    _demand(disagreements(facts, call))
    yield from _summary(facts[0])

    token = call.gather("folder", secrets.token_hex(4))[0]
    free = _shared_folder(workdir / f".preflight-{token}", call)
    yield f"{workdir} is one folder for all; free there: {free:.1f} GiB"

    found = _gather(call, "devices", lambda: _within(call.timeout, lambda: _start_jax(cfg)))
    _demand(disagreements(found, call))
    yield ", ".join(f"{name}: {value}" for name, value in found[0].items())

    sums = _gather(call, "sum", lambda: _within(call.timeout, lambda: sum_over_devices(cfg)))
    _demand(
        f"process {call.name(process)}: the sum over all devices is {total}, not {right}"
        for process, (total, right) in enumerate(sums)
        if total != right
    )
    yield "the sum over all devices is right"


def host_facts(cfg: Config) -> dict[str, str]:
    """What must be the same on all hosts, as text by name.

    Raises:
      ValueError, OSError, ImportError: vocabulary or data cannot be used here.
    """
    from flip_jax.run import load_tokenizer

    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        **{name: os.environ.get(name, "-") for name in COMPILER_VARIABLES},
        "commit": commit(),
        **{f"config.{name}": repr(value) for name, value in _fields(config.to_dict(cfg))},
        "vocabulary": load_tokenizer(cfg).vocab_hash,
        "data": _data_hash(cfg),
        **{f"content of config.{name}": _listing(name, path) for name, path in _starts(cfg)},
    }


def commit() -> str:
    """The git commit of this code, with `-dirty` if it was changed; `unknown` without git.

    `launch/tpu_setup.sh` copies the code without its repository and writes the file `.commit`.
    """
    file = ROOT / ".commit"
    if file.is_file():
        return file.read_text().strip()
    if not (ROOT / ".git").exists():
        return "unknown"
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *describe], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def disagreements(facts: Sequence[Mapping[str, str]], call: RollCall) -> list[str]:
    """A line for every fact that is not the same everywhere: who has which value."""
    lines = []
    for name in dict.fromkeys(name for one in facts for name in one):
        holders = _holders([one.get(name, "-") for one in facts])
        if len(holders) > 1:
            values = "; ".join(f"{value} on {_names(who, call)}" for value, who in holders.items())
            lines.append(f"{name} differs: {values}")
    return lines


def sum_over_devices(cfg: Config) -> tuple[int, int]:
    """Adds 1, 2 ... N, a number of each device of the mesh; returns (sum, what it must be)."""
    import jax
    import numpy as np
    from jax.sharding import PartitionSpec as P

    from flip_jax import partition

    mesh = partition.make_mesh(cfg.mesh)
    axes, numbers = mesh.axis_names, np.arange(1, mesh.size + 1, dtype=np.int32)
    on_devices = jax.make_array_from_callback(
        numbers.shape, partition.batch_sharding(mesh), lambda index: numbers[index]
    )
    add = jax.shard_map(
        lambda number: jax.lax.psum(number, axes), mesh=mesh, in_specs=P(axes), out_specs=P()
    )
    return int(jax.jit(add)(on_devices)[0]), int(numbers.sum())


def _start_jax(cfg: Config) -> dict[str, str]:
    import jax

    from flip_jax import distributed, partition

    distributed.start()
    local = jax.local_devices()
    mesh = partition.make_mesh(cfg.mesh)
    return {
        "processes of JAX": str(jax.process_count()),
        "devices of each": f"{len(local)} x {local[0].device_kind}",
        "mesh": " x ".join(f"{name} {size}" for name, size in mesh.shape.items()),
    }


def _shared_folder(folder: Path, call: RollCall) -> float:
    """Every process writes a file and waits to see all others'; returns the free GiB there."""

    def write() -> float:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(call.place.process)).touch()
        return shutil.disk_usage(folder).free / 2**30

    def unseen() -> list[int]:
        # A network file system may show what others wrote only when its cache expires.
        deadline = time.monotonic() + call.timeout
        missing = list(range(len(call.hosts)))
        while missing and time.monotonic() < deadline:
            missing = [process for process in missing if not (folder / str(process)).exists()]
            time.sleep(_POLL_SECONDS if missing else 0)
        return missing

    try:
        free = _gather(call, "write to the workdir", write)
        blind = _gather(call, "read the workdir", unseen)
    finally:
        if call.place.process == 0:
            shutil.rmtree(folder, ignore_errors=True)
    _demand(
        f"--workdir={folder.parent}: process {call.name(process)} does not see what process "
        f"{_names(missing, call)} wrote; take a folder that all hosts mount"
        for process, missing in enumerate(blind)
        if missing
    )
    return min(free)


def _gather(call: RollCall, stage: str, work: Callable[[], Any]) -> list[Any]:
    """Every process's result of `work`.

    Raises:
      Absent: a process hangs in it, or does not answer.
      Failed: it raised an error somewhere.
    """
    report: dict[str, Any] = {}
    try:
        report["result"] = work()
    except _Hangs:
        report["hangs"] = True
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # JAX raises RuntimeError
        report["error"] = f"{type(error).__name__}: {error}"
    reports = call.gather(stage, report)
    if hanging := [process for process, one in enumerate(reports) if "hangs" in one]:
        raise Absent(
            f"stage {stage!r} did not end within {call.timeout:g} s on process "
            f"{_names(hanging, call)}, though all began it: no connection between hosts, or "
            "devices that another program holds"
        )
    errors = _holders([one.get("error", "") for one in reports])
    _demand(f"process {_names(who, call)}: {text}" for text, who in errors.items() if text)
    return [one["result"] for one in reports]


def _demand(wrong: Iterator[str] | Sequence[str]) -> None:
    if lines := list(wrong):
        raise Failed("\n".join(lines))


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """`work()` in a thread of its own, which stays if it takes longer.

    Raises:
      _Hangs: it takes longer.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise _Hangs
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _holders(values: Sequence[str]) -> dict[str, list[int]]:
    """Processes by value."""
    holders: dict[str, list[int]] = {}
    for process, value in enumerate(values):
        holders.setdefault(value, []).append(process)
    return holders


def _names(processes: Sequence[int], call: RollCall) -> str:
    names = [call.name(process) for process in processes[:_MOST_NAMES]]
    more = len(processes) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _fields(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _starts(cfg: Config) -> Iterator[tuple[str, str]]:
    """Fields that name weights to start from."""
    for name in ("init.checkpoint", "init.vision", "init.text", "loss.mim_tokenizer"):
        if path := operator.attrgetter(name)(cfg):
            yield name, path


def _listing(name: str, path: str) -> str:
    """A digest of the names and sizes of the files at `path`."""
    found = Path(path)
    if not found.exists():
        raise FileNotFoundError(f"config.{name}={path} does not exist")
    files = sorted(found.rglob("*")) if found.is_dir() else [found]
    sizes = [(file.relative_to(found).as_posix(), file.stat().st_size) for file in files]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]


def _data_hash(cfg: Config) -> str:
    if cfg.data.path is None:
        return "drawn by the run"
    from flip_jax.data.records import RecordSource

    RecordSource(cfg.data.path, cfg.data.eval_split)
    return RecordSource(cfg.data.path, cfg.data.train_split).manifest_hash


def _summary(facts: Mapping[str, str]) -> Iterator[str]:
    versions = [f"{name} {facts[name]}" for name in ("python", *PACKAGES) if facts[name] != "-"]
    yield ", ".join(versions)
    fields = sorted((name, value) for name, value in facts.items() if name.startswith("config."))
    digest = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    yield f"commit {facts['commit']}"
    yield f"config {digest[:16]}, vocabulary {facts['vocabulary'][:16]}, data {facts['data'][:16]}"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be a finite number above 0")
    return seconds


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; see the top of the file."""
    parser = argparse.ArgumentParser(
        "python -m flip_jax.preflight",
        description="Check on every host of a run, before it, that it may start.",
        epilog="All other arguments are those of python -m flip_jax.main.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--timeout", type=_seconds, default=60, help="seconds to wait for the slowest process"
    )
    args, rest = parser.parse_known_args(argv)
    try:
        cfg, workdir, _ = parse(rest)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    try:
        with RollCall(find_place(os.environ), socket.gethostname(), args.timeout) as call:
            for line in check(cfg, workdir, call):
                if call.place.process == 0:
                    print(line, flush=True)
    except Absent as error:
        print(f"error: {error}", file=sys.stderr)
        return MISSING
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    if call.place.process == 0:
        print("preflight: all is well")
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        # Whatever still hangs in JAX would keep the process, and its exit waits for all others.
        os._exit(status)
    sys.exit(status)
