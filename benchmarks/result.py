"""The line of JSON that a benchmark ends with: what it found, where, and how to repeat it."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

_FIELDS = ("model name", "cpu family", "model")  # of a processor in Linux


def print_result(benchmark: str, **found: Any) -> None:
    """Prints `found` with the command, the processor, its cores and the load (processes that ran,
    mean of a minute)."""
    circumstances = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps({"benchmark": benchmark, **found, **circumstances}))


def processor() -> str:
    """Name, family and model, as Linux has them; the name alone of some machines says little."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    fields = [re.search(rf"^{name}\s*: (.*)$", text, re.M) for name in _FIELDS]
    if None in fields:
        return platform.processor() or platform.machine()
    name, family, model = (field[1] for field in fields)
    return f"{name}, family {family}, model {model}"
