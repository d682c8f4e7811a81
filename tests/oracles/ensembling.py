"""Brute-force twins of ensemble.operators: one group, one entry at a time, NumPy.

Each takes boxes (n, 4), scores (n,) and returns {row: (score, box)} of what comes out, in float64
but for overlaps, which are rounded to float32 as those compared with thresholds.
"""

import numpy as np


def overlap(box, other):
    """IoU, every operation rounded to float32."""
    zero = np.float32(0)
    xmin, ymin, xmax, ymax = np.float32(box)
    other_xmin, other_ymin, other_xmax, other_ymax = np.float32(other)
    width = max(min(xmax, other_xmax) - max(xmin, other_xmin), zero)
    height = max(min(ymax, other_ymax) - max(ymin, other_ymin), zero)
    area = max(xmax - xmin, zero) * max(ymax - ymin, zero)
    other_area = max(other_xmax - other_xmin, zero) * max(other_ymax - other_ymin, zero)
    union = area + other_area - width * height
    return width * height / union if union > 0 else zero


def ranked(scores):
    return sorted(range(len(scores)), key=lambda row: (-scores[row], row))


def clusters(boxes, scores, threshold):
    """Greedy NMS: {kept row: rows it dropped}, both by rank."""
    kept = {}
    for row in ranked(scores):
        for leader, dropped in kept.items():
            if overlap(boxes[leader], boxes[row]) > np.float32(threshold):
                dropped.append(row)
                break
        else:
            kept[row] = []
    return kept


def nms(boxes, scores, threshold):
    return {row: (scores[row], boxes[row]) for row in clusters(boxes, scores, threshold)}


def decay(boxes, scores, rows, factor, sequential=True):
    """Lowered scores of the rows, which come ranked; boxes and scores are looked up by row."""
    lowered = {row: float(scores[row]) for row in rows}
    left = list(rows)
    while left:
        best = max(left, key=lambda row: lowered[row]) if sequential else left[0]
        left.remove(best)
        for row in left:
            lowered[row] *= factor(float(overlap(boxes[best], boxes[row])))
    return lowered


def gaussian(sigma):
    return lambda iou: np.exp(-(iou**2) / sigma)


def soft_nms(boxes, scores, method, sigma, threshold, min_score):
    factors = {
        "gaussian": gaussian(sigma),
        "linear": lambda iou: 1 - iou if iou > np.float32(threshold) else 1.0,
    }
    lowered = decay(boxes, scores, ranked(scores), factors[method])
    kept = [row for row in lowered if np.float32(lowered[row]) > np.float32(min_score)]
    return {row: (lowered[row], boxes[row]) for row in kept}


def adj_nms(boxes, scores, threshold, sigma, sequential=True):
    kept = list(clusters(boxes, scores, threshold))
    lowered = decay(boxes, scores, kept, gaussian(sigma), sequential)
    return {row: (score, boxes[row]) for row, score in lowered.items()}


def join_best(box, clusters_so_far, threshold):
    """Row of the cluster whose box overlaps most, above the threshold; the earliest of equals."""
    best, joined = np.float32(threshold), None
    for row, representative in clusters_so_far.items():
        iou = overlap(representative, box)
        if iou > best:
            best, joined = iou, row
    return joined


def nmw(boxes, scores, threshold):
    founders, members = {}, {}
    for row in ranked(scores):
        joined = join_best(boxes[row], founders, threshold)
        if joined is None:
            founders[row], members[row] = boxes[row], [row]
        else:
            members[joined].append(row)
    fused = {}
    for founder, rows in members.items():
        weights = [float(scores[r]) * float(overlap(boxes[founder], boxes[r])) for r in rows]
        weights[0] = float(scores[founder])
        fused[founder] = (scores[founder], weighted_mean(boxes[rows], weights))
    return fused


def weighted_mean(boxes, weights):
    """Mean box; the first box where nothing has weight."""
    if len(boxes) == 1 or sum(weights) == 0:
        return boxes[0]
    return np.average(np.float64(boxes), axis=0, weights=weights)


def wbf(boxes, scores, models, model_weights, threshold, conf_type, allows_overflow=False):
    fused, members = {}, {}
    for row in ranked(scores):
        joined = join_best(boxes[row], fused, threshold)
        if joined is None:
            fused[row], members[row] = boxes[row], [row]
        else:
            members[joined].append(row)
            rows = members[joined]
            fused[joined] = weighted_mean(boxes[rows], np.float64(scores[rows]))
    result = {}
    for founder, rows in members.items():
        total, weights = float(np.sum(np.float64(scores[rows]))), np.float64(model_weights)
        present = weights[sorted(set(models[rows].tolist()))].sum()
        own = weights[models[rows]].sum()
        if conf_type == "max":
            score = scores[founder] / weights.max()
        elif conf_type == "box_and_model_avg":
            score = total / own * present / weights.sum()
        elif conf_type == "absent_model_aware_avg":
            score = total / (own + weights.sum() - present)
        elif allows_overflow:
            score = total / weights.sum()
        else:
            score = total / len(rows) * min(len(weights), len(rows)) / weights.sum()
        result[founder] = (score, fused[founder])
    return result


def voting(boxes, scores, threshold, k, score_weight, box_weight, few, sigma):
    new_boxes, new_scores = {}, {}
    kept = clusters(boxes, scores, threshold)
    for row, dropped in kept.items():
        # Stable: of equal overlaps the better rank comes first.
        voters = sorted(dropped, key=lambda d, row=row: -overlap(boxes[row], boxes[d]))[:k]
        new_scores[row] = float(scores[row]) + score_weight * float(np.sum(scores[voters]))
        cast = [boxes[voter] for voter in voters]
        if few == "fixed":
            cast += [boxes[row]] * (k - len(cast))
        mean = np.mean(np.float64(cast), axis=0) if cast else np.float64(boxes[row])
        new_boxes[row] = (1 - box_weight) * np.float64(boxes[row]) + box_weight * mean
    if sigma is not None:
        order = sorted(kept, key=lambda row: -new_scores[row])
        float_boxes = {row: np.float32(box) for row, box in new_boxes.items()}
        new_scores = decay(float_boxes, new_scores, order, gaussian(sigma))
    return {row: (new_scores[row], new_boxes[row]) for row in kept}
