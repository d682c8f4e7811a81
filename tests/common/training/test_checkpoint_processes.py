"""Checkpoints of processes: a full disk, a kill in the middle of a save, other devices."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from common.training.checkpoint import Checkpoints
from common.training.distributed import batch_sharded, make_mesh

ROOT = Path(__file__).parents[3]


FILL_THE_DISK = """
import sys
import numpy as np
from common.io.commands import run_main
from common.training.checkpoint import Checkpoints

directory = sys.argv.pop()

def main():
    checkpoints = Checkpoints(directory)
    state = {"params": {"w": np.random.default_rng(0).integers(0, 2**60, 150_000)}}
    for step in (1, 2, 3, 4):
        checkpoints.save(step, state, {})
    checkpoints.close()

run_main(main)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk_ends_the_process_with_one_line(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        process = run_script(FILL_THE_DISK, disk / "checkpoints")
        out, err = process.communicate(timeout=120)
        assert process.returncode == 1, err
        lines = [line for line in err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and "disk full" in lines[0], err
        assert "earlier checkpoint 2 is intact" in lines[0]
        assert "Traceback" not in err
        checkpoints = Checkpoints(disk / "checkpoints")
        assert checkpoints.latest_step() == 2
        assert checkpoints.restore_params()[0]["params"]["w"].shape == (150_000,)
        assert len(list((disk / "checkpoints").iterdir())) == 2  # the failed one is cleared away
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


SAVE_UNTIL_KILLED = """
import sys
import numpy as np
from common.training.checkpoint import Checkpoints

checkpoints = Checkpoints(sys.argv[1])
rng = np.random.default_rng(0)
for step in range(1, 100):
    state = {"params": {"w": np.full(2_000_000, step), "v": rng.normal(size=2_000_000)}}
    checkpoints.save(step, state, {"step": step})
"""


def test_kill_during_a_save_loses_only_that_save(tmp_path):
    process = run_script(SAVE_UNTIL_KILLED, tmp_path / "checkpoints")
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "1" / "commit_success.txt").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    while not list((tmp_path / "checkpoints").glob("*-tmp*")):
        assert time.monotonic() < deadline and process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    latest = checkpoints.latest_step()
    variables, extra = checkpoints.restore_params()
    assert extra == {"step": latest}
    np.testing.assert_array_equal(variables["params"]["w"], latest)
    checkpoints.save(latest + 1, {"params": variables["params"]}, {}, wait=True)
    checkpoints.close()
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert all(name.isdecimal() for name in names) and str(latest + 1) in names


RESTORE_ON_OTHER_DEVICES = """
import sys
import jax, numpy as np
from common.training.checkpoint import Checkpoints
from common.training.distributed import batch_sharded, make_mesh

mesh = make_mesh()
shape = jax.ShapeDtypeStruct((8, 3), np.float32, sharding=batch_sharded(mesh))
state, _ = Checkpoints(sys.argv[1]).restore(1, {"params": {"w": shape}})
assert state["params"]["w"].sharding.num_devices == mesh.size == int(sys.argv[2])
np.testing.assert_array_equal(state["params"]["w"], np.arange(24).reshape(8, 3))
"""


@pytest.mark.parametrize("devices", [4])
def test_restore_on_another_number_of_devices(tmp_path, devices):
    rows = jax.device_put(
        np.arange(24, dtype=np.float32).reshape(8, 3), batch_sharded(make_mesh(jax.devices()[:1]))
    )
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"params": {"w": rows}}, {})
    checkpoints.close()
    process = run_script(RESTORE_ON_OTHER_DEVICES, tmp_path, str(devices), devices=devices)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def run_script(script, *arguments, devices=1):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
