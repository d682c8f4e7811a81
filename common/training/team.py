"""The processes of a run know of one another: who failed and why, who is gone, who is slow.

They talk through the key-value store of JAX's coordination service, which process 0 serves, and
never through devices: a process whose devices wait for another one still hears of its end.

    beat/I          what process I is doing, every second
    failure         the first failure: who told it, what it says, the exit status of all
    heard/I         process I has heard of the failure
    barrier/N/I     process I is at barrier N

An error of a process ends all with status 1: it would come again. With `EXIT_AGAIN` they end when a
process is gone or does not get on, which may well be better on the next start.
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from common.io import activity
from common.io.endings import EXIT_AGAIN, flush_or_drop, say_error
from common.io.errors import UserError

BEAT_SECONDS = 1.0
LOST_SECONDS = 12.0  # without a beat until a process counts as gone
_FIRST_SECONDS = 45.0  # the same for the first beat, since that of process 0
_HEARD_SECONDS = 3.0  # that process 0 stays for the others to hear of a failure
_LISTEN_MS = 1000  # of one call


class Store(Protocol):
    """Texts by key, shared by all processes; any method raises RuntimeError without process 0."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...

    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class Beat:
    """What process 0 knows of another one: its host, its activity, and when that was heard."""

    host: str
    activity: activity.Activity
    number: int
    heard: float


class Team:
    """This process among those of the run.

    Attributes:
      ended: set when the run ends, well or not.
    """

    def __init__(
        self,
        store: Store,
        index: int,
        count: int,
        host: str,
        *,
        end: Callable[[int], Any] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Says nothing before `start`.

        Args:
          store: shared by the processes.
          index: of this process.
          count: of all processes.
          host: name of this machine.
          end: ends this process at once.
          clock: seconds; tests pass their own.
        """
        self.store, self.index, self.count, self.host = store, index, count, host
        self._end, self._clock = end, clock
        self._number, self._began = 0, clock()
        self._beats: dict[int, Beat] = {}
        self._barriers = 0
        self.ended = threading.Event()
        self._told = threading.Lock()  # taken by the one thread that says what ended the run
        self._gone = 0  # processes that will hear of nothing
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begins to beat and to listen, in threads that end with the process."""
        self.every_second(self.beat, "beats")
        self._begin(self._listen, "failures")

    def every_second(self, task: Callable[[], None], name: str) -> None:
        """Has `task` called again and again in a thread of its own, called `name`."""

        def repeat() -> None:
            while not self.ended.is_set():
                with contextlib.suppress(RuntimeError):  # process 0 is gone: the listener says so
                    task()
                self.ended.wait(BEAT_SECONDS)

        self._begin(repeat, name)

    def _begin(self, loop: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=loop, name=f"team: {name}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def name(self, index: int) -> str:
        """A process and its host, for a message."""
        host = self.host if index == self.index else self._hosts().get(index, "not heard of yet")
        return f"process {index} ({host})"

    # ------------------------------------------------------------------------------- failures

    def fail(self, reason: str) -> None:
        """Ends the run because of this process, which has said why; the others say it, too."""
        self._end_all(f"{self.name(self.index)} failed: {reason}", 1, is_said=True)

    def blame(self, index: int, what: str) -> None:
        """Ends the run because of any process, such as one that "is gone"; it may start again."""
        self._end_all(f"{self.name(index)} {what}", EXIT_AGAIN, is_said=False)

    def _end_all(self, text: str, status: int, is_said: bool) -> None:
        """Tells the failure unless another one was first, says the first one, and leaves."""
        self.ended.set()
        own: dict[str, Any] = {"by": self.index, "text": text, "status": status}
        first = own
        try:
            self.store.key_value_set("failure", json.dumps(own))
        except RuntimeError:  # another one was first, or process 0 is gone
            with contextlib.suppress(RuntimeError):
                first = json.loads(self.store.blocking_key_value_get("failure", _LISTEN_MS))
        if first is not own:
            is_said = first["by"] == self.index  # by another thread
        if not is_said:
            self._say_once(first["text"])
        self._leave(first["status"])

    def wait_for_cause(self) -> None:
        """Gives the listener time to say who made a collective operation fail."""
        time.sleep(LOST_SECONDS + 3 * BEAT_SECONDS)

    def _listen(self) -> None:
        """Waits for a failure of any process."""
        record = None
        while record is None:
            try:
                record = json.loads(self.store.blocking_key_value_get("failure", _LISTEN_MS))
            except RuntimeError as error:
                if self.ended.is_set():
                    return
                if "DEADLINE" not in str(error):
                    self.ended.set()
                    leader = self._hosts().get(0, "unknown host")
                    self._say_once(f"process 0 ({leader}), which coordinates the run, is gone")
                    self._end(EXIT_AGAIN)
                    return
        if record["by"] == self.index:
            return  # the thread that told it says it, and leaves
        self.ended.set()
        self._say_once(record["text"])
        self._leave(record["status"])

    def _say_once(self, text: str) -> None:
        if self._told.acquire(blocking=False):
            say_error(text)

    def _leave(self, status: int) -> None:
        """Ends the process; process 0, which carries the news, after the others heard them."""
        try:
            self.store.key_value_set(f"heard/{self.index}", "", allow_overwrite=True)
            deadline = self._clock() + _HEARD_SECONDS
            while self.index == 0 and self._clock() < deadline:
                if len(self.store.key_value_dir_get("heard/")) >= self.count - self._gone:
                    break
                time.sleep(0.05)
        except RuntimeError:
            pass  # process 0 is gone already
        flush_or_drop(sys.stdout)
        self._end(status)

    # ---------------------------------------------------------------------------------- beats

    def beat(self) -> None:
        """Says what this process does; process 0 looks whether all others still do so."""
        self._number += 1
        doing, _ = activity.current()
        record = {"host": self.host, "number": self._number, **dataclasses.asdict(doing)}
        self.store.key_value_set(f"beat/{self.index}", json.dumps(record), allow_overwrite=True)
        if self.index == 0 or 0 not in self._beats:
            self._beats = self._read_beats()
        if self.index == 0:
            self._look_for_lost()

    def _read_beats(self) -> dict[int, Beat]:
        now, beats = self._clock(), {}
        for key, text in self.store.key_value_dir_get("beat/"):
            index, record = int(key.rsplit("/", 1)[1]), json.loads(text)
            host, number = record.pop("host"), record.pop("number")
            known = self._beats.get(index)
            heard = known.heard if known is not None and known.number == number else now
            beats[index] = Beat(host, activity.Activity(**record), number, heard)
        return beats

    def _hosts(self) -> dict[int, str]:
        return {index: beat.host for index, beat in self._beats.items()}

    def _look_for_lost(self) -> None:
        now = self._clock()
        lost = [i for i, beat in self._beats.items() if now - beat.heard > LOST_SECONDS]
        if now - self._began > _FIRST_SECONDS:  # joined, and died before its first beat
            lost += [i for i in range(self.count) if i not in self._beats]
        if lost:
            self._gone = len(lost)
            names = ", ".join(self.name(i) for i in lost[1:4])
            more = f"; so are {names}" if names else ""
            seconds = LOST_SECONDS if lost[0] in self._beats else _FIRST_SECONDS
            self.blame(lost[0], f"is gone: nothing heard for {seconds:.0f} s{more}")

    def slowest(self) -> str:
        """The process that waits most for its input and the one furthest behind, for a log line."""
        beats = {i: beat.activity for i, beat in self._beats.items()}
        if len(beats) < 2:
            return ""
        waiting = max(beats, key=lambda i: beats[i].data_wait_share)
        share = beats[waiting].data_wait_share
        text = f"  most data wait {share:.0%} {self._beats[waiting].host}" if share >= 0.01 else ""
        behind = min(beats, key=lambda i: beats[i].done)
        steps = max(beat.done for beat in beats.values()) - beats[behind].done
        return text + (f"  {self._beats[behind].host} {steps} steps behind" if steps > 1 else "")

    def stalled(self, seconds: float) -> None:
        """Ends the run because this process has finished no step for so long.

        The one to blame is that which waits for its input, or else is furthest behind. Nothing
        happens while any process does what may take long (`activity.PATIENT`).
        """
        self._beats = self._read_beats()
        doing = {i: beat.activity for i, beat in self._beats.items()}
        if any(beat.what in activity.PATIENT for beat in doing.values()):
            return
        blamed = min(doing, key=lambda i: (doing[i].what != activity.INPUT, doing[i].done))
        what = doing[blamed].what or "in a step"
        step = doing[blamed].step
        self.blame(blamed, f"is {what}: no step finished for {seconds:.0f} s after step {step}")

    # ------------------------------------------------------------------------------- together

    def barrier(self, name: str, seconds: float) -> None:
        """Waits until all processes are here.

        Raises:
          UserError: names those that are not after `seconds`.
        """
        self._barriers += 1
        where = f"barrier/{self._barriers}-{name}"
        self.store.key_value_set(f"{where}/{self.index}", "")
        try:
            self.store.wait_at_barrier(where, int(seconds * 1000))
        except RuntimeError as error:
            here = {int(k.rsplit("/", 1)[1]) for k, _ in self.store.key_value_dir_get(f"{where}/")}
            self._beats = self._read_beats()
            absent = [self.name(i) for i in range(self.count) if i not in here]
            shown = ", ".join(absent[:4]) + (f" and {len(absent) - 4} more" if absent[4:] else "")
            raise UserError(
                f"waited {seconds:.0f} s for all processes ({name}); absent: {shown or 'none'}"
            ) from error

    def finish(self) -> None:
        """Waits for the others, however long they take, and stops the threads."""
        self.barrier("end", 10 * 24 * 3600)
        self.ended.set()
        # One that comes back from JAX after Python's end would abort the process.
        for thread in self._threads:
            thread.join(3 * BEAT_SECONDS + _LISTEN_MS / 1000)
