import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from common.data.dataset import Dataset
from common.data.input import train_batches
from common.data.plans.plan import train_plan
from common.io.errors import UserError
from common.nn.layers.norm import Norm
from common.training import distributed
from common.training.checkpoint import Checkpoints
from detection.batch_statistics import recompute_batch_stats
from detection.settings import read_run
from scripts.average_checkpoints import average_checkpoints, parse_numbers, steps_of_epochs
from tests import tiny

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
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
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


class ThreeNorms(nn.Module):
    """Stands in for a detector: norms one after another."""

    kinds: tuple[str, str, str] = ("frozen", "sync", "batch")
    axis_name: str | None = None

    @nn.compact
    def __call__(self, batch, train):
        fields = dict(axis_name=self.axis_name)
        x = Norm(self.kinds[0], name="fixed", **fields)(batch["image"].astype(jnp.float32), train)
        x = Norm(self.kinds[1], momentum=0.99, name="first", **fields)(x, train)
        x = nn.relu(x) * self.param("gain", nn.initializers.ones_init(), (3,))
        return {"losses": {"x": Norm(self.kinds[2], name="second", **fields)(x, train).sum()}}


def test_recomputed_statistics_are_those_of_the_batches(tmp_path):
    directory = tiny.write_dataset(tmp_path / "tiny")
    config = tiny.get_config()
    config.data.update(dir=str(directory), batch_size=4, canvas=(32, 32))
    dataset, model = Dataset.open(directory), ThreeNorms(axis_name="data")
    old = {
        name: {"mean": np.full(3, 100.0, np.float32), "var": np.full(3, 2500.0, np.float32)}
        for name in ("fixed", "first", "second")
    }
    ones = {"scale": np.ones(3, np.float32), "bias": np.zeros(3, np.float32)}
    gain = np.float32([1, 2, 3])
    variables = {"params": {name: ones for name in old} | {"gain": gain}, "batch_stats": old}
    found = recompute_batch_stats(
        read_run(config),
        model,
        variables,
        dataset,
        distributed.make_mesh(jax.devices()[:2]),
        3,
        say=lambda *_, **__: None,
    )
    data = read_run(config).data
    batches = train_batches(dataset, train_plan(dataset, data, 0), data, seed=0, num_steps=3)
    first, second = [], []  # moments of each batch
    for batch in batches:
        x = (batch["image"].astype(np.float64) - 100) / 50
        first.append([x.mean((0, 1, 2)), (x**2).mean((0, 1, 2))])
        y = np.maximum((x - x.mean((0, 1, 2))) / x.std((0, 1, 2)), 0) * gain
        within = np.mean([y[:2].var((0, 1, 2)), y[2:].var((0, 1, 2))], axis=0)  # two devices
        second.append([y.mean((0, 1, 2)), within + y.mean((0, 1, 2)) ** 2])
    for name, moments in (("first", first), ("second", second)):
        mean, mean_square = np.mean(moments, axis=0)
        np.testing.assert_allclose(found[name]["mean"], mean, rtol=1e-3)
        np.testing.assert_allclose(found[name]["var"], mean_square - mean**2, rtol=2e-3)
    np.testing.assert_array_equal(found["fixed"]["mean"], old["fixed"]["mean"])
    np.testing.assert_array_equal(found["fixed"]["var"], old["fixed"]["var"])


def test_recomputing_needs_norms_that_are_trained():
    config = tiny.get_config()
    config.model.norm = "frozen"
    with pytest.raises(UserError, match=r"config\.model\.norm: found 'frozen'"):
        recompute_batch_stats(
            read_run(config), ThreeNorms(("frozen",) * 3), {}, None, distributed.make_mesh(), 3
        )
