"""Brute-force losses of class logits, one RoI and class at a time, with gradients, in float64.

Labels are 0 for background and class + 1 otherwise. Each function gives the sum over RoIs.
"""

import math

import numpy as np


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def binary(logit, is_positive):
    """Cross-entropy of one sigmoid and its derivative."""
    value = -log_sigmoid(logit if is_positive else -logit)
    return value, math.exp(log_sigmoid(logit)) - is_positive


def softmax_terms(logits, column, in_denominator):
    """Cross-entropy and gradient of a softmax in which some columns do not count."""
    top = max(z for z, counts in zip(logits, in_denominator, strict=True) if counts)
    powers = [
        math.exp(z - top) if counts else 0.0
        for z, counts in zip(logits, in_denominator, strict=True)
    ]
    total = sum(powers)
    gradient = [power / total for power in powers]
    value = -(logits[column] - top - math.log(total))
    gradient[column] -= 1
    return value, gradient


def sigmoids(logits, labels, weight):
    """`weight(roi, class, is_own)` of each class's term; logits have no background."""
    total, gradient = 0.0, np.zeros(logits.shape)
    for roi, label in enumerate(labels):
        for class_ in range(logits.shape[1]):
            is_own = label == class_ + 1
            value, slope = binary(float(logits[roi, class_]), is_own)
            total += weight(roi, class_, is_own) * value
            gradient[roi, class_] = weight(roi, class_, is_own) * slope
    return total, gradient


def hierarchical(logits, labels, ancestors):
    """Sigmoids that know the `ancestors` of each class."""
    total, gradient = 0.0, np.zeros(logits.shape)
    for roi, label in enumerate(labels):
        own = label - 1
        line = {own, *ancestors[own]} if label > 0 else set()
        for class_ in range(logits.shape[1]):
            if label > 0 and own in ancestors[class_]:
                continue
            value, slope = binary(float(logits[roi, class_]), class_ in line)
            total, gradient[roi, class_] = total + value, slope
    return total, gradient


def eql(logits, labels, rare):
    def weight(roi, class_, is_own):
        foreground = labels[roi] > 0
        return 1 - foreground * rare[class_] * (1 - is_own)

    return sigmoids(logits, labels, weight)


def softmax_eql(logits, labels, dropped):
    """`dropped` (RoIs, K): the draws of beta times T, before E and y are looked at."""
    total, gradient = 0.0, np.zeros(logits.shape)
    for roi, label in enumerate(labels):
        counts = [True] + [
            not (label > 0 and dropped[roi, class_] and label != class_ + 1)
            for class_ in range(logits.shape[1] - 1)
        ]
        value, gradient[roi] = softmax_terms([float(z) for z in logits[roi]], label, counts)
        total += value
    return total, gradient


def eqlv2(logits, labels, up, down, gamma=12.0, mu=0.8, alpha=4.0):
    """Column 0 is background. Also the gradient sums after the step."""
    total, gradient = 0.0, np.zeros(logits.shape)
    up_after, down_after = np.array(up, float), np.array(down, float)
    for roi, label in enumerate(labels):
        value, gradient[roi, 0] = binary(float(logits[roi, 0]), label == 0)
        total += value
        for class_ in range(len(up)):
            ratio = up[class_] / down[class_] if down[class_] else 100.0
            negative = 1 / (1 + math.exp(-gamma * (ratio - mu)))
            is_own = label == class_ + 1
            weight = 1 + alpha * (1 - negative) if is_own else negative
            value, slope = binary(float(logits[roi, class_ + 1]), is_own)
            total += weight * value
            gradient[roi, class_ + 1] = weight * slope
            (up_after if is_own else down_after)[class_] += weight * abs(slope)
    return total, gradient, up_after, down_after


def seesaw(logits, labels, counts, p=0.8, q=2.0, floor=0.01):
    """Columns background, object, classes. Also the counts after the step."""
    total, gradient = 0.0, np.zeros(logits.shape)
    counts = np.array(counts, float)
    for label in labels:
        if label:
            counts[label - 1] += 1
    for roi, label in enumerate(labels):
        value, slopes = softmax_terms([float(z) for z in logits[roi, :2]], int(label > 0), [1, 1])
        total, gradient[roi, :2] = total + value, slopes
        if not label:
            continue
        own, scores = label - 1, [float(z) for z in logits[roi, 2:]]
        powers = [math.exp(z - max(scores)) for z in scores]
        chances = [power / sum(powers) for power in powers]
        shifted = []
        for class_, z in enumerate(scores):
            fewer = min(1.0, (max(counts[class_], 1) / max(counts[own], 1)) ** p)
            likelier = max(1.0, (chances[class_] / max(chances[own], floor)) ** q)
            shifted.append(z if class_ == own else z + math.log(fewer * likelier))
        value, slopes = softmax_terms(shifted, own, [1] * len(scores))
        total, gradient[roi, 2:] = total + value, slopes
    return total, gradient, counts
