"""The script for accelerators runs on a CPU, and nothing that goes wrong in it stops the rest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench.device import goals, learn, trace
from scripts.bench.device.run import Part

ROOT = Path(__file__).parents[2]

# A worker whose second case crashes, whose third is too slow, and whose fourth fails.
WORKER = """
import json, os, sys, time
events, done = open(sys.argv[1], "a"), sys.argv[2].split(",")
def say(**event):
    print(json.dumps(event), file=events, flush=True)
cases = ["good", "crashes", "slow", "fails", "wrong", "last"]
say(event="plan", cases=cases)
for case in cases:
    if case in done:
        continue
    say(event="start", case=case, limit=0.5 if case == "slow" else 30)
    say(event="line", case=case, name="value", figure=1.5, ok=case != "wrong")
    if case == "crashes":
        sys.exit("out of memory")
    if case == "slow":
        time.sleep(60)
    if case == "fails":
        say(event="error", case=case, text="ValueError: no")
    say(event="end", case=case)
"""


def test_a_case_at_fault_costs_itself_alone(tmp_path, capsys):
    def command(part, events, done, seconds):
        return [sys.executable, "-c", WORKER, str(events), ",".join(done)]

    part = Part("fast", 60.0, tmp_path / "log", command, dict(os.environ))
    seen = []
    part.run(lambda: seen.append(len(part.results["cases"])))
    cases = part.results["cases"]
    assert {name: case["status"] for name, case in cases.items()} == {
        "good": "done",
        "crashes": "crashed with status 1",
        "slow": "stopped: no time left",
        "fails": "failed",
        "wrong": "wrong",
        "last": "done",
    }
    assert cases["crashes"]["error"] == "out of memory"
    assert cases["fails"]["error"] == "ValueError: no"
    assert all(case["lines"] for case in cases.values()) and len(seen) > 12


def test_a_part_without_time_says_what_it_left_out(tmp_path):
    def command(part, events, done, seconds):
        return [
            sys.executable,
            "-c",
            WORKER.replace("30", "0.5") + "\ntime.sleep(60)",
            str(events),
            "",
        ]

    part = Part("fast", 1.5, tmp_path / "log", command, dict(os.environ))
    part.run(lambda: None)
    statuses = [case["status"] for case in part.results["cases"].values()]
    assert statuses[0] == "done" and statuses[-1] == "no time left"
    assert part.results["seconds"] < 20


def test_a_worker_that_cannot_start_is_reported(tmp_path, capsys):
    def command(part, events, done, seconds):
        return [sys.executable, "-c", "import no_such_module"]

    part = Part("fast", 60.0, tmp_path / "log", command, dict(os.environ))
    part.run(lambda: None)
    assert "crashed with status 1" in part.results["error"]
    assert "No module named 'no_such_module'" in part.results["error"]


def test_goals_are_judged_by_what_was_measured():
    lines = [
        {"name": "R50-FPN, train, 8 images", "images_per_second": 150.0, "speed_up": 1.6},
        {"name": "R50-FPN, inference, 8 images", "images_per_second": 300.0, "speed_up": 1.6},
        {"name": "NMS, 500 classes, 8 boxes an object", "speed_up": 1.1},
        {"name": "copy", "tb_per_second": 3.0},
    ]
    assert goals.judge({"fast": {"cases": {"a": {"lines": lines}}}}) == [
        "R50-FPN, train, 8 images: speed-up 1.6, reaches 1.5",
        "R50-FPN, inference, 8 images: speed-up 1.6, misses 2",
        "NMS, 500 classes, 8 boxes an object: speed-up 1.1, reaches 1",
        "R50-FPN: images a second of training 150, misses 160",
    ]
    assert goals.judge({"correct": {"cases": {}}}) == []


def test_operations_are_traced_to_their_modules():
    path = "jit(train_step)/shard_map/{}/{}"
    forward = path.format("jvp(FasterRCNN)", "backbone/layer1/conv")
    backward = path.format("transpose(jvp(FasterRCNN))", "box_head/fc1/dot_general")
    text = (
        f'  %fusion.7 = f32[2,3]{{1,0}} fusion(%p), metadata={{op_name="{forward}" source="a"}}\n'
        f'  ROOT %dot = f32[2] dot(%a, %b), metadata={{op_name="{backward}"}}\n'
        "  %copy.1 = f32[2] copy(%a)\n"
    )
    names = trace.origins(text)
    assert names.keys() == {"fusion.7", "dot"}
    assert trace.place(names["fusion.7"]) == "backbone/layer1/conv"
    assert trace.place(names["dot"]) == "box_head/fc1/dot_general (backward)"


def test_only_seeds_that_have_ended_are_tabled(tmp_path):
    for seed, score in ((0, 0.25), (2, 0.5)):
        folder = tmp_path / f"dh_{seed}" / "evaluation" / "10"
        folder.mkdir(parents=True)
        name = "OpenImagesDetectionChallenge_Precision/mAP@0.5IOU"
        (folder / "validation_metrics.json").write_text(json.dumps({name: score}))
    assert learn.finished(tmp_path, "dh") == [0.25]


@pytest.mark.slow
def test_the_dry_run_tries_every_case(tmp_path):
    for peer in ("torch", "torchvision", "timm", "ensemble_boxes"):
        pytest.importorskip(peer, reason="the accelerator's figures stand beside those of torch")
    output = tmp_path / "results.json"
    command = [ROOT / "scripts/bench/accelerator", "--dry_run", f"--output={output}"]
    result = subprocess.run(
        [*command, "--seconds=900"],
        env=os.environ | {"PYTHON": sys.executable, "JAX_NUM_CPU_DEVICES": "1"},
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + output.with_suffix(".log").read_text()
    parts = json.loads(output.read_text())["parts"]
    assert parts.keys() == {"correct", "fast", "profile", "learn"}
    for name, part in parts.items():
        assert {case["status"] for case in part["cases"].values()} == {"done"}, name
        assert all(case["lines"] for case in part["cases"].values()), name
