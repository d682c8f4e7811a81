"""The bench of kills sees a difference of one bit, and keeps what was done."""

import json

import numpy as np

from common.training.checkpoint import Checkpoints
from scripts.bench.bench_kills import Diary, differences


def write_run(workdir, loss: float, weight: float):
    state = {"params": {"w": np.float32([1.0, weight])}, "batch_stats": {}, "step": np.int32(2)}
    Checkpoints(workdir / "checkpoints").save(2, state, {}, wait=True)
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": loss, "images_per_second": loss}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def test_one_bit_of_a_loss_or_a_parameter_is_a_difference(tmp_path):
    whole = write_run(tmp_path / "whole", 2.0, 0.1)
    assert differences(write_run(tmp_path / "a", 2.0, 0.1), whole) == []
    assert differences(write_run(tmp_path / "b", np.nextafter(2.0, 3.0), 0.1), whole) == ["step 2"]
    other = float(np.nextafter(np.float32(0.1), np.float32(1)))
    (name,) = differences(write_run(tmp_path / "c", 2.0, other), whole)
    assert name.endswith("w")


def test_the_table_counts_kills_by_kind_over_several_sittings(tmp_path):
    kill = dict(signal="SIGKILL", who="both", moment="step", seconds=0.5, exits=[-9, -9])
    Diary(tmp_path / "kills.jsonl").add(kill)
    diary = Diary(tmp_path / "kills.jsonl")
    diary.add(kill | dict(seconds=1.5))
    diary.add({"run": "run1", "differences": []})
    diary.add({"run": "run2", "differences": ["step 3"]})
    table = Diary(tmp_path / "kills.jsonl").table()
    assert "| SIGKILL | both | step | 2 | 1.0 | 1.5 |" in table
    assert "2 kills in 2 finished runs: 1 differ" in table
