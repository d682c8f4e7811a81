"""Checkpoints are scored once each, whatever the training and the watcher go through."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from common.io.errors import UserError
from common.training import watch as watching
from common.training import watchdog
from common.training.checkpoint import Checkpoints
from common.training.settings import LogSettings
from common.training.watch import read_scored, watch

LAST = 6
NEVER_STALLED = LogSettings(1, 0.0, 0, ())


def state(step):
    return {
        "params": {"w": np.full(3, step, np.float32)},
        "batch_stats": {},
        "step": np.int32(step),
    }


class Training:
    """Saves checkpoints when told, and keeps the last two."""

    def __init__(self, workdir):
        self.checkpoints = Checkpoints(workdir / "checkpoints", keep_last=2)
        workdir.mkdir(exist_ok=True)
        (workdir / "config.json").write_text("{}")

    def save(self, step):
        self.checkpoints.save(step, state(step), {"num_steps": LAST}, wait=True)


def run(workdir, seen, values=None, **options):
    """A watcher whose figure of a step is that of `values`, else the step itself."""

    def score(candidate, step, folder):
        params, _ = Checkpoints(candidate / "checkpoints").restore_params(step)
        assert (params["params"]["w"] == step).all()
        seen.append(step)
        return {"AP": float((values or {}).get(step, step))}

    quiet = dict(log=NEVER_STALLED, say=lambda *_, **__: None)
    options = dict(timeout=0.01, poll_seconds=0.01) | quiet | options
    watch(workdir, "validation", score, "AP", **options)


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


def test_each_checkpoint_is_scored_once_and_the_best_outlives_retention(workdir):
    training, seen = Training(workdir), []
    values = {2: 0.5, 4: 0.9, 5: 0.7, 6: 0.8}
    for step in (2, 4):
        training.save(step)
    run(workdir, seen, values)
    for step in (5, 6):
        training.save(step)
    run(workdir, seen, values, timeout=0.0)  # ends by itself after the last step
    run(workdir, seen, values, timeout=0.0)
    assert seen == [2, 4, 5, 6] and training.checkpoints.all_steps() == [5, 6]
    folder = workdir / "watch" / "validation"
    assert {step: line["AP"] for step, line in read_scored(folder).items()} == values
    best = json.loads((folder / "best.json").read_text())
    assert best == {"step": 4, "metric": "AP", "value": 0.9}
    kept = Checkpoints(folder / "best" / "checkpoints")
    assert kept.all_steps() == [4]
    assert (kept.restore_params()[0]["params"]["w"] == 4).all()
    assert (folder / "best" / "config.json").exists() and not (folder / "candidate").exists()


def test_a_watcher_that_is_killed_scores_what_it_had_begun(workdir):
    training, seen = Training(workdir), []
    training.save(1)

    def die(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(workdir, seen, on_scored=die)
    training.save(2)
    training.save(3)
    run(workdir, seen)
    assert training.checkpoints.all_steps() == [2, 3]
    assert seen == [1, 1, 2, 3]
    assert list(read_scored(workdir / "watch" / "validation")) == [1, 2, 3]


def test_checkpoints_that_vanish_while_they_are_read_are_passed_over(workdir, monkeypatch):
    training, seen = Training(workdir), []
    training.save(1)
    training.save(2)
    copy_tree = watching._copy_tree

    def vanish(source, target, without=()):
        if source.name == "1":
            source.rmtree()
        copy_tree(source, target, without)

    monkeypatch.setattr(watching, "_copy_tree", vanish)
    run(workdir, seen)
    assert seen == [2]


def test_checkpoints_that_vanish_in_parts_are_passed_over(workdir, monkeypatch):
    """Those who remove them take the files in any order; COMMITTED may be the last."""
    training, seen = Training(workdir), []
    training.save(1)
    training.save(2)
    copy_tree = watching._copy_tree
    steps = iter([hollow, shutil.rmtree])  # from one copy to the next

    def vanish(source, target, without=()):
        if source.name == "1":
            next(steps)(source)
        copy_tree(source, target, without)

    monkeypatch.setattr(watching, "_copy_tree", vanish)
    said = []
    run(workdir, seen, say=lambda text, **_: said.append(text))
    assert seen == [2] and next(steps, None) is None
    assert not any("damaged" in text for text in said)


def hollow(folder):
    """Takes the arrays of a checkpoint and leaves the rest, as a removal under way."""
    for arrays in list(Path(folder, "model").rglob("d")):
        shutil.rmtree(arrays)


def test_a_damaged_checkpoint_is_said_once_and_not_tried_again(workdir):
    training, seen, said = Training(workdir), [], []
    say = dict(say=lambda text, **_: said.append(text))
    training.save(5)
    training.save(LAST)
    hollow(workdir / "checkpoints" / f"{LAST}")
    run(workdir, seen, **say, timeout=0.0)  # ends: it was the last one
    assert seen == [5]
    assert sum("step 6  damaged checkpoint, not scored: " in text for text in said) == 1
    record = workdir / "watch" / "validation" / "unreadable.json"
    assert list(json.loads(record.read_text())) == ["6"]
    run(workdir, seen, **say, timeout=0.0)
    assert seen == [5] and sum("damaged" in text for text in said) == 1


def test_a_damaged_copy_is_made_anew_while_the_training_has_the_checkpoint(workdir):
    training, seen, said = Training(workdir), [], []
    training.save(1)

    def die(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(workdir, seen, on_scored=die)
    folder = workdir / "watch" / "validation"
    hollow(folder / "candidate" / "checkpoints" / "1")
    run(workdir, seen, say=lambda text, **_: said.append(text))
    assert seen == [1, 1] and list(read_scored(folder)) == [1]
    assert any("step 1  its copy cannot be read and is removed" in text for text in said)
    assert not (folder / "unreadable.json").exists()


def test_a_batch_that_never_ends_ends_the_watcher(workdir, monkeypatch):
    Training(workdir).save(1)
    ended = threading.Event()
    monkeypatch.setattr(watchdog, "_end_stalled", lambda seconds: ended.set())

    def score(*_):
        assert ended.wait(30)
        return {"AP": 1.0}

    options = dict(timeout=0.01, poll_seconds=0.01, log=LogSettings(1, 0.5, 1, ()))
    watch(workdir, "validation", score, "AP", say=print, **options)


def test_a_figure_that_is_not_there_is_refused(workdir):
    Training(workdir).save(1)
    with pytest.raises(UserError, match="no mAP among AP"):
        watch(
            workdir,
            "validation",
            lambda *_: {"AP": 1.0},
            "mAP",
            timeout=0.01,
            poll_seconds=0.01,
            log=NEVER_STALLED,
            say=print,
        )


def test_a_second_watcher_is_refused(workdir):
    """It would remove the copy that the first is scoring."""
    training, seen = Training(workdir), []
    training.save(1)

    def begin_another(*_):
        with pytest.raises(UserError, match="validation: a watcher runs here already"):
            run(workdir, [])

    run(workdir, seen, on_scored=begin_another)
    assert seen == [1]
