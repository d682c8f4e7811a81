import json
import sys

import jax
import numpy as np
import pytest

from common.training.run_metrics import RunMetrics, log_parameter_overview


def params():
    return {
        "backbone": {
            "conv1": {"kernel": np.zeros((3, 3, 2, 4))},
            "layer1": {"0": {"norm1": {"scale": np.zeros(4), "bias": np.zeros(4)}}},
        },
        "head": {"bias": np.zeros(3)},
    }


def test_overview_counts_parameters_by_module_from_shapes_alone():
    said = []
    log_parameter_overview(jax.eval_shape(lambda: params()), said.append)
    rows = [line.split() for line in said[0].splitlines()]
    assert rows == [
        ["module", "arrays", "parameters"],
        ["backbone/conv1", "1", "72"],
        ["backbone/layer1", "2", "8"],
        ["head", "1", "3"],
        ["total", "4", "83"],
    ]


def test_overview_tells_what_is_trained():
    said = []
    trained = jax.tree.map(lambda x: x.ndim == 1, params())
    log_parameter_overview(params(), said.append, trained)
    assert said[0].splitlines()[1].split() == ["backbone/conv1", "1", "72", "0"]
    assert said[0].splitlines()[-1].split() == ["total", "4", "83", "11"]


def test_metrics_reach_tensorboard_and_the_log(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="reads the events back"
    )
    with RunMetrics(tmp_path) as log:
        for step in (10, 20):
            log.write(step, {"loss": np.float32(step / 8), "learning_rate": 0.5})
        log.pictures(20, lambda: {"detections/a": np.zeros((1, 8, 6, 3), np.uint8)})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 10, "loss": 1.25, "learning_rate": 0.5},
        {"step": 20, "loss": 2.5, "learning_rate": 0.5},
    ]
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["tensors"]) >= {"loss", "learning_rate", "detections/a"}
    assert [event.step for event in events.Tensors("loss")] == [10, 20]


@pytest.mark.parametrize("missing", ["clu", "tensorflow"])
def test_without_what_writes_events_the_log_has_all(tmp_path, monkeypatch, capsys, missing):
    for name in [name for name in sys.modules if name.split(".")[0] == "clu"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # importing it now raises ImportError
    with RunMetrics(tmp_path) as log:
        log.write(10, {"loss": 0.5})
        log.pictures(10, lambda: pytest.fail("drawn for nobody"))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 10, "loss": 0.5}
    assert "no TensorBoard events, metrics.jsonl has the figures" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_evaluation_is_made_once_whatever_was_killed_between(tmp_path):
    made = []

    def evaluate(what: str):
        made.append(what)
        return {"AP": len(made) / 4}

    with RunMetrics(tmp_path) as log:
        log.write(10, {"loss": 1.0})
        assert log.evaluated(10, "val coco", lambda: evaluate("first")) == {"AP": 0.25}
    with RunMetrics(tmp_path, start_step=10) as log:  # killed, and started again
        assert log.evaluated(10, "val coco", lambda: evaluate("again")) == {"AP": 0.25}
        assert log.evaluated(10, "val lvis", lambda: evaluate("other metric")) == {"AP": 0.5}
    assert made == ["first", "other metric"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "evaluation/AP" in line]
    assert [line["evaluation_of"] for line in evaluations] == ["val coco", "val lvis"]
