"""Times deformable convolution and deformable RoI pooling against torchvision's CPU operators.

    python -m scripts.bench.bench_deform

Needs torch and torchvision in the same environment. Batch 2, float32. Convolutions: the 3x3 ones of
ResNet-50's c3, c4 and c5 for images of 512 x 512, offsets of about one cell, forward alone and with
the gradients of all arrays. RoI pooling: 512 RoIs per image over P2 to P5, 7 x 7 bins of 2 x 2
samples, offsets of about 5 % of the RoI. torchvision has no such operator; its peer is put together
from grid_sample, level after level.

Prints the medians of each side, taken in turns in one process, and their ratio (below 1: ours is
faster), and exits with status 1 when values or gradients differ by more than 0.001 of the largest.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from common.geometry import roi_align
from common.geometry.deform_roi import deform_roi_align
from common.io.commands import run_main
from common.nn.layers.deform_conv import deform_conv2d
from scripts.bench.bench_roi_align import random_rois
from scripts.bench.timing import compare

BATCH = 2
# (tap, side of the map, channels)
CONVOLUTIONS = (("c3", 64, 128), ("c4", 32, 256), ("c5", 16, 512))
STRIDES = (4, 8, 16, 32)
SIZE, CHANNELS, ROIS, BINS, SAMPLES = 512, 256, 512, 7, 2
_TOLERANCE = 1e-3
Calls = tuple[Callable[[], Any], Callable[[], Any]]  # forward; forward with backward


def torch_calls(function: Callable, arrays: Sequence, gradient) -> Calls:
    """Forward alone, and forward with the gradients of `arrays`, which the second one returns."""
    import torch

    def forward():
        with torch.no_grad():
            return function(*arrays)

    def both():
        output = function(*arrays)
        return output.detach(), torch.autograd.grad(
            output, arrays, gradient, allow_unused=True, materialize_grads=True
        )

    return forward, both


def our_calls(function: Callable, arrays: Sequence, gradient) -> Calls:
    """Like `torch_calls`."""
    forward = jax.jit(function)
    arrays, gradient = jax.device_put((tuple(arrays), gradient))

    @jax.jit
    def both(arrays, gradient):
        output, transpose = jax.vjp(function, *arrays)
        return output, transpose(gradient)

    return (
        lambda: jax.block_until_ready(forward(*arrays)),
        lambda: jax.block_until_ready(both(arrays, gradient)),
    )


def report(name: str, ours: Calls, theirs: Calls, error: float) -> None:
    """Prints the times of forward and of forward with backward, and their ratio."""
    print(f"{name}: largest difference {error:.1e}")
    for title, mine, peer in zip(("forward", "forward + backward"), ours, theirs, strict=True):
        compare(title, {"ours": mine, "torchvision": peer}, flags.FLAGS.runs)


def difference(ours, theirs) -> float:
    """Largest difference of two lists of arrays, each as a share of the array's largest value."""
    tiny = np.finfo(np.float32).tiny  # a level without RoIs has gradient 0 on both sides
    return max(
        np.abs(np.asarray(a) - b).max() / max(np.abs(b).max(), tiny)
        for a, b in zip(ours, theirs, strict=True)
    )


def bench_convolution(name: str, side: int, channels: int, groups: int, version: int) -> float:
    """Times one shape; returns the largest difference."""
    import torch
    import torchvision

    rng = np.random.default_rng(0)
    shapes = (
        (BATCH, side, side, channels),
        (BATCH, side, side, 18),
        (3, 3, channels // groups, channels),
        (BATCH, side, side, 9),
        (BATCH, side, side, channels),
    )
    *arrays, gradient = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    arrays[2] /= 3 * np.sqrt(channels // groups)
    if version == 1:
        del arrays[3]
    axes = [(3, 2, 0, 1) if i == 2 else (0, 3, 1, 2) for i in range(len(arrays))]
    tensors = [
        torch.from_numpy(a.transpose(order).copy()).requires_grad_()
        for a, order in zip(arrays, axes, strict=True)
    ]

    def torch_conv(x, offsets, kernel, mask=None):
        return torchvision.ops.deform_conv2d(x, offsets, kernel, padding=1, mask=mask)

    def our_conv(x, offsets, kernel, mask=None):
        return deform_conv2d(x, offsets, kernel, mask=mask, padding=1, groups=groups)

    theirs = torch_calls(
        torch_conv, tensors, torch.from_numpy(gradient.transpose(0, 3, 1, 2).copy())
    )
    ours = our_calls(our_conv, arrays, gradient)
    output, gradients = theirs[1]()
    expected = [output.numpy().transpose(0, 2, 3, 1)] + [
        g.numpy().transpose(np.argsort(order)) for g, order in zip(gradients, axes, strict=True)
    ]
    output, gradients = ours[1]()
    error = difference([output, *gradients], expected)
    report(f"deform_conv2d {name}", ours, theirs, error)
    return error


def bench_roi_pooling() -> float:
    """Times the pooling; returns the largest difference."""
    import torch

    rng = np.random.default_rng(0)
    maps = [
        rng.normal(size=(BATCH, SIZE // s, SIZE // s, CHANNELS)).astype(np.float32) for s in STRIDES
    ]
    boxes = random_rois(rng, BATCH, ROIS, SIZE)
    offsets = 0.05 * rng.normal(size=(BATCH, ROIS, BINS, BINS, 2)).astype(np.float32)
    gradient = rng.normal(size=(BATCH, ROIS, BINS, BINS, CHANNELS)).astype(np.float32)
    tensors = [torch.from_numpy(m.transpose(0, 3, 1, 2).copy()).requires_grad_() for m in maps]
    torch_boxes = [torch.from_numpy(image) for image in boxes]

    def pool(*maps):
        return deform_roi_align(
            maps[:-1], boxes, maps[-1], STRIDES, output_size=BINS, sampling_ratio=SAMPLES
        )

    ours = our_calls(pool, [*maps, offsets], gradient)
    flat_gradient = gradient.reshape(-1, BINS, BINS, CHANNELS).transpose(0, 3, 1, 2)
    levels = np.asarray(roi_align.assign_levels(jax.numpy.asarray(boxes))) - 2
    groups = [
        (b, level, torch.from_numpy(np.flatnonzero(levels[b] == level)))
        for b, level in np.ndindex(BATCH, len(STRIDES))
        if np.any(levels[b] == level)
    ]
    steps = torch.from_numpy(np.array(roi_align.sample_steps(BINS, SAMPLES)))
    # (bin row, bin column, sample row, sample column, x and y)
    steps = torch.stack(
        torch.broadcast_tensors(steps[None, :, None, :], steps[:, None, :, None]), dim=-1
    )

    def sampled(*arrays):
        *maps, offsets = arrays
        pooled = []
        for b, level, rois in groups:
            boxes = torch_boxes[b][rois][:, None, None, None, None]
            points = steps + offsets[b, rois][:, :, :, None, None]
            points = boxes[..., :2] + (boxes[..., 2:] - boxes[..., :2]) * points
            reach = STRIDES[level] / 2  # RoIAlign's rule: a cell beyond the centre of the last one
            inside = ((points >= -reach) & (points <= SIZE + reach)).all(-1)
            values = torch.nn.functional.grid_sample(
                maps[level][b : b + 1],
                (points * (2 / SIZE) - 1).reshape(1, len(rois), -1, 2),
                padding_mode="border",
                align_corners=False,
            )
            values = (values * inside.reshape(1, 1, len(rois), -1)).reshape(
                CHANNELS, len(rois), BINS, BINS, -1
            )
            pooled.append(values.mean(-1).transpose(0, 1))
        return torch.cat(pooled)

    order = torch.cat([b * ROIS + rois for b, _, rois in groups]).numpy()
    leaf = torch.from_numpy(offsets).requires_grad_()
    composed = torch_calls(sampled, [*tensors, leaf], torch.from_numpy(flat_gradient[order].copy()))
    output, gradients = composed[1]()
    expected = [g.numpy() for g in gradients]
    expected[:-1] = [g.transpose(0, 2, 3, 1) for g in expected[:-1]]
    values, our_gradients = ours[1]()
    values = np.asarray(values).reshape(-1, BINS, BINS, CHANNELS)[order]
    error = difference([values, *our_gradients], [output.numpy().transpose(0, 2, 3, 1), *expected])
    report("deformable RoI pooling", ours, composed, error)
    return error


def main() -> int:
    import torch

    torch.set_num_threads(flags.FLAGS.torch_threads)
    errors = []
    for tap, side, channels in CONVOLUTIONS:
        for version in (1, 2):
            name = f"v{version}, {tap}: {side} x {side}, {channels} channels"
            errors.append(bench_convolution(name, side, channels, 1, version))
    errors.append(bench_convolution("v1, ResNeXt-101 c4: 1024 in 32 groups", 32, 1024, 32, 1))
    errors.append(bench_roi_pooling())
    return int(max(errors) > _TOLERANCE)


def define_flags() -> None:
    flags.DEFINE_integer("runs", 5, "Timed calls of each side.")
    flags.DEFINE_integer("torch_threads", 2, "torch threads (JAX takes the cores it may use).")


if __name__ == "__main__":
    define_flags()
    run_main(main)
