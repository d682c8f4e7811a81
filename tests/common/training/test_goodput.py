"""The ledger of a run's time, over several starts."""

import json

import pytest

from common.io import activity
from common.io.errors import UserError
from common.training.goodput import PARTS, Goodput, process_start


class World:
    """A clock and what was spent on what."""

    def __init__(self):
        self.now = 1000.0
        self.spent: dict[str, float] = {}

    def start(self, workdir, start_step, init=30.0):
        began, self.spent = self.now, {}
        self.now += init
        return Goodput(
            workdir, start_step, began=began, clock=lambda: self.now, spent=lambda: dict(self.spent)
        )

    def passes(self, seconds, what=""):
        self.now += seconds
        if what:
            self.spent[what] = self.spent.get(what, 0.0) + seconds


def read(workdir):
    return json.loads((workdir / "goodput.json").read_text())


def test_each_second_has_one_part_and_a_restart_adds_up(tmp_path):
    world = World()
    goodput = world.start(tmp_path, 0)
    world.passes(20, activity.COMPILING)
    world.passes(100)
    world.passes(10, activity.INPUT)
    world.passes(5, activity.CHECKPOINT)
    world.passes(40, activity.EVALUATION)
    goodput.write(10)
    record = read(tmp_path)
    expected = dict.fromkeys(PARTS, 0.0)
    expected |= dict(init=30, compile=20, input=10, steps=100, checkpoint=5, evaluation=40)
    assert record["seconds"] == pytest.approx(expected)
    assert record["goodput"] == pytest.approx(100 / 205) and record["starts"] == 1

    world.passes(60)  # killed somewhere in here, found 60 s later; step 8 had been saved
    goodput = world.start(tmp_path, 8)
    world.passes(50)
    goodput.write(13)
    record = read(tmp_path)
    # Of ten steps two are lost, with their input.
    expected |= dict(init=60, input=8, steps=80 + 50, lost=22, down=60)
    assert record["seconds"] == pytest.approx(expected)
    assert record["starts"] == 2


def test_a_run_that_stopped_where_it_saved_lost_nothing(tmp_path):
    world = World()
    with world.start(tmp_path, 0) as goodput:
        world.passes(100)
        goodput.write(10)
        world.passes(10)  # one more step was saved than reported
    world.start(tmp_path, 11).write(11)
    seconds = read(tmp_path)["seconds"]
    assert seconds["lost"] == 0 and seconds["steps"] == pytest.approx(110)


def test_another_file_of_the_name_is_refused(tmp_path):
    (tmp_path / "goodput.json").write_text("{}")
    with pytest.raises(UserError, match="not written by a training"):
        Goodput(tmp_path, 0)


def test_activities_within_others_count_as_those():
    before = activity.spent()
    with activity.doing("outer of the test"):
        with activity.doing("inner of the test"):
            pass
    new = activity.spent().keys() - before.keys()
    assert new == {"outer of the test"}


def test_this_process_began_before_now():
    import time

    assert 0 < time.time() - process_start() < 24 * 3600
