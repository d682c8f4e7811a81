"""One training at a time in a work directory, and one watcher in its folder there.

A second training would delete the checkpoint that the first is writing and begin its metrics anew,
a second watcher the copy that the first is scoring. The file `lock` says who is there. On a file
system the kernel holds the lock itself, and lets go of it when the process ends in whatever way:
what is left of a killed run is never in the way. An object store has no locks: there the file is
written again every few seconds, and a lock whose file does not change any more is stale.
"""

import contextlib
import datetime
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

from etils import epath

from common.io.atomic import write_text
from common.io.errors import UserError
from common.io.paths import is_remote

BEAT_SECONDS = 20.0  # from one sign of life in an object store to the next
_LOCK = "lock"


@contextlib.contextmanager
def workdir_lock(
    workdir: epath.Path,
    *,
    what: str = "training",
    beat_seconds: float = BEAT_SECONDS,
    say: Callable = print,
) -> Iterator[None]:
    """Holds a work directory; call it in process 0.

    Args:
      workdir: of the run, which exists.
      what: runs there, for the message.
      beat_seconds: of an object store.
      say: where it is said that an old lock is watched.

    Raises:
      UserError: another process holds it.
    """
    owner = {
        "what": what,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds"),
        "token": secrets.token_hex(8),
    }
    held = _beating if is_remote(workdir) else _locked_file
    with held(workdir / _LOCK, owner, beat_seconds, say):
        yield


@contextlib.contextmanager
def _locked_file(path: epath.Path, owner: dict, *_) -> Iterator[None]:
    try:
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise _in_use(path, owner["what"], file.read()) from error
        except OSError:
            pass  # a file system without locks: the file says who was here last
        file.truncate(0)
        file.write(json.dumps(owner))
        file.flush()
        yield
        file.truncate(0)


@contextlib.contextmanager
def _beating(path: epath.Path, owner: dict, seconds: float, say: Callable) -> Iterator[None]:
    if before := _text(path):
        say(f"{path}: {_who(before)}; waiting for a sign of life of it", flush=True)
        time.sleep(3 * seconds)
        if _text(path) not in (before, ""):
            raise _in_use(path, owner["what"], _text(path))
    ended = threading.Event()
    write_text(path, json.dumps(owner | {"beat": 0}))

    def beat() -> None:
        count = 0
        while not ended.wait(seconds):
            count += 1
            with contextlib.suppress(UserError):  # the next one may reach the store
                write_text(path, json.dumps(owner | {"beat": count}))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def _text(path: epath.Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _who(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['process']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _in_use(path: epath.Path, what: str, text: str) -> UserError:
    return UserError(
        f"{path.parent}: a {what} runs here already ({_who(text)}); wait for it, end it, or choose "
        "another folder"
    )
