"""The same function on the accelerator and on the CPU, both in float32 with exact products."""

import concurrent.futures
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from scripts.bench.device.report import Report

LIMIT = 1e-4  # of kernels: sums in another order


def on_both(function: Callable, *arguments: Any) -> tuple[Any, Any]:
    """Results, as NumPy arrays, on the default device and on the first CPU.

    Args:
      function: what JAX can trace; forms that suit the platform are chosen for each.
      arguments: NumPy arrays.
    """

    def on(device: jax.Device) -> Any:
        with jax.default_matmul_precision("highest"), jax.default_device(device):
            return jax.device_get(jax.jit(function)(*jax.device_put(arguments, device)))

    devices = dict.fromkeys([jax.devices()[0], jax.devices("cpu")[0]])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # they compile side by side
        results = list(pool.map(on, devices))
    return results[0], results[-1]


def relative_error(ours: Any, reference: Any) -> float:
    """||ours - reference|| / ||reference|| over all floats of two trees; not a number stays one."""
    total = of = 0.0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        if np.issubdtype(b.dtype, np.floating):
            a, b = a.astype(np.float64), b.astype(np.float64)
            total, of = total + float(np.sum((a - b) ** 2)), of + float(np.sum(b**2))
    return float(np.sqrt(total) / max(np.sqrt(of), 1e-30))


def decisions(ours: Any, reference: Any) -> tuple[int, int]:
    """How many bools and integers of two trees differ, of how many."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)
    exact = [(a, b) for a, b in pairs if not np.issubdtype(b.dtype, np.floating)]
    return sum(int(np.sum(a != b)) for a, b in exact), sum(b.size for _, b in exact)


def compare(
    report: Report, name: str, function: Callable, *arguments: Any, limit: float = LIMIT
) -> None:
    """Reports how far the device's floats are from the CPU's, and how many decisions differ."""
    ours, reference = on_both(function, *arguments)
    error = relative_error(ours, reference)
    differing, total = decisions(ours, reference)
    figures: dict[str, Any] = {"error": error, "limit": limit} if error else {"error": 0.0}
    if total:
        figures |= {"differing": differing, "of": total}
    report.line(name, **figures, ok=error <= limit and differing <= 1e-4 * total)


def with_gradients(function: Callable) -> Callable:
    """Of `function(fixed, *arrays)`: `(gradient, fixed, *arrays)` -> (result, gradients of arrays).

    All are arguments: what a program holds as constants is computed when it is compiled.
    """

    def both(gradient, fixed, *arrays):
        result, transpose = jax.vjp(lambda *arrays: function(fixed, *arrays), *arrays)
        return result, transpose(gradient)

    return both
