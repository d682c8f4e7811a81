"""Kernels and operators on the device against the CPU."""

from typing import Any

import jax
import numpy as np

from common.geometry import nms
from common.geometry.deform_roi import deform_roi_align
from common.geometry.roi_align import roi_align
from common.nn.layers.deform_conv import deform_conv2d
from ensemble.operators import AdjNms, Nms, Nmw, SoftNms, Voting, WeightedBoxesFusion
from scripts.bench.bench_nms import random_case
from scripts.bench.bench_roi_align import random_rois
from scripts.bench.device.compared import compare, with_gradients
from scripts.bench.device.report import Report
from scripts.bench.device.sizes import Sizes
from scripts.bench.device.worker import Case

STRIDES = (4, 8, 16, 32)
BINS = 7
IMAGE = 256  # side of the images that kernels are compared on
MODELS = 5
OPERATORS = {
    "nms": Nms(0.55),
    "soft_nms linear": SoftNms("linear", iou_threshold=0.3),
    "soft_nms gaussian": SoftNms("gaussian", sigma=0.1),
    "adj_nms": AdjNms(0.55),
    "wbf": WeightedBoxesFusion((1.0,) * MODELS, 0.55),
    "nmw": Nmw(0.55),
    "voting": Voting(iou_threshold=0.55),
}


def pyramid(rng: np.random.Generator, images: int, size: int, channels: int) -> list[np.ndarray]:
    shapes = [(images, size // s, size // s, channels) for s in STRIDES]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def crop(boxes: Any, *maps: Any) -> jax.Array:
    return roi_align(maps, boxes, STRIDES)


def shifted_crop(boxes: Any, offsets: Any, *maps: Any) -> jax.Array:
    return deform_roi_align(maps, boxes, offsets, STRIDES)


def convolve(_: Any, x: Any, offsets: Any, kernel: Any, mask: Any = None) -> jax.Array:
    return deform_conv2d(x, offsets, kernel, mask=mask, padding=1)


def check_nms(report: Report, size: Sizes) -> None:
    rng = np.random.default_rng(0)
    for group in (1, 8):
        boxes, scores, classes = random_case(rng, (2, size.boxes), 20, group)
        compare(
            report,
            f"nms, {group} boxes an object",
            jax.vmap(lambda b, s, c: nms.nms_mask(b, s, s >= 0, 0.5, c)),
            *(boxes, scores, classes),
        )


def check_roi_align(report: Report, size: Sizes) -> None:
    rng = np.random.default_rng(1)
    maps = pyramid(rng, 2, IMAGE, size.channels)
    boxes = random_rois(rng, 2, size.rois // 4, IMAGE)
    gradient = rng.normal(size=(*boxes.shape[:2], BINS, BINS, size.channels)).astype(np.float32)
    compare(report, "RoIAlign and its gradient", with_gradients(crop), gradient, boxes, *maps)
    offsets = 0.05 * rng.normal(size=(*boxes.shape[:2], BINS, BINS, 2)).astype(np.float32)
    pool = with_gradients(shifted_crop)
    name = "deformable RoI pooling and its gradients"
    compare(report, name, pool, gradient, boxes, offsets, *maps)


def check_deform_conv(report: Report, size: Sizes) -> None:
    rng = np.random.default_rng(2)
    side, channels = IMAGE // 16, size.channels
    shape = (2, side, side)
    x, offsets, mask, gradient = (
        rng.normal(size=(*shape, c)).astype(np.float32) for c in (channels, 18, 9, channels)
    )
    kernel = rng.normal(size=(3, 3, channels, channels)).astype(np.float32) / (3 * channels**0.5)

    both, name = with_gradients(convolve), "deformable convolution and its gradients"
    compare(report, name, both, gradient, (), x, offsets, kernel)
    compare(report, f"{name}, version 2", both, gradient, (), x, offsets, kernel, mask)


def check_operators(report: Report, size: Sizes) -> None:
    rng = np.random.default_rng(3)
    boxes, scores, _ = random_case(rng, (size.groups, size.group_size), 1, 8)
    boxes /= 1000
    models = rng.integers(0, MODELS, scores.shape).astype(np.int32)
    valid = np.arange(size.group_size) < rng.integers(1, size.group_size + 1, (size.groups, 1))
    for name, operator in OPERATORS.items():
        compare(report, name, operator.__call__, boxes, scores, models, valid)


CASES = (
    Case("nms", 40, check_nms),
    Case("RoIAlign", 40, check_roi_align),
    Case("deformable convolution", 40, check_deform_conv),
    Case("operators", 60, check_operators),
)
