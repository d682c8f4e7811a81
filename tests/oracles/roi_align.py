"""Brute-force twin of common.geometry.roi_align: one sample at a time, float64."""

import math

import numpy as np


def level_of(box, min_level=2, max_level=5):
    area = max(float(box[2] - box[0]), 0.0) * max(float(box[3] - box[1]), 0.0)
    if area == 0:
        return min_level
    return min(max(math.floor(4 + math.log2(math.sqrt(area) / 224) + 1e-6), min_level), max_level)


def corners(y, x, height, width):
    """Yields (row, column, weight) of the cells that make the bilinear sample at (y, x)."""
    if y < -1 or y > height or x < -1 or x > width:
        return
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = math.floor(y), math.floor(x)
    for row, row_weight in ((top, 1 - (y - top)), (min(top + 1, height - 1), y - top)):
        for column, weight in ((left, 1 - (x - left)), (min(left + 1, width - 1), x - left)):
            yield row, column, row_weight * weight


def bin_samples(box, stride, bins, ratio, aligned):
    """Yields (bin row, bin column, y, x) of all samples of a RoI, in cells."""
    left, top, right, bottom = (float(v) / stride - (0.5 if aligned else 0.0) for v in box)
    width, height = right - left, bottom - top
    if not aligned:
        width, height = max(width, 1.0), max(height, 1.0)
    for s in range(bins):
        for t in range(bins):
            for i in range(ratio):
                for j in range(ratio):
                    y = top + height / bins * (s + (i + 0.5) / ratio)
                    yield s, t, y, left + width / bins * (t + (j + 0.5) / ratio)


def roi_align(features, boxes, strides, output_size=7, sampling_ratio=2, aligned=True):
    """Returns the crops (B, R, S, S, C)."""
    batch, rois = boxes.shape[:2]
    output = np.zeros((batch, rois, output_size, output_size, features[0].shape[-1]))
    for b, r, s, t, level, row, column, weight in _terms(
        features, boxes, strides, output_size, sampling_ratio, aligned
    ):
        output[b, r, s, t] += weight * features[level][b, row, column]
    return output


def feature_gradients(
    features, boxes, strides, gradient, output_size=7, sampling_ratio=2, aligned=True
):
    """Returns the gradients of sum(crops * gradient) with respect to each level's features."""
    totals = [np.zeros(feature.shape) for feature in features]
    for b, r, s, t, level, row, column, weight in _terms(
        features, boxes, strides, output_size, sampling_ratio, aligned
    ):
        totals[level][b, row, column] += weight * gradient[b, r, s, t]
    return totals


def _terms(features, boxes, strides, output_size, sampling_ratio, aligned):
    first = round(math.log2(strides[0]))
    for b in range(boxes.shape[0]):
        for r in range(boxes.shape[1]):
            level = level_of(boxes[b, r], first, first + len(strides) - 1) - first
            height, width = features[level].shape[1:3]
            for s, t, y, x in bin_samples(
                boxes[b, r], strides[level], output_size, sampling_ratio, aligned
            ):
                for row, column, weight in corners(y, x, height, width):
                    yield b, r, s, t, level, row, column, weight / sampling_ratio**2
