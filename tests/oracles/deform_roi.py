"""Brute-force twin of common.geometry.deform_roi: one sample at a time, float64.

Gradients of the offsets are central differences.
"""

import math

import numpy as np

from tests.oracles.roi_align import corners, level_of

_STEP = 1e-6


def _bins(boxes, offsets, strides, bins, ratio, aligned, position):
    """Yields (image, RoI, bin row, bin column, level, function of the offset giving the points)."""
    first = round(math.log2(strides[0]))
    for b, r in np.ndindex(boxes.shape[:2]):
        level = level_of(boxes[b, r], first, first + len(strides) - 1) - first
        left, top, right, bottom = (
            float(v) / strides[level] - (0.5 if aligned else 0.0) for v in boxes[b, r]
        )
        width, height = right - left, bottom - top
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        for s in range(bins):
            for t in range(bins):

                def points(dx, dy, left=left, top=top, width=width, height=height, s=s, t=t):
                    for i in range(ratio):
                        for j in range(ratio):
                            y = top + height * ((s + (i + position) / ratio) / bins + dy)
                            x = left + width * ((t + (j + position) / ratio) / bins + dx)
                            yield y, x

                yield b, r, s, t, level, points


def _pool(image, points, ratio):
    total = np.zeros(image.shape[-1])
    for y, x in points:
        for row, column, weight in corners(y, x, *image.shape[:2]):
            total += weight * image[row, column]
    return total / ratio**2


def deform_roi_align(
    features, boxes, offsets, strides, bins=7, ratio=2, aligned=True, position=0.5
):
    """Returns the crops (B, R, S, S, C); `position` of a sample in its part of the bin."""
    features = [feature.astype(np.float64) for feature in features]
    output = np.zeros((*boxes.shape[:2], bins, bins, features[0].shape[-1]))
    for b, r, s, t, level, points in _bins(boxes, offsets, strides, bins, ratio, aligned, position):
        output[b, r, s, t] = _pool(features[level][b], points(*offsets[b, r, s, t]), ratio)
    return output


def gradients(
    features, boxes, offsets, strides, gradient, bins=7, ratio=2, aligned=True, position=0.5
):
    """Returns those of sum(crops * gradient): for each level's features, and for the offsets."""
    features = [feature.astype(np.float64) for feature in features]
    totals = [np.zeros(feature.shape) for feature in features]
    offsets_grad = np.zeros(offsets.shape)
    for b, r, s, t, level, points in _bins(boxes, offsets, strides, bins, ratio, aligned, position):
        image, wanted = features[level][b], gradient[b, r, s, t]
        offset = offsets[b, r, s, t].astype(np.float64)
        for y, x in points(*offset):
            for row, column, weight in corners(y, x, *image.shape[:2]):
                totals[level][b, row, column] += weight * wanted / ratio**2
        for axis, step in enumerate(np.eye(2) * _STEP):
            change = _pool(image, points(*(offset + step)), ratio)
            change -= _pool(image, points(*(offset - step)), ratio)
            offsets_grad[b, r, s, t, axis] = change @ wanted / (2 * _STEP)
    return totals, offsets_grad
