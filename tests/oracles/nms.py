"""Brute-force twin of common.geometry.nms: greedy suppression, one pair at a time, in float32."""

import numpy as np


def iou(boxes, box):
    """IoU of (n, 4) boxes with one box, every operation rounded to float32."""
    boxes, box = np.float32(boxes).reshape(-1, 4), np.float32(box)
    zero = np.float32(0)
    width = np.minimum(boxes[:, 2], box[2]) - np.maximum(boxes[:, 0], box[0])
    height = np.minimum(boxes[:, 3], box[3]) - np.maximum(boxes[:, 1], box[1])
    shared = np.maximum(width, zero) * np.maximum(height, zero)
    areas = np.maximum(boxes[:, 2] - boxes[:, 0], zero) * np.maximum(
        boxes[:, 3] - boxes[:, 1], zero
    )
    area = max(box[2] - box[0], zero) * max(box[3] - box[1], zero)
    union = areas + area - shared
    return np.where(union > 0, shared / np.where(union > 0, union, np.float32(1)), zero)


def greedy(boxes, scores, valid, iou_threshold, classes=None):
    """Returns the kept indices by falling score (equal scores: by index)."""
    classes = np.zeros(len(boxes), int) if classes is None else classes
    kept = []
    for i in sorted(np.flatnonzero(valid), key=lambda i: (-scores[i], i)):
        rivals = [j for j in kept if classes[j] == classes[i]]
        if not np.any(iou(boxes[rivals], boxes[i]) > np.float32(iou_threshold)):
            kept.append(int(i))
    return kept


def multiclass(boxes, scores, valid, score_threshold, iou_threshold, max_detections):
    """Returns (score, class, box) of the best detections after NMS over all pairs."""
    detections = []
    for c in range(scores.shape[1]):
        class_boxes = boxes[:, min(c, boxes.shape[1] - 1)]
        enters = valid & (scores[:, c] > np.float32(score_threshold))
        for i in greedy(class_boxes, scores[:, c], enters, iou_threshold):
            detections.append((-scores[i, c], i, c, class_boxes[i]))
    detections.sort(key=lambda row: row[:3])
    return [(-score, c, box) for score, _, c, box in detections[:max_detections]]
