"""Scores the checkpoints of a training as they appear, beside it and on other devices.

    WORKDIR/watch/NAME/metrics.jsonl   one line a checkpoint, and TensorBoard events beside it
    WORKDIR/watch/NAME/STEP/           what scoring wrote
    WORKDIR/watch/NAME/best.json       step, metric and value of the best one
    WORKDIR/watch/NAME/best/           a work directory with its weights, without optimiser state
    WORKDIR/watch/NAME/candidate/      the same of the one that is being scored
    WORKDIR/watch/NAME/unreadable.json why some are not scored, by step; without it they are tried

The training may remove a checkpoint at any time: each is copied before it is scored. A line is the
last thing written of a checkpoint, so that a watcher that was killed scores it once more, or not.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Container, Iterator, Mapping

from etils import epath

from common.io import activity
from common.io.atomic import atomic_folder, write_json
from common.io.errors import UserError
from common.io.paths import PathLike, to_epath
from common.training import distributed, preemption
from common.training.checkpoint import COMMITTED, Checkpoints
from common.training.run_metrics import RunMetrics
from common.training.settings import LogSettings
from common.training.watchdog import StallWatchdog
from common.training.workdir_lock import workdir_lock

_NONE = 0  # no step
_TRAINING = "training"  # the state that evaluation does not need
_OF_THE_RUN = ("config.json", "classes.csv", "hierarchy.json")
_ALL_STEPS = 2**62


def watch(
    directory: PathLike,
    name: str,
    score: Callable[[epath.Path, int, epath.Path], Mapping[str, float]],
    metric: str,
    *,
    timeout: float,
    poll_seconds: float,
    log: LogSettings,
    say: Callable,
    on_scored: Callable[[epath.Path, int, bool], None] = lambda *_: None,
) -> None:
    """Scores every checkpoint once; ends after the last one of the training. All processes call it.

    Args:
      directory: work directory of the training, which may not have begun.
      name: of what is scored, such as the split.
      score: (work directory that holds the checkpoint, step, folder to write to) -> figures.
      metric: among the figures, which the best checkpoint has most of.
      timeout: seconds without a new checkpoint until this ends; 0: it waits for ever.
      poll_seconds: between two looks.
      log: of the run; a batch that takes too long ends the watcher, too.
      say: where lines go.
      on_scored: (work directory of the checkpoint, step, whether it is the best) after each.

    Raises:
      UserError: the figures lack `metric`, another watcher runs there, or what `score` raises.
    """
    workdir = to_epath(directory)
    folder = workdir / "watch" / name
    candidate = folder / "candidate"
    folder.mkdir(parents=True, exist_ok=True)
    since = time.monotonic()
    waiting = _Waiting(workdir, folder, say)
    with contextlib.ExitStack() as stack:
        if distributed.is_main_process():
            stack.enter_context(workdir_lock(folder, what="watcher", say=say))
        stack.enter_context(StallWatchdog.of(log))
        figures_log = stack.enter_context(RunMetrics(folder, _ALL_STEPS))
        scored = read_scored(folder)
        while True:
            step = distributed.same_everywhere(waiting.take(scored))
            if step == _NONE:
                timed_out = 0 < timeout < time.monotonic() - since
                if distributed.same_everywhere(timed_out or waiting.none_follows(scored)):
                    break
                _pause(poll_seconds)
                continue
            figures = dict(score(candidate, step, folder / f"{step}"))
            extra = Checkpoints(candidate / "checkpoints").read_extra(step)
            is_best = False
            if distributed.is_main_process():
                if metric not in figures:
                    raise UserError(f"{folder}: no {metric} among {', '.join(sorted(figures))}")
                others = [line[metric] for line in scored.values() if metric in line]
                is_best = not others or figures[metric] > max(others)
                if is_best:
                    _keep_best(folder, candidate, step, metric, figures[metric])
                    say(f"step {step}  best {metric} = {figures[metric]:.4f}", flush=True)
            is_best = bool(distributed.same_everywhere(is_best))
            on_scored(candidate, step, is_best)
            line = figures | {"num_steps": float(extra.get("num_steps", 0))}
            figures_log.write(step, line)
            scored[step] = line
            if distributed.is_main_process():
                _remove(candidate)
            since = time.monotonic()
            distributed.barrier("scored")
            preemption.passes()
    last = max(scored, default=0)
    done = waiting.none_follows(scored)
    why = "the training is done" if done else f"timeout of {timeout:g} s"
    say(f"watched {len(scored)} checkpoints up to step {last}: {why}", flush=True)


def wait_for_training(
    workdir: PathLike, say: Callable, *, timeout: float, poll_seconds: float
) -> None:
    """Waits for the first checkpoint, before which nobody knows the classes. All processes call it.

    Raises:
      UserError: none within `timeout` seconds, if that is not 0.
    """
    checkpoints = Checkpoints(to_epath(workdir) / "checkpoints")
    since, said = time.monotonic(), False
    while not distributed.same_everywhere(bool(checkpoints.all_steps())):
        if distributed.same_everywhere(0 < timeout < time.monotonic() - since):
            raise UserError(f"{workdir}: no checkpoint within {timeout:g} s")
        if not said:
            say(f"{workdir}: waiting for the first checkpoint", flush=True)
        said = True
        _pause(poll_seconds)


def _pause(seconds: float) -> None:
    with activity.doing(activity.PAUSE):
        time.sleep(seconds)
    preemption.passes()


def read_scored(folder: epath.Path) -> dict[int, dict[str, float]]:
    """The figures of the checkpoints that were scored, by step."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line for line in lines}


class _Waiting:
    """The checkpoints that are not scored yet; process 0 alone looks at them."""

    def __init__(self, workdir: epath.Path, folder: epath.Path, say: Callable):
        """`folder`: where `candidate` and `unreadable.json` lie."""
        self._workdir, self._candidate, self._say = workdir, folder / "candidate", say
        self._source = Checkpoints(workdir / "checkpoints")
        self._copies = Checkpoints(self._candidate / "checkpoints")
        self._record = folder / "unreadable.json"
        self._unreadable: dict[int, str] = {}
        if self._record.exists():
            reasons = json.loads(self._record.read_text())
            self._unreadable = {int(step): reason for step, reason in reasons.items()}

    def take(self, scored: Container[int]) -> int:
        """The step of the next checkpoint, which is copied to `candidate`, or _NONE."""
        if not distributed.is_main_process():
            return _NONE
        taken = self._copies.all_steps()
        if taken and taken[0] not in scored:  # of a watcher that was ended
            if not (damage := self._copies.damage(taken[0])):
                return taken[0]
            self._report(taken[0], f"its copy cannot be read and is removed: {damage}")
        _remove(self._candidate)
        with _vanishing():
            for step in self._source.all_steps():
                if step not in scored and step not in self._unreadable and self._is_copied(step):
                    return step
        return _NONE

    def none_follows(self, scored: Mapping[int, Mapping[str, float]]) -> bool:
        """Whether there was the last checkpoint of the training."""
        if not scored:
            return False
        last = max([*scored, *self._unreadable])
        return 0 < scored[max(scored)].get("num_steps", 0) <= last

    def _is_copied(self, step: int) -> bool:
        """Copies a checkpoint; False if it vanishes meanwhile, or is damaged, which is noted."""
        if not _copy(self._workdir, self._candidate, step):
            return False
        if not (damage := self._copies.damage(step)):
            return True
        _remove(self._candidate)
        if not self._source.damage(step):
            self._report(step, f"its copy cannot be read, it will be copied again: {damage}")
            return False
        self._report(step, f"damaged checkpoint, not scored: {damage}")
        self._unreadable[step] = damage
        write_json(self._record, self._unreadable)
        return False

    def _report(self, step: int, text: str) -> None:
        self._say(f"step {step}  {text}", flush=True)


def _copy(workdir: epath.Path, candidate: epath.Path, step: int) -> bool:
    """Copies what evaluation needs of a checkpoint; False if it vanishes meanwhile.

    Its files may go in any order, and slowly: none must have gone when all are copied.
    """
    source = workdir / "checkpoints" / f"{step}"
    with _vanishing(), atomic_folder(candidate) as new:
        files = _files(source)
        target = new / "checkpoints" / f"{step}"
        _copy_tree(source, target, without=(_TRAINING, COMMITTED))
        (source / COMMITTED).copy(target / COMMITTED)
        for name in _OF_THE_RUN:
            if (workdir / name).exists():
                (workdir / name).copy(new / name)
        if _files(source) != files:
            raise FileNotFoundError(f"{source}: changed while it was copied")
    return candidate.exists()


def _files(folder: epath.Path) -> list[str]:
    """What is in a checkpoint, but for the state that only its training needs."""
    found: list[str] = []
    for path in folder.iterdir():
        if path.name != _TRAINING:
            found += _files(path) if path.is_dir() else [os.fspath(path)]
    return sorted(found)


def _copy_tree(source: epath.Path, target: epath.Path, without: tuple[str, ...] = ()) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name in without:
            continue
        if path.is_dir():
            _copy_tree(path, target / path.name)
        else:
            path.copy(target / path.name)


@contextlib.contextmanager
def _vanishing() -> Iterator[None]:
    """For reading what the training may remove."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        pass
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise


def _keep_best(
    folder: epath.Path, candidate: epath.Path, step: int, metric: str, value: float
) -> None:
    with atomic_folder(folder / "best") as new:
        for path in candidate.iterdir():
            if path.is_dir():
                _copy_tree(path, new / path.name)
            else:
                path.copy(new / path.name)
    write_json(folder / "best.json", {"step": step, "metric": metric, "value": value})


def _remove(folder: epath.Path) -> None:
    if folder.exists():
        folder.rmtree()
