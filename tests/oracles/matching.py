"""Brute-force assignment of anchors to ground truth, one box at a time."""

import numpy as np


def iou_pair(a, b):
    """Intersection over union of two boxes, 0 where both are empty."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def match(boxes, valid, truth, truth_valid, positive_iou, negative_iou, best_match_iou=None):
    """Returns (index, positive, negative) as lists, following Faster R-CNN's text literally."""
    n = len(boxes)
    overlaps = np.full((n, len(truth)), -1.0)
    for i in range(n):
        for j in range(len(truth)):
            if valid[i] and truth_valid[j]:
                overlaps[i, j] = iou_pair(boxes[i], truth[j])
    index, positive, negative = [0] * n, [False] * n, [False] * n
    for i in range(n):
        index[i] = int(np.argmax(overlaps[i]))
        best = overlaps[i, index[i]]
        positive[i] = bool(valid[i] and best >= positive_iou)
        if best_match_iou is not None:
            for j in range(len(truth)):
                top = overlaps[:, j].max()
                if truth_valid[j] and top >= best_match_iou and overlaps[i, j] >= top - 1e-6:
                    positive[i] = True
        negative[i] = bool(valid[i] and not positive[i] and best < negative_iou)
    return index, positive, negative
