"""Processes that join: one dies, one never comes, and who is named in what time."""

import socket
import subprocess
import sys
import threading
import time

import pytest

from common.training import joining
from tests.commands import ROOT

PROGRAM = """
import sys
from common.training import joining

address, index, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
with joining.watched(address, index, 3, f"host{index}", seconds):
    print("here", flush=True)
    if sys.stdin.readline() == "fail\\n":  # what JAX does meanwhile
        raise OSError("cannot join")
print("joined", flush=True)
"""
SECONDS = 10  # from the death of one to the last exit, on a loaded machine


@pytest.fixture
def start():
    """Starts processes of one run by their indices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = min(probe.getsockname()[1], 65000)
    processes = []

    def start(*indices, seconds=60):
        started = []
        for index in indices:
            command = [sys.executable, "-c", PROGRAM, f"127.0.0.1:{port}", str(index), str(seconds)]
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
            )
            started.append(process)
        processes.extend(started)
        for process in started:
            assert process.stdout.readline() == "here\n"
        return started

    start.port = port
    yield start
    for process in processes:
        process.kill()
        process.communicate()


def said(process):
    """What a process that ends by itself says, with its exit status."""
    return process.wait(SECONDS), process.stderr.read()


def go(*processes, how=""):
    for process in processes:
        process.stdin.write(f"{how}\n")
        process.stdin.flush()


def test_the_death_of_one_ends_the_others_by_name(start):
    first, second, third = start(0, 1, 2)
    time.sleep(1)  # for all to be welcome
    second.kill()
    expected = (1, "error: process 1 (host1) is gone before all had joined\n")
    assert said(first) == expected and said(third) == expected


def test_the_death_of_the_coordinator_ends_the_others(start):
    first, second = start(0, 1)
    time.sleep(1)
    first.kill()
    status, error = said(second)
    assert status == 1 and "process 0 (127.0.0.1), which coordinates the run, is gone" in error


def test_one_that_never_comes_is_named(start):
    first, third = start(0, 2, seconds=8)
    where = f"not heard of at port {start.port + joining._OFFSET}: process 1"
    expected = (1, f"error: waited 8 s for all processes to join; {where}\n")
    assert said(first) == expected and said(third) == expected


def test_a_coordinator_that_never_comes_is_named(start):
    (second,) = start(1, seconds=2)
    where = f"process 0 (127.0.0.1) did not answer at port {start.port + joining._OFFSET}"
    assert said(second) == (1, f"error: waited 2 s for all processes to join; {where}\n")


def test_strangers_change_nothing(start):
    first, second = start(0, 1)
    port = start.port + joining._OFFSET
    time.sleep(1)  # until the second one is a member
    messages = (
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"index": 7, "host": "stranger"}\n',
        b'{"index": 1, "host": "stranger"}\n',
        b'{"index": Infinity, "host": "stranger"}\n',
        60_000 * b"[" + b"\n",
        100_000 * b"x",
    )
    for message in messages:
        with socket.create_connection(("127.0.0.1", port), 5) as stranger:
            stranger.sendall(message)
            time.sleep(0.3)
    assert first.poll() is None and second.poll() is None
    (third,) = start(2)
    for process in (first, second, third):
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(SECONDS) for process in (first, second, third)] == [0, 0, 0]


@pytest.mark.parametrize("failing", [0, 1])
def test_one_that_fails_to_join_ends_the_others(start, failing):
    processes = start(0, 1, 2)
    time.sleep(1)
    go(processes[failing], how="fail")
    assert "OSError: cannot join" in said(processes[failing])[1]
    for process in processes[:failing] + processes[failing + 1 :]:
        status, error = said(process)
        assert status == 1 and f"process {failing} (" in error and "is gone" in error


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_those_who_have_joined_go_their_way(start, order):
    processes = start(0, 1, 2)
    time.sleep(1)
    for index in order:
        go(processes[index])
        assert said(processes[index]) == (0, "")


def test_another_service_at_the_port_is_no_process_of_the_run(start):
    with socket.create_server(("127.0.0.1", start.port + joining._OFFSET)) as server:
        processes = start(0, 1)
        server.accept()[0].close()
        other = server.accept()[0]
        other.sendall(b"HTTP/1.1 400 Bad Request\n")
        go(*processes)
        assert [said(process) for process in processes] == [(0, ""), (0, "")]


def test_ports_stay_below_their_end(monkeypatch):
    ports = []
    monkeypatch.setattr(joining, "_Coordinator", lambda port, *_: ports.append(port) or Idle())
    for address in ("localhost:8476", "[::1]:65535"):
        with joining.watched(address, 0, 2, "host", 1.0):
            pass
    assert ports == [8476 + joining._OFFSET, 65535 - joining._OFFSET]


class Idle:
    """Watches nothing."""

    def __init__(self):
        self.ended = threading.Event()

    def run(self, deadline, seconds):
        del deadline, seconds
        return ""
