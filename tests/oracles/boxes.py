"""Brute-force twin of common.geometry.boxes: one pair of boxes at a time, float64."""

import math

import numpy as np


def area(box):
    return max(float(box[2]) - float(box[0]), 0.0) * max(float(box[3]) - float(box[1]), 0.0)


def intersection(a, b):
    width = min(float(a[2]), float(b[2])) - max(float(a[0]), float(b[0]))
    height = min(float(a[3]), float(b[3])) - max(float(a[1]), float(b[1]))
    return max(width, 0.0) * max(height, 0.0)


def iou(a, b):
    shared = intersection(a, b)
    union = area(a) + area(b) - shared
    return shared / union if union > 0 else 0.0


def ioa(a, b):
    return intersection(a, b) / area(a) if area(a) > 0 else 0.0


def pairwise(function, a, b):
    return np.array([[function(p, q) for q in b] for p in a]).reshape(len(a), len(b))


def encode(box, reference, stds=(1.0, 1.0, 1.0, 1.0)):
    if min(box[2] - box[0], box[3] - box[1]) <= 0:
        return [0.0] * 4
    if min(reference[2] - reference[0], reference[3] - reference[1]) <= 0:
        return [0.0] * 4
    deltas = []
    for axis in (0, 1):
        size = float(reference[axis + 2]) - float(reference[axis])
        centre = (float(box[axis]) + float(box[axis + 2])) / 2
        reference_centre = (float(reference[axis]) + float(reference[axis + 2])) / 2
        deltas.append((centre - reference_centre) / size)
    for axis in (0, 1):
        size = float(reference[axis + 2]) - float(reference[axis])
        deltas.append(math.log((float(box[axis + 2]) - float(box[axis])) / size))
    return [delta / std for delta, std in zip(deltas, stds, strict=True)]
