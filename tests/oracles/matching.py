"""Brute-force assignment of anchors to ground truth, one box at a time."""

import numpy as np


def iou_pair(a, b):
    """Intersection over union of two boxes, 0 where both are empty."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def ignored(boxes, ignore_boxes, ignore_valid, threshold):
    """Whether more than `threshold` of each box's own area lies in some ignore box."""
    result = []
    for box in boxes:
        area = max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
        shares = [0.0]
        for region, valid in zip(ignore_boxes, ignore_valid, strict=True):
            width = max(0.0, min(box[2], region[2]) - max(box[0], region[0]))
            height = max(0.0, min(box[3], region[3]) - max(box[1], region[1]))
            if valid and area > 0:
                shares.append(width * height / area)
        result.append(max(shares) > threshold)
    return np.array(result)


def match(
    boxes, valid, gt_boxes, gt_valid, positive_iou, negative_iou, best_match_iou=None, ignore=None
):
    """Returns (index, positive, negative) as lists, following Faster R-CNN's text literally."""
    n = len(boxes)
    overlaps = np.full((n, len(gt_boxes)), -1.0)
    for i in range(n):
        for j in range(len(gt_boxes)):
            if valid[i] and gt_valid[j]:
                overlaps[i, j] = iou_pair(boxes[i], gt_boxes[j])
    index, positive, negative = [0] * n, [False] * n, [False] * n
    for i in range(n):
        index[i] = int(np.argmax(overlaps[i]))
        best = overlaps[i, index[i]]
        positive[i] = bool(valid[i] and best >= positive_iou)
        if best_match_iou is not None:
            for j in range(len(gt_boxes)):
                top = overlaps[:, j].max()
                if gt_valid[j] and top >= best_match_iou and overlaps[i, j] >= top - 1e-6:
                    positive[i] = True
        negative[i] = bool(valid[i] and not positive[i] and best < negative_iou)
        if ignore is not None and ignore[i]:
            negative[i] = False
    return index, positive, negative
