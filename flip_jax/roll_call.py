"""Who is there: processes report to process 0 over TCP, before JAX connects them.

`jax.distributed.initialize` waits for all processes and, if one is missing, ends the others with a
C++ stack trace that names nobody. A roll call before it says who answered and who did not.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from typing import Any

from flip_jax.place import Place

_RETRY_SECONDS = 0.2
_MARGIN_SECONDS = 10  # process 0 may have begun to wait later than the others
_LINE_LIMIT = 1 << 22  # bytes; a report is a few thousand


class Absent(OSError):
    """Processes did not answer, or do not belong to one run; the message names them."""


class RollCall:
    """Gathers one value of each process, stage by stage. A context manager.

    Process 0 listens at the port below JAX's, the others connect to it. All processes call `gather`
    with the same stages in the same order.

    Args:
      place: of this process; None = the only one, which needs no network.
      host: the name of this machine, for messages.
      timeout: seconds to wait for the slowest process of a stage.

    Attributes:
      hosts: names of the machines by process; of those not heard of, "not seen".
    """

    def __init__(self, place: Place | None, host: str, timeout: float):
        self.place = place or Place("", 1, 0)
        self.timeout = timeout
        self.hosts = ["not seen"] * self.place.processes
        self.hosts[self.place.process] = host
        self._lines: list[_Line] = []  # process 0: to all others; else: to process 0
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Where process 0 listens: host, port."""
        host, _, port = self.place.coordinator.rpartition(":")
        return host.strip("[]"), int(port) - 1

    def __enter__(self) -> RollCall:
        if self.place.process == 0 and self.place.processes > 1:
            self._listener = _listen(self.address[1])
            self._selector.register(self._listener, selectors.EVENT_READ)
        return self

    def __exit__(self, *_: object) -> None:
        for line in self._lines:
            line.close()
        if self._listener is not None:
            self._listener.close()
        self._selector.close()

    def name(self, process: int) -> str:
        """`1 host-b`."""
        return f"{process} {self.hosts[process]}"

    def gather(self, stage: str, value: Any) -> list[Any]:
        """Every process's value of a stage, in order of the processes.

        Args:
          value: of this process; JSON.

        Raises:
          Absent: a process did not answer within the timeout, went away, or is not of this run.
        """
        if self.place.process == 0:
            return self._collect(stage, value)
        if not self._lines:
            self._lines.append(self._connect())
        answer = None
        with contextlib.suppress(OSError):
            host = self.hosts[self.place.process]
            self._lines[0].send([self.place.process, self.place.processes, host, stage, value])
            answer = self._lines[0].wait(self.timeout + _MARGIN_SECONDS)
        if answer is None:
            raise Absent(f"process 0 at {self.place.coordinator} went away at stage {stage!r}")
        if "error" in answer:
            raise Absent(answer["error"])
        self.hosts = answer["hosts"]
        return answer["values"]

    def _connect(self) -> _Line:
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                return _Line(socket.create_connection(self.address, timeout=5))
            except OSError as error:
                if time.monotonic() < deadline:
                    time.sleep(_RETRY_SECONDS)
                    continue
                host, port = self.address
                raise Absent(
                    f"process 0 of {self.place.processes} (not seen) did not answer at {host} port "
                    f"{port} within {self.timeout:g} s ({error.strerror or error}): it is not "
                    "started, the address is another, or a firewall closes the port"
                ) from error

    def _collect(self, stage: str, value: Any) -> list[Any]:
        values, everyone = {0: value}, range(self.place.processes)
        answer: dict[str, Any] = {"error": "process 0 was interrupted"}
        deadline = time.monotonic() + self.timeout
        try:
            while len(values) < len(everyone):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise Absent(self._who_is_missing(stage, values))
                for key, _ in self._selector.select(left):
                    if key.fileobj is self._listener:
                        connection, _ = self._listener.accept()
                        self._lines.append(_Line(connection))
                        self._selector.register(connection, selectors.EVENT_READ, self._lines[-1])
                    else:
                        self._read(key.data, stage, values)
            answer = {"values": [values[process] for process in everyone], "hosts": self.hosts}
        except Absent as error:
            answer = {"error": str(error)}
            raise
        finally:
            for line in self._lines:
                with contextlib.suppress(OSError):  # the next stage notices who has gone
                    line.send(answer)
        return answer["values"]

    def _read(self, line: _Line, stage: str, values: dict[int, Any]) -> None:
        try:
            message = line.read()
            if message is None:
                return
            process, processes, host, theirs, value = message
        except (OSError, ValueError, TypeError):
            self._drop(line, stage)
            return
        if any(other.process == process for other in self._lines if other is not line):
            raise Absent(
                f"two processes say they are process {process}: on {self.hosts[process]} and on "
                f"{host}; each needs a number of its own"
            )
        if processes != len(self.hosts) or process not in range(1, processes) or theirs != stage:
            raise Absent(
                f"process {process} of {processes} on {host} is at stage {theirs!r}, process 0 of "
                f"{len(self.hosts)} on {self.hosts[0]} at {stage!r}; start all by one command"
            )
        line.process, self.hosts[process], values[process] = process, host, value

    def _drop(self, line: _Line, stage: str) -> None:
        """Ends a connection that closed or speaks another language."""
        self._selector.unregister(line.connection)
        self._lines.remove(line)
        line.close()
        if line.process is not None:
            raise Absent(
                f"process {line.process} of {len(self.hosts)} ({self.hosts[line.process]}) ended "
                f"before stage {stage!r}; see its output"
            )

    def _who_is_missing(self, stage: str, values: dict[int, Any]) -> str:
        missing = ", ".join(
            f"process {process} of {len(self.hosts)} ({host})"
            for process, host in enumerate(self.hosts)
            if process not in values
        )
        return (
            f"{missing} did not answer within {self.timeout:g} s at stage {stage!r}; processes "
            f"seen: {', '.join(self.name(process) for process in sorted(values))}"
        )


class _Line:
    """One JSON value per line over a connection."""

    def __init__(self, connection: socket.socket):
        self.connection, self.process, self._buffer = connection, None, b""

    def send(self, value: Any) -> None:
        self.connection.settimeout(_MARGIN_SECONDS)
        self.connection.sendall(json.dumps(value).encode() + b"\n")

    def read(self) -> Any:
        """The next value, once all of its line is here; None before.

        Raises:
          ValueError: not JSON, or too long.
          OSError: the connection is closed.
        """
        data = self.connection.recv(1 << 16)
        if not data:
            raise ConnectionResetError("closed")
        self._buffer += data
        if len(self._buffer) > _LINE_LIMIT:
            raise ValueError("line too long")
        return self._take()

    def wait(self, timeout: float) -> Any:
        """The next value, within `timeout` seconds.

        Raises:
          OSError: the connection is closed, or the time is over.
        """
        self.connection.settimeout(timeout)
        # Process 0 may have answered two stages at once, the second with an error.
        value = self._take()
        while value is None:
            value = self.read()
        return value

    def _take(self) -> Any:
        if b"\n" not in self._buffer:
            return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        self.connection.close()


def _listen(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)
    except OSError as error:
        raise Absent(
            f"process 0 cannot listen at port {port}, the one below the coordinator's: "
            f"{error.strerror or error}; end what uses it or take another port"
        ) from error
