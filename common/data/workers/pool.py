"""Starts the worker processes of a loader, gives them slots, and ends them."""

import contextlib
import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import common
from common.data import remote
from common.data.workers import handover, wire
from common.data.workers.blocks import Block, Blocks
from common.data.workers.sinks import replay
from common.io.errors import UserError
from common.io.parallel import usable_cores

_CORES = 4  # for which a process: eight would wait for the lock of their interpreter
_MANY = 16  # cores from which more than one process is needed
_WORTH = 4096  # examples for which starting processes pays
_GRACE = 5.0  # seconds until a process that does not end is killed, and then left alone
# What the run answers to, which may be saving; its processes end with it.
_UNSTOPPABLE = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
_MAIN = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from common.data.workers.process import main; main(sys.argv[2:])"
)


def worker_count(asked: int, examples: int) -> int:
    """Processes that load photos; 1 means threads of this one.

    Args:
      asked: `config.data.num_processes`, 0: as many as this machine's cores and the examples are
        worth.
      examples: that will be loaded.

    Raises:
      UserError: several are asked for where the system has no memory that they could share.
    """
    possible = hasattr(os, "memfd_create")  # Linux
    if asked > 1 and not possible:
        raise UserError(f"config.data.num_processes={asked}: expected 0 or 1 on {sys.platform}")
    if asked or examples < _WORTH or not possible:
        return asked or 1
    cores = usable_cores()
    return cores // _CORES if cores >= _MANY else 1


class _Worker(NamedTuple):
    title: str
    process: subprocess.Popen
    life: socket.socket


class Workers:
    """Processes that load examples; threads share them, `num_threads` at a time.

    Attributes:
      num_threads: of all processes together.
      blocks: for the batches.
    """

    def __init__(self, loader: Any, processes: int, num_threads: int):
        """Starts the processes, which takes them a second; nothing here waits for that.

        Args:
          loader: see `common.data.batches.Loader`.
          processes: how many.
          num_threads: of all of them together, at least.
        """
        each = -(-num_threads // processes)
        self.num_threads, self.blocks = each * processes, Blocks()
        block, lengths, self._sinks = handover.pack(loader, [remote.repeated])
        order = {"path": sys.path, "lengths": lengths, "repeated": 0}
        self._idle: queue.SimpleQueue[tuple[_Worker, socket.socket] | None] = queue.SimpleQueue()
        self._closed, self._lock = False, threading.Lock()
        self._workers: list[_Worker] = []
        channels: list[list[socket.socket]] = []
        try:
            for number in range(processes):
                title = f"data worker {number + 1} of {processes}"
                worker, own = _start(title, each)
                self._workers.append(worker)
                channels.append(own)
                wire.send(worker.life, json.dumps(order).encode(), block.fd)
        except OSError as error:
            self.close()
            raise UserError(f"cannot start {processes} data workers: {error}") from error
        for turn in zip(*channels, strict=True):  # one of each process after the other
            for pair in zip(self._workers, turn, strict=True):
                self._idle.put(pair)

    def load(self, slot: Any, block: Block, size: int, place: int) -> None:
        """Has the example of a slot written into a row of a batch, and waits for it.

        Raises:
          UserError: the process has ended, or `close` was called.
          Exception: what the loader raises.
        """
        message = pickle.dumps((slot, size, place, block.number, self.blocks.alive), 5)
        if (idle := self._idle.get()) is None:
            self._idle.put(None)  # for the next one that waits
            raise UserError("the data workers have been ended")
        worker, channel = idle
        try:
            wire.send(channel, message, block.fd)
            reply, _ = wire.receive(channel)
        except (EOFError, OSError) as error:
            raise UserError(_ending(worker)) from error
        finally:
            self._give_back(worker, channel)
        notes, failure = pickle.loads(reply)
        replay(notes, self._sinks)
        if failure is not None:
            raise failure

    def _give_back(self, worker: _Worker, channel: socket.socket) -> None:
        with self._lock:
            if not self._closed:
                self._idle.put((worker, channel))
                return
        channel.close()

    def close(self) -> None:
        """Ends the processes, whatever they do; those who wait in `load` then get an error."""
        with self._lock:
            self._closed = True
        with contextlib.suppress(queue.Empty):
            while (idle := self._idle.get_nowait()) is not None:
                idle[1].close()
        self._idle.put(None)
        for worker in self._workers:
            worker.life.close()
        deadline = time.monotonic() + _GRACE
        for worker in self._workers:
            try:
                worker.process.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                worker.process.kill()
        for worker in self._workers:
            # Not even KILL ends one at once whose read the kernel does not give up.
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(deadline + _GRACE - time.monotonic(), 0.0))


def _start(title: str, threads: int) -> tuple[_Worker, list[socket.socket]]:
    """A process, and the channels to its threads.

    It is a fresh interpreter: a fork of this one would have its locks as they happen to be.
    """
    pairs = [socket.socketpair() for _ in range(1 + threads)]
    theirs = [str(pair[1].fileno()) for pair in pairs]
    root = str(Path(common.__file__).parent.parent)
    # Blocked signals stay blocked in the process: so there is no moment at which one ends it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _UNSTOPPABLE)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, root, *theirs],
            pass_fds=[int(text) for text in theirs],
            stdin=subprocess.DEVNULL,
            env=os.environ | _environment(threads),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for _, other in pairs:
            other.close()
    (life, _), *channels = pairs
    return _Worker(f"{title} (process {process.pid})", process, life), [own for own, _ in channels]


def _environment(threads: int) -> dict[str, str]:
    """No threads beside the process' own, and no accelerator."""
    return {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
    }


def _ending(worker: _Worker) -> str:
    """How a process ended that should not have."""
    try:
        status = worker.process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        return f"{worker.title} does not answer any more"
    if status == -signal.SIGKILL:
        return (
            f"{worker.title} was killed (SIGKILL), perhaps for want of memory: fewer "
            "config.data.num_processes, num_threads or prefetch take less"
        )
    if status < 0:
        return f"{worker.title} was ended by {signal.Signals(-status).name}"
    return f"{worker.title} ended with status {status}, its error is above"
