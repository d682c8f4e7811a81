"""Brute-force twin of ensemble.tree.join and .binary_tree.apply: one group, one row at a time."""

import numpy as np

from tests.oracles.nms import iou

F = np.float32


def join(left, right, operators, iou_threshold=0.5, sigma=0.5, min_score=1e-3):
    """Rows (score, box) of a parent from those of its children, best first.

    Args:
      left: list of (score, box) of one group, best first.
      right: as `left`.
      operators: of the node.
    """
    rows = []
    for side, child in enumerate((left, right)):
        for score, box in child:
            rows.append((F(score) * F(operators.weights[side]), np.float32(box), side))
    rows.sort(key=lambda row: -row[0])
    enters = [operators.elements[side] == "both" for _, _, side in rows]
    kept = []
    for i, (_, box, _) in enumerate(rows):
        if not enters[i]:
            continue
        rivals = [j for j in kept if iou([rows[j][1]], box)[0] > F(iou_threshold)]
        if operators.nms == "soft" or not rivals:
            kept.append(i)
    norm = max(
        operators.weights[side]
        + (operators.elements[1 - side] != "boxes") * operators.vote * operators.weights[1 - side]
        for side in (0, 1)
        if operators.elements[side] == "both"
    )
    merged = []
    for i in kept:
        score, box, side = rows[i]
        others = [j for j in range(len(rows)) if rows[j][2] != side]
        overlaps = [iou([rows[j][1]], box)[0] for j in others]
        if others and max(overlaps) > F(iou_threshold):
            other_score, other_box, other = rows[others[int(np.argmax(overlaps))]]
            if operators.elements[other] != "boxes":
                score = score + F(operators.vote) * other_score
            if operators.elements[other] != "scores" and operators.box:
                box = F(1 - operators.box) * box + F(operators.box) * other_box
        merged.append((score / F(norm), box))
    merged.sort(key=lambda row: -row[0])
    if operators.nms == "nms":
        return merged
    pending, done = merged, []
    while pending:
        best = max(range(len(pending)), key=lambda i: (pending[i][0], -i))
        score, box = pending.pop(best)
        done.append((score, box))
        pending = [
            (s * np.exp(-(iou([b], box)[0].astype(np.float64) ** 2) / sigma), b) for s, b in pending
        ]
    return [row for row in done if operators.nms == "adj" or row[0] > min_score]
