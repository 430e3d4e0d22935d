"""A process's connection to the others of its run, through the coordinator of JAX in process 0.

Small values go through its key-value store. That needs no device, so it works while the devices
wait for each other, and does not wait for them. A thread in each process looks there once a second
for what concerns all:

    A wish to stop. The threads agree on a step that no process has passed yet.
    A failure. A process that meets an error leaves the reason there before it ends. The others are
      told and end, too, though they may be waiting for its devices, which nothing can interrupt.

A process that is killed leaves no reason. On CPU the next exchange between devices fails at once;
anywhere, JAX ends the others when nothing was heard of it for a minute.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax

from flip_jax.place import Place

# Errors whose message says what the user can do; of any other the traceback is shown.
EXPECTED_ERRORS = (ValueError, OSError, FloatingPointError)

_HEARTBEAT_SECONDS = 60  # after which a silent process counts as dead
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 3.0  # in which a process may end by itself after another has failed
_LEAVE_SECONDS = 10.0  # for which process 0, with the store, waits for the others to leave
_EXIT_SECONDS = 1.0  # more, as JAX aborts a process that has said it leaves and is not gone yet
_WEEK_MS = 7 * 24 * 3600 * 1000  # waiting ends with a failure or a dead process, not by the clock
_FAILED, _STOP = "failed", "stop"  # names of notices
_STATUS = re.compile(r"[A-Z_]+: ")

_log = logging.getLogger(__name__)


class Peers:
    """The connection; made once, before anything touches a device.

    Args:
      place: of this process.
      patience: seconds to wait for the others.

    Raises:
      OSError: process 0 does not answer, or cannot listen. If others do not come, a message says so
        and the process ends.
    """

    def __init__(self, place: Place, patience: float):
        self.process, self.count = place.process, place.processes
        self.name = f"process {place.process} ({socket.gethostname()})"
        self._client = _connect(place, patience)
        self._gathered = 0
        self._lock = threading.Lock()  # of the next two
        self._step = -1  # the last one of which the loop asked whether to stop
        self._stop_step: int | None = None
        self._ending, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._watch, name="flip_jax peers", daemon=True).start()

    def gather(self, value: Any) -> list[Any]:
        number, self._gathered = self._gathered, self._gathered + 1
        values = self._exchange(f"gather/{number}", value)
        # All have come here, so all have read the values before these.
        self._client.key_value_delete(_key("gather", number - 1, self.process))
        return values

    def stops_at(self, step: int, wanted: bool) -> bool:
        if wanted:
            self._leave_notice(_STOP, self.name)
        with self._lock:
            self._step = step
            return self._stop_step is not None and step >= self._stop_step

    def close(self) -> None:
        self._closed.set()

    def end(self, error: BaseException | None = None) -> NoReturn:
        """Ends the process with status 1.

        Args:
          error: the reason, which the others get to know; None = another process has failed.
        """
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # the other thread ends the process
        cause = self._cause(_GRACE_SECONDS if _may_be_echo(error) else 0.0)
        if cause is None:
            cause = f"{self.name}: {_reason(error)}"
            self._leave_notice(_FAILED, cause)
            if not isinstance(error, EXPECTED_ERRORS):
                traceback.print_exception(error)
        print(f"error: {cause}", file=sys.stderr, flush=True)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(_key("left", self.process), "")
            if self.process == 0:
                self._see_others_off()
        _exit()

    def _cause(self, patience: float) -> str | None:
        """Why another process has failed; None if none says so within `patience` seconds."""
        deadline = time.monotonic() + patience
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while (cause := self._notices().get(_FAILED)) is None and time.monotonic() < deadline:
                time.sleep(0.1)
            return cause
        return None

    def _see_others_off(self) -> None:
        deadline = time.monotonic() + _LEAVE_SECONDS
        while len(self._client.key_value_dir_get(_key("left", ""))) < self.count:
            if time.monotonic() > deadline:
                return
            time.sleep(0.1)
        time.sleep(_EXIT_SECONDS)

    def _watch(self) -> None:
        # Without process 0 there is nothing to read, and JAX ends this process.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while not self._closed.wait(_POLL_SECONDS):
                notices = self._notices()
                if _FAILED in notices:
                    time.sleep(_GRACE_SECONDS)
                    self.end()
                if _STOP in notices and self._stop_step is None:
                    self._agree_where_to_stop(notices[_STOP])

    def _agree_where_to_stop(self, who: str) -> None:
        with self._lock:  # until all have said where they are, nobody's loop goes on
            self._stop_step = max(self._exchange("stop", self._step)) + 1
        if self.process == 0:
            _log.info("%s was asked to stop: all do", who)

    def _exchange(self, stage: str, value: Any) -> list[Any]:
        self._client.key_value_set(_key(stage, self.process), json.dumps(value))
        self._client.wait_at_barrier(_key(stage), _WEEK_MS)
        found = self._client.key_value_dir_get(_key(stage, ""))
        values = {int(key.rpartition("/")[2]): json.loads(text) for key, text in found}
        return [values[process] for process in range(self.count)]

    def _leave_notice(self, name: str, text: str) -> None:
        # It fails where there is one already, and where the coordinator is gone.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(_key("notice", name), text)

    def _notices(self) -> dict[str, str]:
        found = self._client.key_value_dir_get(_key("notice", ""))
        return {key.rpartition("/")[2]: text for key, text in found}


def _key(*parts: Any) -> str:
    return "/".join(("flip_jax", *map(str, parts)))


def _may_be_echo(error: BaseException | None) -> bool:
    """Whether it comes from JAX, where another process's failure shows first."""
    while error is not None:
        # JAX raises ValueError, too, with the name of a status: `UNKNOWN: Gloo AllGather failed`.
        if isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: BaseException) -> str:
    text = str(error) if isinstance(error, EXPECTED_ERRORS) else f"{type(error).__name__}: {error}"
    if _may_be_echo(error):
        text += "\nIf another process was killed, its output or the scheduler says why"
    return text


def _connect(place: Place, patience: float) -> Any:
    """Starts JAX's coordinator in process 0 and connects to it; returns its client."""
    from jax._src import distributed  # the key-value store has no public name

    host, _, port = place.coordinator.rpartition(":")
    if place.process:
        _wait_for(host.strip("[]"), int(port), patience)
    else:
        _check_free(int(port))

    # JAX itself would abort with a stack trace that names nobody.
    def give_up() -> None:
        print(
            f"error: process {place.process}: not all {place.processes} processes came to "
            f"{place.coordinator} within {patience:g} s. Start all of them, see the output of "
            "those that ended, or set FLIP_JAX_TIMEOUT to more seconds",
            file=sys.stderr,
        )
        _exit()

    alarm = threading.Timer(patience, give_up)
    alarm.daemon = True
    alarm.start()
    # Its handler would swallow SIGTERM from here on, also where nobody asks for it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            place.local_devices,
            # Else JAX would take SLURM's word for a single GPU, whatever the place says.
            cluster_detection_method="deactivate",
            initialization_timeout=int(2 * patience),  # the alarm comes before
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except RuntimeError as error:
        raise OSError(
            f"process {place.process} cannot take part in the run at {place.coordinator}: {error}"
        ) from error
    finally:
        alarm.cancel()
    return distributed.global_state.client


def _wait_for(host: str, port: int, patience: float) -> None:
    """Until process 0 listens there."""
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise OSError(
                    f"process 0 does not answer at {host}, port {port}, within {patience:g} s "
                    f"({error}): it is not started, FLIP_JAX_COORDINATOR names another address, "
                    "or a firewall closes the port"
                ) from error
        time.sleep(0.2)


def _check_free(port: int) -> None:
    """JAX's coordinator may crash where it cannot listen."""
    both = socket.has_dualstack_ipv6()  # else IPv4 alone
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        reason = os.strerror(error.errno)
        raise OSError(
            f"process 0 cannot listen at port {port} ({reason}): end what uses it, or set "
            "FLIP_JAX_COORDINATOR to another port for all processes"
        ) from error


def _exit() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
