"""Peaks by the names that JAX gives devices, FLOPs by canvas, memory in use."""

import types

import jax
import jax.numpy as jnp
import pytest

from common.training import hardware
from common.training.distributed import make_mesh


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 80GB HBM3", 989),
    ],
)
def test_peaks_follow_the_kind(kind, tflops):
    assert hardware.peak_flops(kind) == tflops * 1e12


def test_a_cpu_has_no_peak_and_no_memory_figures():
    assert hardware.peak_flops("cpu") is None
    mesh = make_mesh()
    assert hardware.device_memory(mesh) == {}
    count = hardware.step_flops(jax.jit(lambda state, batch: state), mesh)
    assert count(None, {"image": jnp.zeros((1, 2, 2, 3))}) == 0.0


def device(**stats):
    return types.SimpleNamespace(
        device_kind="TPU v4", platform="tpu", memory_stats=lambda: stats or None
    )


def test_the_fullest_device_counts():
    devices = [device(peak_bytes_in_use=2**30), device(peak_bytes_in_use=3 * 2**30), device()]
    mesh = types.SimpleNamespace(local_devices=devices)
    assert hardware.device_memory(mesh) == {"device_memory_gib": 3.0}


def test_flops_are_counted_once_for_each_canvas():
    traced = []

    @jax.jit
    def step(state, batch):
        traced.append(batch["image"].shape)
        return batch["image"].reshape(1, -1) @ state

    mesh = types.SimpleNamespace(devices=types.SimpleNamespace(flat=[device()]))
    count = hardware.step_flops(step, mesh)
    for side in (2, 2, 4):
        state = jnp.zeros((side * side * 3, 5))
        assert count(state, {"image": jnp.zeros((1, side, side, 3))}) == 2 * side * side * 3 * 5
    assert len(traced) == 2
