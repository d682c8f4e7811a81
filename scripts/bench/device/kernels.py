"""Kernels alone, in their forms, beside torchvision's on the same device; the device's peaks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.geometry import nms, roi_align
from scripts.bench.bench_nms import random_case
from scripts.bench.bench_roi_align import random_rois
from scripts.bench.device.clock import Side, time_sides
from scripts.bench.device.compared import with_gradients
from scripts.bench.device.correct_kernels import BINS, STRIDES, convolve, pyramid, shifted_crop
from scripts.bench.device.detectors import free_torch, torch_device, torch_side
from scripts.bench.device.programs import matrix_rate
from scripts.bench.device.report import Report
from scripts.bench.device.sizes import Sizes

_NMS_TILES = (64, 256, 1024, 2048)
_ROI_METHODS = ("gather", "tiles")


def jax_side(function: Callable, *arguments: Any) -> Side:
    arguments = jax.device_put(arguments)
    jitted = jax.jit(function)
    return Side(lambda: jitted(*arguments), jax.block_until_ready)


def report_sides(report: Report, size: Sizes, name: str, sides: dict[str, Side]) -> None:
    """Times in turns; the speed-up is that of our best form over torchvision."""
    times = time_sides(sides, size)
    figures: dict[str, Any] = {}
    for side, taken in times.items():
        figures |= taken.figures(side)
    if "torchvision" in times:
        best = min(t.median for side, t in times.items() if side != "torchvision")
        figures["speed_up"] = times["torchvision"].median / best
    report.line(name, **figures)


def measure_peaks(report: Report, size: Sizes) -> None:
    device = jax.devices()[0]
    report.line("device", kind=device.device_kind, platform=device.platform)
    report.line("matrix product", tflop_per_second=matrix_rate(size) / 1e12)
    x = jnp.ones((size.matrix, 4 * size.matrix), jnp.bfloat16)
    taken = time_sides({"copy": jax_side(lambda x: x + 1, x)}, size)["copy"]
    report.line("copy", tb_per_second=2 * x.nbytes / taken.median / 1e12)


def time_nms(report: Report, size: Sizes) -> None:
    import torch
    import torchvision

    rng = np.random.default_rng(0)
    for group, classes in ((1, 500), (8, 500), (8, 1)):
        arrays = random_case(rng, (size.images, size.boxes), classes, group)
        sides = {
            f"tile_{tile}": jax_side(
                jax.vmap(lambda b, s, c, t=tile: nms.nms_mask(b, s, s >= 0, 0.5, c, tile=t)),
                *arrays,
            )
            for tile in _NMS_TILES
        }
        tensors = [torch.from_numpy(a).to(torch_device()) for a in arrays]

        def theirs(tensors=tensors):
            for image in zip(*tensors, strict=True):
                torchvision.ops.batched_nms(*image, 0.5)

        sides["torchvision"] = torch_side(theirs)
        report_sides(report, size, f"NMS, {classes} classes, {group} boxes an object", sides)


def time_roi_align(report: Report, size: Sizes) -> None:
    import torch
    import torchvision

    rng = np.random.default_rng(0)
    side = size.canvas[0]
    maps = pyramid(rng, size.images, side, size.channels)
    boxes = random_rois(rng, size.images, size.rois, side)
    gradient = rng.normal(size=(*boxes.shape[:2], BINS, BINS, size.channels)).astype(np.float32)
    device = torch_device()
    pool = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], BINS, 2)
    theirs = {
        str(i): torch.from_numpy(m).to(device).permute(0, 3, 1, 2).requires_grad_()
        for i, m in enumerate(maps)
    }
    rois = [torch.from_numpy(image).to(device) for image in boxes]
    flat = gradient.reshape(-1, BINS, BINS, size.channels).transpose(0, 3, 1, 2)
    torch_gradient = torch.from_numpy(flat.copy()).to(device)

    def torch_forward():
        with torch.no_grad():
            return pool(theirs, rois, [(side, side)] * size.images)

    def torch_both():
        output = pool(theirs, rois, [(side, side)] * size.images)
        return torch.autograd.grad(output, list(theirs.values()), torch_gradient)

    def ours(method: str, dtype: Any, backward: bool) -> Side:
        def forward(boxes, *maps):
            return roi_align.roi_align(maps, boxes, STRIDES, aligned=False, method=method)

        cast = [jnp.asarray(m, dtype) for m in maps]
        if not backward:
            return jax_side(forward, boxes, *cast)
        return jax_side(with_gradients(forward), jnp.asarray(gradient, dtype), boxes, *cast)

    for backward, peer in ((False, torch_forward), (True, torch_both)):
        methods = _ROI_METHODS if not backward else _ROI_METHODS[:1]
        sides = {method: ours(method, jnp.float32, backward) for method in methods}
        sides["bfloat16"] = ours("gather", jnp.bfloat16, backward)
        sides["torchvision"] = torch_side(peer)
        name = "RoIAlign" + (" and its gradient" if backward else "")
        report_sides(report, size, name, sides)
    free_torch()


def time_deform(report: Report, size: Sizes) -> None:
    import torch
    import torchvision

    rng = np.random.default_rng(0)
    channels = size.channels
    shape = (size.images, size.canvas[0] // 16, size.canvas[1] // 16)
    widths = (channels, 18, 9, channels)
    x, offsets, mask, gradient = (rng.normal(size=(*shape, c)).astype(np.float32) for c in widths)
    kernel = rng.normal(size=(3, 3, channels, channels)).astype(np.float32) / (3 * channels**0.5)
    device = torch_device()
    arrays = (x, offsets, kernel, mask)
    orders = ((0, 3, 1, 2), (0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    tensors = [
        torch.from_numpy(a.transpose(order).copy()).to(device).requires_grad_()
        for a, order in zip(arrays, orders, strict=True)
    ]
    torch_gradient = torch.from_numpy(gradient.transpose(0, 3, 1, 2).copy()).to(device)

    def torch_forward():
        x, offsets, kernel, mask = tensors
        return torchvision.ops.deform_conv2d(x, offsets, kernel, padding=1, mask=mask)

    def torch_both():
        return torch.autograd.grad(torch_forward(), tensors, torch_gradient)

    half = [jnp.asarray(x, jnp.bfloat16), offsets, jnp.asarray(kernel, jnp.bfloat16), mask]
    for backward, peer in ((False, torch_forward), (True, torch_both)):
        sides = {}
        for name, values in (("ours", arrays), ("bfloat16", half)):
            cast = jnp.asarray(gradient, jnp.float32 if name == "ours" else jnp.bfloat16)
            both = with_gradients(convolve)
            sides[name] = (
                jax_side(both, cast, (), *values) if backward else jax_side(convolve, (), *values)
            )
        sides["torchvision"] = torch_side(peer)
        title = "deformable convolution" + (" and its gradients" if backward else "")
        report_sides(report, size, title, sides)
    free_torch()


def time_deform_roi(report: Report, size: Sizes) -> None:
    """Ours alone: torchvision has none."""
    rng = np.random.default_rng(0)
    side = size.canvas[0]
    maps = pyramid(rng, size.images, side, size.channels)
    boxes = random_rois(rng, size.images, size.rois, side)
    bins = (*boxes.shape[:2], BINS, BINS)
    offsets = 0.05 * rng.normal(size=(*bins, 2)).astype(np.float32)
    gradient = rng.normal(size=(*bins, size.channels)).astype(np.float32)

    forward = {"ours": jax_side(shifted_crop, boxes, offsets, *maps)}
    report_sides(report, size, "deformable RoI pooling", forward)
    both = {"ours": jax_side(with_gradients(shifted_crop), gradient, boxes, offsets, *maps)}
    report_sides(report, size, "deformable RoI pooling and its gradients", both)
