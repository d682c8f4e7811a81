import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from common.errors import UserError
from common.training.checkpoint import Checkpoints
from scripts.average_checkpoints import average_checkpoints, parse_numbers, steps_of_epochs

ROOT = Path(__file__).parents[2]


def variables(epoch):
    rng = np.random.default_rng(epoch)
    return {
        "params": {
            "head": {
                "kernel": rng.normal(size=(4, 3)).astype(np.float32),
                "bias": rng.normal(size=3).astype(ml_dtypes.bfloat16),
            }
        },
        "batch_stats": {"norm": {"mean": rng.normal(size=3).astype(np.float32)}},
    }


@pytest.fixture
def workdir(tmp_path):
    """A run of 13 epochs of 100 steps that kept all epoch ends."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"seed": 0}\n')
    checkpoints = Checkpoints(run / "checkpoints", keep_every_steps=100)
    for epoch in range(9, 14):
        state = {"step": np.int32(100 * epoch), **variables(epoch), "opt_state": [np.ones(5)]}
        checkpoints.save(100 * epoch, state, {"steps_per_epoch": 100})
    checkpoints.close()
    return run


def run_tool(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "scripts.average_checkpoints", *arguments],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        timeout=120,
    )


def test_epochs_9_to_13_are_averaged_as_in_the_paper(workdir, tmp_path):
    output = tmp_path / "averaged"
    result = run_tool(f"--workdir={workdir}", "--epochs=9-13", f"--output={output}")
    assert result.returncode == 0, result.stderr
    mean, extra = Checkpoints(output / "checkpoints").restore_params()
    assert extra == {"steps_per_epoch": 100, "averaged_steps": [900, 1000, 1100, 1200, 1300]}
    all_five = [variables(epoch) for epoch in range(9, 14)]

    def expected(*path):
        leaves = all_five
        for name in path:
            leaves = [leaf[name] for leaf in leaves]
        return np.mean([leaf.astype(np.float64) for leaf in leaves], 0).astype(leaves[0].dtype)

    np.testing.assert_array_equal(
        mean["params"]["head"]["kernel"], expected("params", "head", "kernel")
    )
    np.testing.assert_array_equal(
        mean["params"]["head"]["bias"], expected("params", "head", "bias")
    )
    np.testing.assert_array_equal(
        mean["batch_stats"]["norm"]["mean"], expected("batch_stats", "norm", "mean")
    )
    assert (output / "config.json").read_text() == '{"seed": 0}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["averaged", "run"]


def test_missing_epochs_are_named(workdir):
    checkpoints = Checkpoints(workdir / "checkpoints")
    assert steps_of_epochs(checkpoints, [9, 13]) == [900, 1300]
    with pytest.raises(UserError, match=r"no checkpoint of epoch 8 \(step 800\); found steps 900"):
        steps_of_epochs(checkpoints, [8, 9])


def test_an_existing_output_is_refused_in_one_line(workdir, tmp_path):
    (tmp_path / "x").mkdir()
    result = run_tool(f"--workdir={workdir}", "--steps=900,1000", f"--output={tmp_path / 'x'}")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "exists already" in line and list((tmp_path / "x").iterdir()) == []


def test_a_mean_of_one_is_that_checkpoint(workdir):
    mean = average_checkpoints(Checkpoints(workdir / "checkpoints"), [1100])
    np.testing.assert_array_equal(
        mean["params"]["head"]["kernel"], variables(11)["params"]["head"]["kernel"]
    )


def test_checkpoints_of_different_models_are_refused(workdir):
    other = variables(14)
    other["params"]["head"]["kernel"] = np.ones((4, 7), np.float32)
    checkpoints = Checkpoints(workdir / "checkpoints", keep_every_steps=100)
    checkpoints.save(1400, other, {"steps_per_epoch": 100}, wait=True)
    with pytest.raises(UserError, match="another model .*head/kernel"):
        average_checkpoints(checkpoints, [1300, 1400])


def test_missing_steps_are_named(workdir):
    with pytest.raises(UserError, match="no checkpoint of step 5, step 6; found steps 900"):
        average_checkpoints(Checkpoints(workdir / "checkpoints"), [5, 6, 900])


def test_numbers_and_ranges():
    assert parse_numbers("--epochs", "9-11, 13") == [9, 10, 11, 13]
    for text in ("", "9,9", "13-9", "9;10", "-3", "11,10"):
        with pytest.raises(UserError, match="--epochs="):
            parse_numbers("--epochs", text)
