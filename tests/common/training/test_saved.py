"""Saved programs run where they were made for, and say in a line why they do not elsewhere."""

import json
import re
import zipfile

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from common.io.errors import UserError
from common.training import distributed
from common.training.pod.saved import load_program, save_program
from tests.commands import run
from tests.common.training.test_step import normalised_step

PLAN = {"config": "small", "images_per_device": 2, "global_batch": 8, "step_seconds": [0.1, 0.2]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file, and what the program in it gives for its arguments."""
    path = tmp_path_factory.mktemp("saved") / "step.zip"
    step, state, batch = normalised_step("bfloat16")
    mesh = distributed.make_mesh()
    state = jax.device_put(state, distributed.replicated(mesh))
    # Of a program that came out of the cache XLA's CPU compiler saves only a part.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    compiled = step.lower(state, batch, np.float32(0.5)).compile()
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    save_program(path, compiled, list(mesh.devices.flat), PLAN)
    leaves = jax.device_get(jax.tree.leaves((state, batch, np.float32(0.5))))
    return path, leaves, jax.device_get(jax.tree.leaves(step(state, batch, np.float32(0.5))))


def test_a_saved_step_gives_the_same_bits(saved):
    path, leaves, expected = saved
    program = load_program(path, list(distributed.make_mesh().devices.flat))
    assert program.about == PLAN and len(program.names) == len(leaves)
    given = [
        jax.device_put(x, shape.sharding)
        for x, shape in zip(leaves, program.arguments, strict=True)
    ]
    assert [x.shape for x in program.arguments] == [np.shape(x) for x in leaves]
    for a, b in zip(jax.device_get(program.call(*given)), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    with zipfile.ZipFile(path) as archive:
        assert "all-" in archive.read("program.txt").decode()


def test_a_saved_step_runs_in_another_process(saved):
    path, _, _ = saved
    output = run("scripts.bench.run_program", f"--program={path}", "--steps=2", devices=4)
    assert re.search(r"small, 2 images a device: [\d.]+ ms a step, expected 100 to 200 ms", output)


def changed(path, tmp_path, **fields):
    """A copy of a saved program with other fields in its record."""
    copy = tmp_path / "changed.zip"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "program.json":
                record = json.loads(data)
                for field, values in fields.items():
                    record[field] |= values
                data = json.dumps(record)
            new.writestr(name, data)
    return copy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"versions": {"jaxlib": "0.4.1"}}, "made by jaxlib 0.4.1, found 0.*compile again"),
        ({"devices": {"kind": "TPU v4", "count": 8}}, "made for 8 x TPU v4, found 4 x cpu"),
        ({"devices": {"positions": [[3], [2], [1], [0]]}}, "made for 4 x cpu, found another arr"),
    ],
)
def test_other_versions_and_devices_are_refused(saved, tmp_path, fields, message):
    path = changed(saved[0], tmp_path, **fields)
    with pytest.raises(UserError, match=f"changed.zip: {message}") as refused:
        load_program(path, list(distributed.make_mesh().devices.flat))
    assert "\n" not in str(refused.value)


def test_what_is_no_program_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("{}")
    with pytest.raises(UserError, match="plan.json: .*expected a program of plan_pod --save"):
        load_program(path, jax.devices())
