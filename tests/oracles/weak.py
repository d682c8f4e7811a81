"""Brute-force twins of the weakly supervised head, in NumPy and loops.

Shape legend: P proposals of an image, K classes.
"""

import math

import numpy as np

from tests.oracles.boxes import iou


def mil_scores(class_logits, proposal_logits, valid, class_stream):
    """(P, K) scores of one image and (K,) sums over its proposals."""
    scores = np.zeros(class_logits.shape)
    for k in range(class_logits.shape[1]):
        places = {r: math.exp(proposal_logits[r, k]) for r in range(len(valid)) if valid[r]}
        for r, place in places.items():
            if class_stream == "softmax":
                what = math.exp(class_logits[r, k]) / np.exp(class_logits[r]).sum()
            else:
                what = 1 / (1 + math.exp(-class_logits[r, k]))
            scores[r, k] = what * place / sum(places.values())
    return scores, scores.sum(axis=0)


def mil_gradients(class_logits, proposal_logits, valid, class_stream, by_presence):
    """Derivatives of sum_k by_presence[k] * presence[k] by the logits of one image.

    With c = what a proposal is and d = which proposal: d presence_k / d class logit (r, j) is
    d_rk c_rk (1[j = k] - c_rj) of a softmax, d_rk c_rk (1 - c_rk) of a sigmoid; by the proposal
    logit (r, k) it is d_rk (c_rk - presence_k).
    """
    scores, presence = mil_scores(class_logits, proposal_logits, valid, class_stream)
    by_class, by_proposal = np.zeros(scores.shape), np.zeros(scores.shape)
    for r in np.flatnonzero(valid):
        if class_stream == "softmax":
            c = np.exp(class_logits[r]) / np.exp(class_logits[r]).sum()
        else:
            c = 1 / (1 + np.exp(-class_logits[r]))
        d = scores[r] / c
        for k in range(scores.shape[1]):
            by_proposal[r, k] = by_presence[k] * d[k] * (c[k] - presence[k])
            if class_stream == "sigmoid":
                by_class[r, k] = by_presence[k] * scores[r, k] * (1 - c[k])
                continue
            for j in range(scores.shape[1]):
                by_class[r, j] += by_presence[k] * scores[r, k] * ((j == k) - c[j])
    return by_class, by_proposal


def presence_loss(presence, present, verified):
    """Of one image."""
    total = 0.0
    for k, p in enumerate(presence):
        if verified[k]:
            total -= math.log(p) if present[k] else math.log(max(1 - p, 1e-6))
    return total


def refinement_loss(logits, labels, weights, counted):
    """Mean over the counted proposals of all images."""
    total, count = 0.0, 0
    for image, image_counted in enumerate(counted):
        for r in np.flatnonzero(image_counted):
            row = logits[image, r]
            total += weights[image, r] * (np.log(np.exp(row).sum()) - row[labels[image, r]])
            count += 1
    return total / max(count, 1)


def top_seeds(scores, boxes, valid, present, max_seeds, threshold):
    """List of (score, class, box), highest score first; a proposal stands for one class."""
    rows = {r for r in range(len(valid)) if valid[r]}
    classes = sorted(
        np.flatnonzero(present), key=lambda k: -max((scores[r, k] for r in rows), default=-1)
    )[:max_seeds]
    found = []
    while rows and classes:
        r, k = max(((r, k) for r in rows for k in classes), key=lambda pair: scores[pair])
        found.append((scores[r, k], k, tuple(boxes[r])))
        rows.remove(r)
        classes.remove(k)
    return [seed for seed in found if seed[0] > threshold]


def several_seeds(scores, boxes, valid, present, max_seeds, threshold, top_share, seed_iou):
    """MIST's; list of (score, class, box), highest score first."""
    rows = [r for r in range(len(valid)) if valid[r]]
    count = math.ceil(round(top_share * 1000) * len(rows) / 1000)
    classes = sorted(
        np.flatnonzero(present), key=lambda k: -max((scores[r, k] for r in rows), default=-1)
    )[:max_seeds]
    found = []
    for k in classes:
        kept = []
        for r in sorted(rows, key=lambda r: -scores[r, k])[:count]:
            apart = all(iou(boxes[r], boxes[other]) <= seed_iou for other in kept)
            if scores[r, k] > threshold and apart:
                kept.append(r)
        found += [(scores[r, k], k, tuple(boxes[r])) for r in kept]
    return sorted(found, key=lambda seed: -seed[0])[:max_seeds]


def spread(seeds, boxes, background_iou, positive_iou=0.5):
    """Labels and weights of proposals by their nearest of `seeds` (score, class, box)."""
    labels, weights = np.zeros(len(boxes), int), np.zeros(len(boxes))
    for r, box in enumerate(boxes):
        best, nearest = -1.0, None
        for seed in seeds:
            if (overlap := iou(box, np.array(seed[2]))) > best:
                best, nearest = overlap, seed
        if nearest is None:
            continue
        labels[r] = nearest[1] + 1 if best >= positive_iou else 0
        weights[r] = nearest[0] if best >= background_iou else 0.0
    return labels, weights
