"""Brute-force twins of category-relationship mining and re-scoring: loops over everything."""

import numpy as np


def covered(inner, outer):
    width = min(inner[2], outer[2]) - max(inner[0], outer[0])
    height = min(inner[3], outer[3]) - max(inner[1], outer[1])
    area = (inner[2] - inner[0]) * (inner[3] - inner[1])
    return max(width, 0) * max(height, 0) / area if area > 0 else 0.0


def cooccurrence(image, classes, scores, probability, mode, tau_p, tau_s, tau_i):
    """Scores after the co-occurrence bound; probability[i, j] = P(i | j)."""
    result = np.array(scores, np.float64)
    for one in set(image):
        best = {}
        for row in np.flatnonzero(image == one):
            if classes[row] not in best or scores[row] > scores[best[classes[row]]]:
                best[classes[row]] = row
        for i, top in best.items():
            bound = 0.0
            for j, other in best.items():
                p = probability[i, j]
                if j != i and p > 0 and p >= tau_p and scores[other] >= tau_s:
                    bound = max(bound, min(scores[other], 1) * p)
            if tau_i <= scores[top] < bound:
                if mode == "top":
                    result[top] = bound
                    continue
                for row in np.flatnonzero((image == one) & (classes == i)):
                    raised = scores[row] * bound / scores[top]
                    result[row] = max(scores[row], min(raised, 1))
    return result


def surround(image, classes, scores, boxes, containment, tau_q, tau_s, inside, gain, loss):
    """Scores after the surround rules; containment[i, j] = q(i in j)."""

    def rule(i, j):
        return containment[i, j] > 0 and containment[i, j] >= tau_q

    result = np.array(scores, np.float64)
    for row in range(len(scores)):
        factor, has_rule, surrounded, surrounds = 1.0, False, False, False
        for j in range(len(containment)):
            has_rule |= rule(classes[row], j)
        for other in range(len(scores)):
            if image[other] != image[row] or scores[other] < tau_s:
                continue
            if rule(classes[row], classes[other]):
                surrounded |= covered(boxes[row], boxes[other]) >= inside
            if rule(classes[other], classes[row]):
                surrounds |= covered(boxes[other], boxes[row]) >= inside
        if has_rule:
            factor *= 1 + gain if surrounded else 1 - loss
        if surrounds:
            factor *= 1 + gain
        result[row] = min(scores[row] * factor, max(scores[row], 1))
    return result


def mine(dataset, split, parents, inside, exhaustive):
    """The counts of `ensemble.relations.counts.Relations` by name."""
    size = len(parents)
    names = ("images_both", "images_known", "boxes_inside", "boxes_known")
    counts = {name: np.zeros((size, size), int) for name in names}
    present_in, absent_in = np.zeros(size, int), np.zeros(size, int)

    def family(c):
        return {c, *np.flatnonzero(parents[c])}

    for index in dataset.split(split):
        boxes, classes, _ = dataset.image_boxes(index)
        all_boxes = [(c, k) for k in range(len(boxes)) for c in family(classes[k])]
        present = {c for c, _ in all_boxes}
        verified = set(range(size)) if exhaustive else set(present)
        for label, confidence in zip(*dataset.image_labels(index), strict=True):
            below = set(np.flatnonzero(parents[:, label]))
            verified |= family(label) if confidence else {label, *below}
        for c in range(size):
            present_in[c] += c in present
            absent_in[c] += c in verified and c not in present
        for i in range(size):
            for j in range(size):
                if any(i in family(c) and j in family(c) for c in range(size)):
                    continue
                counts["images_both"][i, j] += i in present and j in present
                counts["images_known"][i, j] += i in verified and j in present
                mine_i = {k for c, k in all_boxes if c == i}
                counts["boxes_known"][i, j] += len(mine_i) * (j in verified)
                counts["boxes_inside"][i, j] += sum(
                    any(
                        covered(boxes[k], boxes[other]) >= inside
                        for c, other in all_boxes
                        if c == j and other != k
                    )
                    for k in mine_i
                )
    return {**counts, "images_present": present_in, "images_absent": absent_in}
