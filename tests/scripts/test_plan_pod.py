"""The real training step compiles for 512 TPU cores, fits them, and moves only what it must."""

import json
import os
import subprocess
import sys

import jax
import pytest

from common.io.errors import UserError
from common.training.pod import topologies
from common.training.pod.places import find_place
from common.training.pod.saved import load_program
from scripts import plan_pod
from tests import tiny
from tests.commands import ROOT, run, start

QUICK = ("photos_lite0", "r50_refine")  # configurations that compile in about two minutes


def test_collectives_are_read_from_the_program_text():
    text = """
  %a = (f32[2,3]{1,0}, f32[]) all-reduce(%x, %y), channel_id=1, replica_groups=[1,2]<=[2]
  %b = bf16[4]{0:T(256)} all-gather-start(%z), dimensions={0}
  %c = f32[7] add(%p, %q), metadata={op_name="all-reduce(fake)"}
"""
    found = {(c.kind, c.dtype): (c.count, c.bytes) for c in topologies.collectives(text)}
    assert found == {("all-reduce", "f32"): (2, 28), ("all-gather", "bf16"): (1, 8)}


def test_traffic_of_a_program_that_jaxlib_cannot_read_is_that_which_is_asked_for():
    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    assert topologies.hlo_text(Unreadable()) is None

    def device(x, y):
        gathered = jax.lax.all_gather(y, "data").sum()
        return jax.lax.psum((x.astype("bfloat16"), y[0], x > 0), "data"), gathered

    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    specs = dict(in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
    arrays = jax.ShapeDtypeStruct((2, 3), "float32"), jax.ShapeDtypeStruct((5,), "int32")
    text = jax.jit(jax.shard_map(device, mesh=mesh, **specs)).lower(*arrays).as_text()
    asked = {(c.kind, c.dtype): (c.bytes, c.largest) for c in topologies.asked_collectives(text)}
    assert asked[("all-reduce", "bf16")] == (12, "bf16[2,3]")
    assert asked[("all-gather", "s32")] == (40, "s32[2,5]")
    # The single number, and truths, which JAX sums as whole numbers.
    assert asked[("all-reduce", "s32")] == (28, "s32[2,3]")


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("v2-8", "v2:2x2"),
        ("v3-8", "v3:2x2"),
        ("v3-32", "v3:4x4"),
        ("v3-128", "v3:8x8"),
        ("v3-512", "v3:16x16"),
        ("v4-8", "v4:2x2x1"),
        ("v4-64", "v4:2x4x4"),
        ("v4-128", "v4:4x4x4"),
        ("v4-1024", "v4:8x8x8"),
        ("v5p-256", "v5p:4x4x8"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5e-256", "v5e:16x16"),
        ("v6e-512", "v6e:16x16"),
    ],
)
def test_names_of_the_cloud_are_shapes_of_the_compiler(name, topology):
    found, options = topologies.topology(find_place(name))
    assert found == topology
    assert ("wrap" in options) == (topology in ("v4:4x4x4", "v4:8x8x8", "v5p:4x4x8"))
    assert options.get("num_slices") == (2 if name == "v6e-512" else None)


@pytest.mark.parametrize("name", ["v9-17", "v3", "v3-512x", "h100"])
def test_an_unknown_slice_is_named(name):
    with pytest.raises(UserError, match=f"'{name}'.*KIND-SIZE.*v3, v4"):
        find_place(name)


@pytest.mark.parametrize("name", ["h100-8", "v3-24"])
def test_what_has_no_compiler_is_refused(name):
    with pytest.raises(UserError, match="roofline only"):
        topologies.topology(find_place(name))


def test_a_plan_without_a_compiler(tmp_path):
    flags = ("--config=tests/tiny.py", "--num_classes=3", "--images_per_device=2", "--price=2")
    output = run(
        "scripts.plan_pod", *flags, "--slice=v6e-16x2", "--nocompile", f"--json={tmp_path}/r.json"
    )
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["devices"], report["chips"], report["hosts"]) == (32, 32, 8)
    low, high = report["step_seconds"]
    assert 0 < sum(report["bound_seconds"].values()) < low < high
    assert {"sum of gradients over links", "sum of gradients over network"} <= set(
        report["bound_seconds"]
    )
    assert 0 < report["mfu"][0] < report["mfu"][1] < 1
    assert "chip-hours, cost" in output and "images/s a host" in output
    assert "batch of 64, 2 a device; config.data.batch_size is 4" in output


def test_steps_of_either_kind_are_planned_by_themselves():
    """An epoch is one of the photos with boxes: here of 25 such steps, and 100 others."""
    config = tiny.get_config("weak")
    config.data.label_steps.share, config.optimizer.num_epochs = 0.8, 2.0
    reports = [
        plan_pod.plan(config, "v3-8", 3, 2, photos=390, labels_only=labels_only)[0]
        for labels_only in (False, True)
    ]
    assert [report["steps"] for report in reports] == [50, 200]
    assert [report["steps_of_run"] for report in reports] == [250, 250]
    step = plan_pod.make_step(config, jax.make_mesh((1,), ("data",)), 3, 2)
    assert "apart" in step.state.opt_state.inner_states  # as in training


@pytest.mark.parametrize("flag", ["--search=batch", "--save=program.zip"])
def test_what_only_the_compiler_knows_is_refused_without_it(flag):
    process = start("scripts.plan_pod", "--config=tests/tiny.py", "--nocompile", flag)
    output, _ = process.communicate(timeout=120)
    name = flag.split("=")[0]
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith(f"error: {name}: found --nocompile, expected the c")


def test_a_batch_is_searched_in_multiples_of_its_parts(monkeypatch, capsys):
    def compile_step(config, where, num_classes, images, labels_only):
        assert (config.name, where.kind, num_classes, labels_only) == ("tiny", "v3", 3, False)
        if images > 40:
            raise plan_pod.DoesNotFit("CompileTimeHbmOom")
        needed = {"total": int((1 + 0.4 * images) * 2**30), "arguments": 2**29, "code": 0}
        return plan_pod.CompiledStep(images, {"memory_bytes": needed}, None, None)

    monkeypatch.setattr(plan_pod, "compile_train_step", compile_step)
    config, where = tiny.get_config(), find_place("v3-8")
    config.optimizer.accumulate = 4
    step, tried = plan_pod.search_batch(config, where, 3, 2)
    assert step.images_per_device == 36
    assert [t["images_per_device"] for t in tried if t["fits"]][-1] == 36
    assert tried[-1] == {"images_per_device": 40, "bytes": 17 * 2**30, "fits": False}
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("search (times 4 images a device): 1 need 2.60 of 16.00 GiB")
    config.optimizer.accumulate = 64
    with pytest.raises(
        UserError, match="tiny: found no batch that fits 16 GiB, not even 64 images"
    ):
        plan_pod.search_batch(config, where, 3, 2)


@pytest.mark.slow
@pytest.mark.tpu_backend
def test_a_program_is_saved_for_its_slice_alone(tmp_path):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: scripts/test --peers")
    path, report_file = tmp_path / "program.zip", tmp_path / "report.json"
    output = run(
        "scripts.plan_pod",
        *("--config=tests/tiny.py", "--config.optimizer.reduce_dtype=bfloat16", "--slice=v5e-4"),
        *("--num_classes=3", "--images_per_device=2", f"--save={path}", f"--json={report_file}"),
    )
    assert f"program in {path}" in output
    report = json.loads(report_file.read_text())
    moved = {c["dtype"]: c["bytes"] for c in report["collectives"]}
    assert 0.99 < moved["bf16"] / (2 * report["parameters"]) <= 1 and moved["f32"] < 1024
    with pytest.raises(UserError, match="program.zip: made for 4 x TPU v5 lite, found 4 x cpu"):
        load_program(path, jax.devices()[:4])


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
