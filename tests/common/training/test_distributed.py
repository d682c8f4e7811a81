import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from common.io.errors import UserError
from common.training import distributed

ROOT = Path(__file__).parents[3]
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (("host:1", "", ""), "JAX_NUM_PROCESSES, JAX_PROCESS_ID not set"),
        (("", "2", "0"), "JAX_COORDINATOR_ADDRESS not set"),
        (("host", "2", "0"), "expected host:port"),
        (("host:1", "2", "2"), "0 <= id < number"),
        (("host:1", "two", "0"), "0 <= id < number"),
        (("host:1", "2", "-1"), "0 <= id < number"),
    ],
)
def test_incomplete_environment_is_refused_by_name(monkeypatch, values, text):
    for name, value in zip(VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=text):
        distributed.initialize()


def test_one_process_needs_no_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    distributed.initialize()
    distributed.initialize()
    assert jax.process_count() == 1 and distributed.is_main_process()
    distributed.barrier("nobody else")


def test_batches_go_to_the_devices_and_come_back():
    mesh = distributed.make_mesh()
    rows = 2 * mesh.size
    batch = {
        "image": np.arange(rows * 12, dtype=np.uint8).reshape(rows, 2, 2, 3),
        "valid": np.arange(rows) % 2 == 0,
    }
    arrays = distributed.to_global(batch, mesh)
    assert arrays["image"].sharding == distributed.batch_sharded(mesh)
    back = distributed.to_host(arrays)
    for name in batch:
        assert back[name].dtype == batch[name].dtype
        np.testing.assert_array_equal(back[name], batch[name])
    weights = distributed.replicate({"w": np.ones(3)}, mesh)
    assert weights["w"].sharding.is_fully_replicated


PROGRAM_DEVICES_4 = """
import jax, numpy as np
from common.io.errors import UserError
from common.training import distributed
mesh = distributed.make_mesh()
assert mesh.size == 4 and mesh.axis_types == (jax.sharding.AxisType.Auto,)
try:
    distributed.to_global({"image": np.zeros((6, 2))}, mesh)
except UserError as error:
    print(error)
arrays = distributed.to_global({"x": np.arange(8)}, mesh)
np.testing.assert_array_equal(distributed.to_host(arrays)["x"], np.arange(8))
assert distributed.make_mesh(jax.devices()[:2]).size == 2
"""


def test_a_batch_that_does_not_divide_is_refused():
    process = start(PROGRAM_DEVICES_4, {"JAX_NUM_CPU_DEVICES": "4"})
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "image has 6 rows for the 4 devices" in out


PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from common.training import distributed

distributed.initialize()
from common.training.checkpoint import Checkpoints
from common.training.workdir import prepare_workdir
from ml_collections import ConfigDict

workdir = sys.argv[1]
process, count = jax.process_index(), jax.process_count()
mesh = distributed.make_mesh()
prepare_workdir(workdir, {"seed": 0})
distributed.barrier("work directory")
replicated, sharded = distributed.replicated(mesh), distributed.batch_sharded(mesh)
rows = 8 // count
local = np.arange(24, dtype=np.float32).reshape(8, 3)[process * rows : (process + 1) * rows]
batch = distributed.to_global({"x": local}, mesh)
assert batch["x"].shape == (8, 3)
np.testing.assert_array_equal(distributed.to_host(batch)["x"], local)

@jax.jit
def step(state, batch):
    weighted = jnp.sum(batch["x"] * jnp.arange(8.0)[:, None], 0)  # depends on the order of rows
    return {"params": {"w": state["params"]["w"] * 0.5 + weighted}, "step": state["step"] + 1,
            "moments": {"m": batch["x"] * state["step"]}}

zeros = {"params": {"w": np.zeros(3, np.float32)}, "step": np.int32(0)}
state = distributed.replicate(zeros, mesh)
checkpoints = Checkpoints(workdir + "/checkpoints")
for number in range(1, 4):
    state = step({"params": state["params"], "step": state["step"]}, batch)
    checkpoints.save(number, state, {"steps_per_epoch": 1})
    checkpoints.check()
checkpoints.close()

abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
again, extra = Checkpoints(workdir + "/checkpoints").restore(None, abstract)
assert extra == {"steps_per_epoch": 1}
for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state)):
    assert a.sharding == b.sharding
    np.testing.assert_array_equal(distributed.to_host(a), distributed.to_host(b))
read, _ = Checkpoints(workdir + "/checkpoints").restore_params()
np.testing.assert_array_equal(read["params"]["w"], distributed.to_host(state["params"]["w"]))
if process == 0:
    assert Checkpoints(workdir + "/checkpoints").damage(3) == ""  # without the other process
distributed.barrier("read")
print(json.dumps([float(w).hex() for w in distributed.to_host(again["params"]["w"])]))
"""


@pytest.mark.multiprocess
def test_two_processes_equal_one_and_share_checkpoints(tmp_path):
    """Two processes with two devices each hold one batch and one state, as one with four."""
    alone = start(PROGRAM, {"JAX_NUM_CPU_DEVICES": "4"}, tmp_path / "one")
    results = []
    for process in [alone, *start_pair(PROGRAM, tmp_path / "two")]:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        results.append(json.loads(out.splitlines()[-1]))
    assert results[0] == results[1] == results[2]


FAILING = """
import sys
import jax
from common.io.commands import run_main
from common.io.errors import UserError
from common.training import distributed

def main():
    distributed.initialize()
    distributed.barrier("together")
    if jax.process_index() == 1:
        raise UserError("x.jpg: cannot read the image")
    distributed.barrier("without the other")

sys.argv[1:] = []
run_main(main)
"""


@pytest.mark.multiprocess
def test_an_error_in_one_process_ends_all_with_its_reason(tmp_path):
    waiting, failing = start_pair(FAILING)
    begin = time.monotonic()
    _, reason = failing.communicate(timeout=240)
    ended = time.monotonic()
    _, lost = waiting.communicate(timeout=240)
    assert failing.returncode == 1 and waiting.returncode != 0
    assert reason.splitlines()[-1] == "error: x.jpg: cannot read the image", (reason, ended - begin)
    assert time.monotonic() - ended < 20, lost
    name = f"process 1 ({socket.gethostname()})"
    assert f"error: {name} failed: x.jpg: cannot read the image" in lost


def start_pair(program, *arguments):
    """Two processes of one run with two devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        start(
            program,
            {
                "JAX_NUM_CPU_DEVICES": "2",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            },
            *arguments,
        )
        for index in range(2)
    ]


def start(program, environment, *arguments, output=None):
    """`output`: a file for what the process says; None: pipes."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=clean | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment,
        stdout=output or subprocess.PIPE,
        stderr=output or subprocess.PIPE,
        text=True,
    )
