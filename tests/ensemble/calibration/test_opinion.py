"""The second opinion: its features by brute force, and what it learns."""

import numpy as np

from common.geometry.boxes import paired_iou
from ensemble.calibration import opinion

TABLES = 3


def draw_rows(seed=0, count=120):
    rng = np.random.default_rng(seed)
    models = np.sort(rng.integers(0, TABLES, count))
    images, labels = rng.integers(0, 4, count), rng.integers(0, 3, count)
    corner = rng.integers(0, 3, (count, 2)) / 4 + rng.normal(0, 0.03, (count, 2))
    boxes = np.concatenate([corner, corner + 0.3], axis=1).astype(np.float32)
    return images, labels, models, rng.random(count), boxes


def logit(p):
    p = np.clip(p, 1e-4, 1 - 1e-4)
    return np.log(p / (1 - p))


def by_hand(images, labels, models, precisions, boxes):
    n = len(images)
    expected = np.zeros((n, 1 + 4 * TABLES + 2))
    for i in range(n):
        expected[i, 0] = logit(precisions[i])
        width, height = boxes[i, 2:] - boxes[i, :2]
        expected[i, -2:] = np.sqrt(width * height), 1
        for table in range(TABLES):
            support, iou_of_support, against, anywhere = 0.0, 0.0, 0.0, 0.0
            for j in np.flatnonzero((images == images[i]) & (models == table)):
                iou = paired_iou(boxes[[i]], boxes[[j]])[0]
                if labels[j] == labels[i]:
                    anywhere = max(anywhere, precisions[j])
                    if j != i and iou > 0.35 and precisions[j] * iou > support:
                        support, iou_of_support = precisions[j] * iou, iou
                elif iou > 0.5 and precisions[j] >= 0.02:
                    against = max(against, precisions[j] * iou)
            place = 1 + 4 * table
            expected[i, place : place + 4] = (
                logit(support), iou_of_support, logit(against), logit(anywhere),
            )  # fmt: skip
    return expected


def test_features_are_those_of_brute_force(monkeypatch):
    rows = draw_rows()
    expected = by_hand(*rows)
    np.testing.assert_allclose(opinion.features(*rows, TABLES), expected, atol=1e-5)
    monkeypatch.setattr(opinion, "_PAIRS", 7)
    np.testing.assert_allclose(opinion.features(*rows, TABLES), expected, atol=1e-5)
    nothing = tuple(array[:0] for array in rows)
    assert opinion.features(*nothing, TABLES).shape == (0, opinion.num_features(TABLES))


def test_tables_in_another_order_are_of_the_same_opinion(monkeypatch):
    images, labels, models, precisions, boxes = draw_rows()
    rng = np.random.default_rng(1)
    ours = opinion.Opinion(rng.normal(0, 0.3, (TABLES, opinion.num_features(TABLES))))
    expected = ours.apply(images, labels, models, precisions, boxes)
    monkeypatch.setattr(opinion, "_ROWS", 40)  # an image or two
    np.testing.assert_array_equal(ours.apply(images, labels, models, precisions, boxes), expected)
    order = [2, 0, 1]  # place of a table before
    renamed = np.argsort(order)[models]
    back = np.argsort(renamed, kind="stable")
    found = ours.arranged(order).apply(
        images[back], labels[back], renamed[back], precisions[back], boxes[back]
    )
    np.testing.assert_allclose(found, expected[back], rtol=1e-5)


def test_what_others_confirm_rises():
    """Detections that another table supports are right, others wrong; all have one score."""
    rng = np.random.default_rng(0)
    count = 400
    corner = rng.random((count, 2)) * 0.5
    boxes = np.concatenate([corner, corner + 0.3], axis=1)
    supported = rng.random(count) < 0.5
    images = np.arange(count)
    rows = (
        np.concatenate([images, images[supported]]),
        np.zeros(count + supported.sum(), np.int64),
        np.repeat([0, 1], [count, supported.sum()]),
        np.full(count + supported.sum(), 0.4),
        np.concatenate([boxes, boxes[supported]]).astype(np.float32),
    )
    targets = np.concatenate([supported, np.ones(supported.sum())]).astype(float)
    weights = opinion.fit(opinion.features(*rows, 2), rows[2], targets, 2)
    scores = opinion.Opinion(weights).apply(*rows)
    assert scores[:count][supported].min() > 0.9 and scores[:count][~supported].max() < 0.1
    # The other table is always right: it keeps its scores.
    np.testing.assert_allclose(scores[count:], 0.4, atol=1e-4)
