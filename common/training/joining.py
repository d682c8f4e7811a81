"""The processes of a run watch one another until all have joined, which JAX leaves to a timeout.

JAX's coordination service does not miss a process that dies before all have joined: the others
wait for minutes and abort without a name. So beside it process 0 listens at a port of its own, and
each process keeps a connection there until it has joined:

    process I to 0      {"index": I, "host": NAME}, later "joined"
    process 0 to I      "welcome", later "joined", or what ends the run

A connection that breaks before "joined" ends all. A process that never comes is known by the time
alone, and named then. Where the port cannot be had or reached nothing is noticed before the time is
up, and JAX's own joining goes on. Like JAX's port it is for a network that is trusted: who knows
the messages can end the run.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from typing import Any

from common.io.endings import say_error

_OFFSET = 313  # from the coordinator's port to this one
_RETRY_SECONDS = 0.5
_LOOK_SECONDS = 0.1
_CONNECT_SECONDS = 5.0
_LONGEST = 4096  # bytes of a line
_WELCOME, _JOINED = "welcome", "joined"


@contextlib.contextmanager
def watched(
    address: str,
    index: int,
    count: int,
    host: str,
    seconds: float,
    end: Callable[[int], Any] = os._exit,
) -> Iterator[None]:
    """Watches the processes while the block joins them; ends this one where that cannot succeed.

    Args:
      address: of the coordinator, host:port.
      index: of this process.
      count: of all processes.
      host: name of this machine.
      seconds: that all of them may take.
      end: ends this process at once.
    """
    name, number = address.rsplit(":", 1)
    port = int(number) + (_OFFSET if int(number) + _OFFSET < 1 << 16 else -_OFFSET)
    watch = _Coordinator(port, count, host) if index == 0 else _Member(name, port, index, host)

    def run() -> None:
        if text := watch.run(time.monotonic() + seconds, seconds):
            say_error(text)
            end(1)

    thread = threading.Thread(target=run, name="joining", daemon=True)
    thread.start()
    try:
        yield
        watch.well = True
    finally:
        watch.ended.set()
        thread.join(2 * _CONNECT_SECONDS)


class _Line:
    """A connection, read line by line."""

    def __init__(self, connection: socket.socket):
        self.connection, self._buffer = connection, b""
        connection.setblocking(False)

    def read(self) -> list[str] | None:
        """The lines that have come; None: the other side is gone."""
        try:
            data = self.connection.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data or len(self._buffer) > _LONGEST:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # of one that is gone, which reading tells
            self.connection.sendall(text.encode() + b"\n")


class _Coordinator:
    """Process 0's side."""

    def __init__(self, port: int, count: int, host: str):
        self.ended, self.well = threading.Event(), False
        self._port, self._count = port, count
        self._hosts = {0: host}
        self._members: dict[int, _Line] = {}
        self._strangers: list[_Line] = []

    def run(self, deadline: float, seconds: float) -> str:
        """Watches until the block ends; returns what ends the run, or ""."""
        try:
            server = socket.create_server(
                ("", self._port),
                family=socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET,
                dualstack_ipv6=socket.has_dualstack_ipv6(),
                backlog=self._count,
            )
        except OSError:
            return ""
        text = ""
        with server:
            server.setblocking(False)
            while not text and not self.ended.is_set():
                text = self._look(server)
                if not text and time.monotonic() > deadline:
                    text = self._absent(seconds)
        for line in self._members.values():
            if text or self.well:
                line.write(text or _JOINED)
            line.connection.close()
        for line in self._strangers:
            line.connection.close()
        return text

    def _look(self, server: socket.socket) -> str:
        """Hears what has come; returns what ends the run, or ""."""
        lines = [*self._members.values(), *self._strangers]
        ready = wait([server, *(x.connection for x in lines)], _LOOK_SECONDS)
        if server in ready:
            with contextlib.suppress(OSError):
                self._strangers.append(_Line(server.accept()[0]))
        for index, line in list(self._members.items()):
            if line.connection in ready:
                heard = line.read()
                if heard is None:
                    return f"process {index} ({self._hosts[index]}) is gone before all had joined"
                if _JOINED in heard:
                    self._members.pop(index).connection.close()
        for line in [x for x in self._strangers if x.connection in ready]:
            self._welcome(line)
        return ""

    def _welcome(self, line: _Line) -> None:
        """Makes a member of a process that says who it is."""
        heard = line.read()
        if heard == []:
            return
        self._strangers.remove(line)
        try:
            record = json.loads((heard or [""])[0])
            index, host = int(record["index"]), str(record["host"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            index = -1
        if not 0 < index < self._count or index in self._members:
            line.connection.close()
            return
        self._hosts[index], self._members[index] = host, line
        line.write(_WELCOME)

    def _absent(self, seconds: float) -> str:
        absent = [f"process {i}" for i in range(self._count) if i not in self._hosts]
        shown = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if absent[8:] else "")
        where = f"not heard of at port {self._port}: {shown or 'none'}"
        return f"waited {seconds:.0f} s for all processes to join; {where}"


class _Member:
    """The side of all other processes."""

    def __init__(self, leader: str, port: int, index: int, host: str):
        self.ended, self.well = threading.Event(), False
        self._leader, self._port = leader.strip("[]"), port
        self._hello = json.dumps({"index": index, "host": host})

    def run(self, deadline: float, seconds: float) -> str:
        """As `_Coordinator.run`."""
        while not self.ended.is_set():
            try:
                connection = socket.create_connection((self._leader, self._port), _CONNECT_SECONDS)
            except OSError:  # not there yet, or never
                connection = None
            if connection is not None:
                with connection:
                    text = self._listen(_Line(connection), deadline)
                if text is not None:
                    return text
            if time.monotonic() > deadline:
                return (
                    f"waited {seconds:.0f} s for all processes to join; process 0 "
                    f"({self._leader}) did not answer at port {self._port}"
                )
            self.ended.wait(_RETRY_SECONDS)
        return ""

    def _listen(self, line: _Line, deadline: float) -> str | None:
        """What ends the run, "" when all have joined; None: the other side is not process 0."""
        line.write(self._hello)
        welcome = False
        while not self.ended.is_set():
            heard = line.read() if wait([line.connection], _LOOK_SECONDS) else []
            if heard is None:
                leader = f"process 0 ({self._leader}), which coordinates the run,"
                return f"{leader} is gone before all had joined" if welcome else None
            for text in heard:
                if text == _JOINED:
                    return ""
                if welcome:
                    return text
                if text != _WELCOME:
                    return None
                welcome = True
            if not welcome and time.monotonic() > deadline:
                return None
        if self.well:
            line.write(_JOINED)
        return ""
