"""Brute-force twins of the mask head, its targets and its loss: one number at a time, float64."""

import numpy as np


def head_logits(x, convs, deconv, predictor):
    """All K masks of each box: x (N, P, P, C) -> (N, 2P, 2P, K). Layers are (kernel, bias)."""
    for kernel, bias in convs:
        x = np.maximum(_conv3x3(x, kernel) + bias, 0)
    kernel, bias = deconv
    count, side = x.shape[:2]
    doubled = np.zeros((count, 2 * side, 2 * side, kernel.shape[-1]))
    for n in range(count):
        for row in range(2 * side):
            for column in range(2 * side):
                cell = x[n, row // 2, column // 2]
                doubled[n, row, column] = cell @ kernel[row % 2, column % 2] + bias
    kernel, bias = predictor
    return np.maximum(doubled, 0) @ kernel + bias


def _conv3x3(x, kernel):
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    result = np.zeros((*x.shape[:3], kernel.shape[-1]))
    for n, row, column in np.ndindex(*x.shape[:3]):
        window = padded[n, row : row + 3, column : column + 3]
        result[n, row, column] = np.tensordot(window, kernel, 3)
    return result


def target(mask, gt_box, roi, size):
    """Whether the mask (G, G), which fills `gt_box`, covers half of each of size x size pixels."""
    result = np.zeros((size, size), bool)
    gt_box, roi = np.asarray(gt_box, np.float64), np.asarray(roi, np.float64)
    cell = (gt_box[2:] - gt_box[:2]) / mask.shape[0]
    pixel = (roi[2:] - roi[:2]) / size
    if min(*cell, *pixel) <= 0:
        return result
    for row, column in np.ndindex(size, size):
        low = roi[:2] + pixel * (column, row)
        covered = 0.0
        for i, j in zip(*np.nonzero(mask), strict=True):
            start = gt_box[:2] + cell * (j, i)
            shared = np.minimum(low + pixel, start + cell) - np.maximum(low, start)
            covered += np.prod(np.maximum(shared, 0))
        result[row, column] = covered / np.prod(pixel) >= 0.5
    return result


def loss(logits, targets, counted):
    """Mean binary cross-entropy over the pixels of the counted masks; 0 where none counts."""
    total = 0.0
    for logit, target in zip(logits[counted], targets[counted], strict=True):
        probability = 1 / (1 + np.exp(-np.asarray(logit, np.float64)))
        total -= np.log(np.where(target, probability, 1 - probability)).mean()
    return total / max(counted.sum(), 1)
