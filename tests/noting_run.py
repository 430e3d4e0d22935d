"""`flip_jax.main` that notes the records it trains on, and may fail on the way.

Variables: NOTES, a folder; FAULT, `NAME:PROCESS:STEP`, see `_fail`; PAUSE, seconds at each step, as
toy steps are done before anybody can ask for a stop.
"""

import errno
import json
import logging
import os
import sys
import time
from pathlib import Path

from flip_jax import main

# As `main` has it, before imports that only it does later bring handlers of their own.
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)

from flip_jax.data.records import BadRecord, RecordSource  # noqa: E402
from flip_jax.metrics import MetricsWriter  # noqa: E402
from flip_jax.run import Run  # noqa: E402

PROCESS = int(os.environ.get("FLIP_JAX_PROCESS", "0"))
to_devices, batches_used = Run.to_devices, 0


def noted(run, batch):
    global batches_used
    batches_used += 1
    if folder := os.environ.get("NOTES"):
        with (Path(folder) / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(batch["index"].tolist()) + "\n")
    name, process, step = os.environ.get("FAULT", "none:-1:-1").split(":")
    if int(process) == PROCESS and int(step) == batches_used:
        _fail(name)
    time.sleep(float(os.environ.get("PAUSE", "0")))
    return to_devices(run, batch)


def _fail(name):
    if name == "records":

        def damaged(source, number):
            raise BadRecord(f"{source.where(number)}: damaged")

        RecordSource.__getitem__ = damaged
    if name == "disk":

        def full(writer, step, values):
            raise OSError(errno.ENOSPC, "No space left on device")

        MetricsWriter.write = full
    if name == "bug":
        raise KeyError("a mistake in the code")


if __name__ == "__main__":
    Run.to_devices = noted
    sys.exit(main.main())
