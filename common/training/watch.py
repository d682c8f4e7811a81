"""Scores the checkpoints of a training as they appear, beside it and on other devices.

    WORKDIR/watch/NAME/metrics.jsonl   one line a checkpoint, and TensorBoard events beside it
    WORKDIR/watch/NAME/STEP/           what scoring wrote
    WORKDIR/watch/NAME/best.json       step, metric and value of the best one
    WORKDIR/watch/NAME/best/           a work directory with its weights, without optimiser state
    WORKDIR/watch/NAME/candidate/      the same of the one that is being scored

The training may remove a checkpoint at any time: each is copied before it is scored. A line is the
last thing written of a checkpoint, so that a watcher that was killed scores it once more, or not.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.experimental import multihost_utils

from common.io.atomic import atomic_folder, write_json
from common.io.errors import UserError
from common.io.paths import PathLike, to_epath
from common.training import distributed, preemption
from common.training.checkpoint import COMMITTED, Checkpoints
from common.training.run_metrics import RunMetrics
from common.training.workdir_lock import workdir_lock

_WAIT, _END = 0, -1
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
      say: where lines go.
      on_scored: (work directory of the checkpoint, step, whether it is the best) after each.

    Raises:
      UserError: the figures lack `metric`, another watcher runs there, or what `score` raises.
    """
    workdir = to_epath(directory)
    folder = workdir / "watch" / name
    candidate, source = folder / "candidate", Checkpoints(workdir / "checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    since = time.monotonic()
    with contextlib.ExitStack() as stack:
        if distributed.is_main_process():
            stack.enter_context(workdir_lock(folder, what="watcher", say=say))
        log = stack.enter_context(RunMetrics(folder, _ALL_STEPS))
        scored = read_scored(folder)
        while (step := _agreed(_next(workdir, source, candidate, scored, since, timeout))) != _END:
            if step == _WAIT:
                time.sleep(poll_seconds)
                preemption.passes()
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
            is_best = bool(_agreed(int(is_best)))
            on_scored(candidate, step, is_best)
            line = figures | {"num_steps": float(extra.get("num_steps", 0))}
            log.write(step, line)
            scored[step] = line
            if distributed.is_main_process():
                _remove(candidate)
            since = time.monotonic()
            distributed.barrier("scored")
            preemption.passes()
    ends = [line["num_steps"] for line in scored.values() if "num_steps" in line]
    last = max(scored, default=0)
    why = "the training is done" if ends and last >= ends[-1] > 0 else f"timeout of {timeout:g} s"
    say(f"watched {len(scored)} checkpoints up to step {last}: {why}", flush=True)


def wait_for_training(workdir: PathLike, say: Callable) -> None:
    """Waits for the first checkpoint, before which nobody knows the classes. All processes call it.

    Raises:
      UserError: none within --timeout.
    """
    checkpoints = Checkpoints(to_epath(workdir) / "checkpoints")
    since, said = time.monotonic(), False
    while not (found := _agreed(_seen(checkpoints, since))):
        if not said:
            say(f"{workdir}: waiting for the first checkpoint", flush=True)
        said = True
        time.sleep(flags.FLAGS.poll_seconds)
        preemption.passes()
    if found == _END:
        raise UserError(f"{workdir}: no checkpoint within {flags.FLAGS.timeout:g} s")


def _seen(checkpoints: Checkpoints, since: float) -> int:
    if checkpoints.all_steps():
        return 1
    timeout = flags.FLAGS.timeout
    return _END if timeout and time.monotonic() - since > timeout else _WAIT


def read_scored(folder: epath.Path) -> dict[int, dict[str, float]]:
    """The figures of the checkpoints that were scored, by step."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line for line in lines}


def _agreed(choice: int) -> int:
    """What process 0 says."""
    if jax.process_count() == 1:
        return choice
    return int(multihost_utils.broadcast_one_to_all(np.int32(choice)))


def _next(
    workdir: epath.Path,
    source: Checkpoints,
    candidate: epath.Path,
    scored: Mapping[int, Mapping[str, float]],
    since: float,
    timeout: float,
) -> int:
    """The step of the next checkpoint, which is copied to `candidate`, or _WAIT or _END."""
    if not distributed.is_main_process():
        return _WAIT
    taken = Checkpoints(candidate / "checkpoints").all_steps()
    if taken and taken[0] not in scored:
        return taken[0]  # of a watcher that was ended
    _remove(candidate)
    with _vanishing():
        for step in source.all_steps():
            if step not in scored and _take(workdir, candidate, step):
                return step
    last = max(scored, default=None)
    if last is not None and 0 < scored[last].get("num_steps", 0) <= last:
        return _END
    return _END if timeout and time.monotonic() - since > timeout else _WAIT


def _take(workdir: epath.Path, candidate: epath.Path, step: int) -> bool:
    """Copies what evaluation needs of a checkpoint; False if it vanishes meanwhile."""
    source = workdir / "checkpoints" / f"{step}"
    with _vanishing(), atomic_folder(candidate) as new:
        target = new / "checkpoints" / f"{step}"
        _copy_tree(source, target, without=("training", COMMITTED))
        (source / COMMITTED).copy(target / COMMITTED)
        for name in _OF_THE_RUN:
            if (workdir / name).exists():
                (workdir / name).copy(new / name)
    return candidate.exists()


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
