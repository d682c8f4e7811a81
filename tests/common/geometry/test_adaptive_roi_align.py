"""RoIAlign with a sample a cell: the usual form where all regions need as many; torchvision's."""

import functools

import jax
import numpy as np
import pytest

from common.geometry.adaptive_roi_align import adaptive_roi_align
from common.geometry.roi_align import roi_align
from tests.common.geometry.test_roi_align import STRIDES, make_boxes, make_features


@functools.partial(jax.jit, static_argnames="aligned")
def crop_and_gradients(features, boxes, gradient, aligned):
    def crop(features):
        return adaptive_roi_align(features, boxes, STRIDES, output_size=7, aligned=aligned)

    output, transpose = jax.vjp(crop, features)
    return output, transpose(gradient)[0]


def test_regions_that_need_three_samples_get_three():
    features = make_features(3)
    corner = np.random.default_rng(4).uniform(0, 60, (2, 70, 2))
    boxes = np.concatenate([corner, corner + 4 * 7 * 2.9], -1).astype(np.float32)  # 2.9 cells a bin
    found = adaptive_roi_align(features, boxes, STRIDES, output_size=7)
    expected = roi_align(features, boxes, STRIDES, output_size=7, sampling_ratio=3, method="einsum")
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("aligned", [True, False])
def test_values_and_gradients_are_torchvisions(aligned):
    torch = pytest.importorskip("torch", reason="optional peer")
    ops = pytest.importorskip("torchvision.ops", reason="optional peer")
    features, boxes = make_features(0), make_boxes(1)
    gradient = np.random.default_rng(2).normal(size=(*boxes.shape[:2], 7, 7, 3)).astype(np.float32)
    found, found_gradients = crop_and_gradients(features, boxes, gradient, aligned)

    maps = [torch.tensor(f.transpose(0, 3, 1, 2), requires_grad=True) for f in features]
    sides = np.maximum(boxes[..., 2:] - boxes[..., :2], 0).prod(-1) ** 0.5
    with np.errstate(divide="ignore"):
        levels = np.clip(np.floor(4 + np.log2(sides / 224) + 1e-6), 2, 5) - 2
    expected = np.zeros_like(found)
    for level, (feature, stride) in enumerate(zip(maps, STRIDES, strict=True)):
        image, row = (levels == level).nonzero()
        rois = torch.from_numpy(np.column_stack([image, boxes[image, row]]).astype(np.float32))
        crops = ops.roi_align(feature, rois, 7, 1 / stride, sampling_ratio=0, aligned=aligned)
        expected[image, row] = crops.detach().permute(0, 2, 3, 1)
        crops.backward(torch.from_numpy(gradient[image, row]).permute(0, 3, 1, 2))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    for ours, theirs in zip(found_gradients, maps, strict=True):
        np.testing.assert_allclose(ours, theirs.grad.permute(0, 2, 3, 1), atol=1e-4)
