"""The real training step compiles for 512 TPU cores, fits them, and moves only what it must."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from common.io.errors import UserError
from common.training.pod import topologies

ROOT = Path(__file__).parents[2]
QUICK = ("photos_lite0", "r50_refine")  # configurations that compile in about two minutes


def test_collectives_are_read_from_the_program_text():
    text = """
  %a = (f32[2,3]{1,0}, f32[]) all-reduce(%x, %y), channel_id=1, replica_groups=[1,2]<=[2]
  %b = bf16[4]{0:T(256)} all-gather-start(%z), dimensions={0}
  %c = f32[7] add(%p, %q), metadata={op_name="all-reduce(fake)"}
"""
    found = {(c.kind, c.dtype): (c.count, c.bytes) for c in topologies.collectives(text)}
    assert found == {("all-reduce", "f32"): (2, 28), ("all-gather", "bf16"): (1, 8)}


def test_traffic_of_a_program_that_jaxlib_cannot_read_is_unknown():
    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    assert topologies.traffic(Unreadable()) is None


def test_an_unknown_slice_is_named():
    with pytest.raises(UserError, match="v9-17.*v3-512"):
        topologies.slice_devices("v9-17")


@pytest.mark.slow
@pytest.mark.tpu_backend
@pytest.mark.parametrize(
    ("config", "images"),
    [("photos_lite0", 4), ("r50_refine", 2), ("r50", 2), ("r50_dh", 2), ("r50_cascade4", 2)],
)
def test_the_step_for_512_devices_fits_and_moves_only_gradients(config, images, tmp_path, request):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: scripts/test --peers")
    if config not in QUICK and not request.config.getoption("all_pods"):
        pytest.skip("compiles for minutes: --all_pods")
    report_file = tmp_path / "report.json"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    # A process of its own: only one may hold the TPU compiler.
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "scripts.plan_pod",
            f"--config=configs/detection/{config}.py",
            "--slice=v3-512",
            "--num_classes=500",
            f"--images_per_device={images}",
            f"--json={report_file}",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(report_file.read_text())
    assert (report["devices"], report["global_batch"]) == (512, 512 * images)
    assert report["canvas"] == ([256, 256] if config == "photos_lite0" else [800, 1344])
    assert report["memory_bytes"]["total"] < 16 * 2**30
    assert {c["kind"] for c in report["collectives"]} == {"all-reduce"}
    moved = {c["dtype"]: c["bytes"] for c in report["collectives"]}
    gradients = 4 * report["parameters"]  # float32
    # Frozen parameters have no gradient; losses, counts and figures are a few scalars.
    assert moved["f32"] <= gradients + 1024
    assert sum(moved.values()) <= gradients + 2048
