"""Runs of several processes on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent
VARIABLES = ("COORDINATOR", "PROCESSES", "PROCESS", "DISTRIBUTED", "TIMEOUT", "CPU_DEVICES")


class Processes:
    """The processes of one run, each started as `python ARGUMENTS`. A context manager.

    Args:
      count: how many; 0 = one that knows of no others.
      devices: of each.
      arguments: of each, or a function from its number to them.
      variables: of the environment, more than the usual.
    """

    def __init__(self, count, arguments, devices=1, **variables):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.children = []
        for process in range(max(count, 1)):
            env = {n: v for n, v in os.environ.items() if not n.startswith("FLIP_JAX_")}
            env |= {"FLIP_JAX_CPU_DEVICES": str(devices), "FLIP_JAX_TIMEOUT": "120"}
            env |= {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "PYTHONUNBUFFERED": "1"}
            if count:
                env["FLIP_JAX_COORDINATOR"] = f"localhost:{port}"
                env |= {"FLIP_JAX_PROCESSES": str(count), "FLIP_JAX_PROCESS": str(process)}
            own = arguments(process) if callable(arguments) else arguments
            self.children.append(
                subprocess.Popen(
                    [sys.executable, *map(str, own)],
                    env=env | variables,
                    cwd=TESTS.parent,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for child in self.children:
            child.kill()
            child.wait()
            child.stdout.close()

    def kill(self, *which, how=signal.SIGKILL):
        for process in which:
            self.children[process].send_signal(how)

    def results(self, timeout=300):
        """(exit status, output) of each; where one hangs, an error that shows what all said."""
        outputs = []
        for child in self.children:
            try:
                outputs.append(child.communicate(timeout=timeout)[0])
            except subprocess.TimeoutExpired:
                codes = [one.poll() for one in self.children]
                self.kill(*range(len(self.children)))
                outputs += [one.communicate()[0] for one in self.children[len(outputs) :]]
                raise AssertionError(f"after {timeout} s: {codes}, {outputs}") from None
        return [(c.returncode, text) for c, text in zip(self.children, outputs, strict=True)]

    def wait_for_step(self, workdir, step):
        """Until the run's log holds `step` or more."""
        path = Path(workdir) / "metrics.jsonl"
        while all(child.poll() is None for child in self.children):
            lines = path.read_text().splitlines() if path.exists() else []
            if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
                return
            time.sleep(0.05)
        raise AssertionError(f"ended before step {step}: {self.results()}")

    def wait_for_checkpoint(self, workdir, step):
        """Until the checkpoint of `step` is complete."""
        path = Path(workdir) / "checkpoints" / str(step) / "commit_success.txt"
        while not path.exists():
            if any(child.poll() is not None for child in self.children):
                raise AssertionError(f"ended before checkpoint {step}: {self.results()}")
            time.sleep(0.05)
