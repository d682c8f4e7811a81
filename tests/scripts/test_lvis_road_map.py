"""The road map names commands that exist, in an order in which each finds what it reads."""

import json
import os
import re
import shlex
import signal
import threading
import time

from common.tables.class_mapping import find_class_mapping
from scripts.lvis_road_map import run_step, table
from tests.commands import run

WHERE = ("--lvis=L", "--coco=C", "--openimages=O", "--x101=x", "--se154=s", "--workdir=W")


def test_each_command_reads_what_one_before_made():
    small = ("--set=config.seed=3", "--scales=64,96")
    output = run("scripts.lvis_road_map", *WHERE, "--dry_run", *small)
    made: set[str] = set()
    lines = re.findall(r"^\d+/(\d+), row (\d): (.*)$", output, re.MULTILINE)
    assert len(lines) == int(lines[0][0])
    assert sorted({row for _, row, _ in lines}) == list("123456")
    for _, _, line in lines:
        words = shlex.split(line)
        values = dict(word.removeprefix("--").partition("=")[::2] for word in words)
        trained = "detection.train" in words
        assert ("config.seed" in values) == any(word.startswith("detection.") for word in words)
        if scales := values.get("config.test_time.scales"):
            assert scales == "(64,96,)" and "detection.export" in words
        mappings = values.get("config.mappings")
        for text in mappings.split(",") if mappings else ():
            assert find_class_mapping(text.split("=")[1]).targets  # with a rule for every label
        for key in ("config.init_from", "detections", "proposals", "workdir", "inputs"):
            if trained and key == "workdir":
                continue
            for text in values.get(key, "").split(",") if key in values else ():
                assert text.split("=")[-1] in made, line
        made |= {values[key] for key in ("output", "json") if key in values}
        if trained:
            made.add(values["workdir"])
    assert {f"W/{row}.json" for row in range(1, 7)} <= made


def test_sigterm_reaches_the_command_that_runs(tmp_path):
    """So that a training saves its state before both end."""
    waiting = tmp_path / "waiting"
    code = f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path({str(waiting)!r}).touch()
time.sleep(60)
"""

    def stop():
        while not waiting.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop)
    thread.start()
    assert run_step(["-c", code]) == 75
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_table_is_in_percent(tmp_path):
    figures = {"AP": 0.301, "APr": -1.0, "APc": 0.318, "APf": 0.323}
    (tmp_path / "1.json").write_text(json.dumps(figures))
    assert table([1], tmp_path).splitlines()[-1] == "| 1 | 30.1 | - | 31.8 | 32.3 |"
