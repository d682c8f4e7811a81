"""What a worker process runs: examples of slots, written into the memory of their batch.

It holds one channel for each of its threads, and one more, on which nothing comes after the
loader: when that closes, the process of the run has ended, in whichever way, and so does this one.
"""

import json
import mmap
import os
import pickle
import socket
import sys
import threading
import traceback
from typing import Any

from common.data.workers import handover, wire
from common.data.workers.blocks import Layout
from common.data.workers.sinks import Recorder, take_notes
from common.io.errors import UserError
from common.io.memory import keep_freed_memory


def main(arguments: list[str]) -> None:
    """`arguments`: descriptors of the life line, and of the channel of each thread."""
    life, *channels = (socket.socket(fileno=int(text)) for text in arguments)
    keep_freed_memory()
    try:
        loader = _receive_loader(life)
    except (EOFError, OSError):
        return  # the run has ended meanwhile
    memories = _Memories()
    for channel in channels:
        threading.Thread(target=_serve, args=(channel, loader, memories), daemon=True).start()
    try:
        wire.receive(life)
    except (EOFError, OSError):
        os._exit(0)  # whatever the threads are at


def _receive_loader(life: socket.socket) -> Any:
    text, fd = wire.receive(life)
    order = json.loads(text)
    sys.path[:] = order["path"]
    assert fd is not None
    memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    os.close(fd)
    from common.data import remote

    remote.repeated = Recorder(order["repeated"])  # type: ignore[assignment]
    return handover.unpack(memory, order["lengths"])


def _serve(channel: socket.socket, loader: Any, memories: "_Memories") -> None:
    """Answers until the run closes the channel; what else ends it ends the process, loudly.

    The run waits for an answer as long as the process lives.
    """
    try:
        _answer(channel, loader, memories)
    except (EOFError, ConnectionError):
        return
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _answer(channel: socket.socket, loader: Any, memories: "_Memories") -> None:
    while True:
        message, fd = wire.receive(channel)
        assert fd is not None
        error = None
        try:
            slot, size, place, number, alive = pickle.loads(message)
            _load(loader, slot, size, place, memories.of(fd, number, alive))
        except Exception as caught:
            error = _portable(caught)
        finally:
            os.close(fd)
        wire.send(channel, pickle.dumps((take_notes(), error), 5))


def _load(loader: Any, slot: Any, size: int, place: int, memory: mmap.mmap) -> None:
    arrays = Layout.of(loader.fields(slot), size).arrays(memory)
    example = {name: array[place, ...] for name, array in arrays.items()}
    for array in example.values():
        array[...] = 0  # another batch may have been here
    loader.load(slot, example)


class _Memories:
    """The blocks that are mapped here, by number; threads share them."""

    def __init__(self):
        self._mapped: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()

    def of(self, fd: int, number: int, alive: frozenset[int]) -> mmap.mmap:
        """That of a block, by its descriptor; forgets those that are not `alive` any more."""
        with self._lock:
            for gone in self._mapped.keys() - alive:
                del self._mapped[gone]
            if number not in self._mapped:
                self._mapped[number] = mmap.mmap(fd, 0)
            return self._mapped[number]


def _portable(error: Exception) -> Exception:
    """The error as it is where it can be sent; what is no user's says where it arose."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, UserError):
        error.add_note("in a data worker:\n" + traceback.format_exc())
    return error
