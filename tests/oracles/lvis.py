"""LVIS AP by plain loops over detections, thresholds and areas (the official rules, step by step).

Images are dictionaries {"negative": classes, "not_exhaustive": classes}; truth and detections are
lists of dictionaries {"image", "class", "shape", "area"} with "score" for detections. A shape is a
box (x, y, width, height) or a boolean array.
"""

import bisect

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
RECALLS = np.linspace(0, 1, 101).tolist()
RANGES = {"all": (0, 1e10), "s": (0, 1024), "m": (1024, 9216), "l": (9216, 1e10)}


def iou(a, b):
    if isinstance(a, np.ndarray):
        union = np.logical_or(a, b).sum()
        return np.logical_and(a, b).sum() / union if union else 0.0
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (a[2] * a[3] + b[2] * b[3] - width * height)


def lvis_ap(images, truth, detections, frequency):
    """Figures by their official names, and the AP of each class with truth.

    Args:
      images: in the order in which equal scores rank.
      truth: in the order of the file.
      detections: likewise.
      frequency: 'r', 'c' or 'f' of each class.
    """
    top = []
    for image in images:
        own = [d for d in detections if d["image"] == image]
        top += sorted(own, key=lambda d: -d["score"])[:300]  # stable
    kept = []
    for d in top:
        present = any(t["image"] == d["image"] and t["class"] == d["class"] for t in truth)
        if (present or d["class"] in images[d["image"]]["negative"]) and d["area"] > 0:
            kept.append(d)
    aps, recalls = {}, {}
    for label in sorted({t["class"] for t in truth}):
        for name, (low, high) in RANGES.items():
            for threshold in range(10):
                key = (label, name, threshold)
                aps[key], recalls[key] = _class_ap(
                    images, truth, kept, label, low, high, THRESHOLDS[threshold]
                )

    def mean(table, wanted):
        values = [v for key, v in table.items() if v is not None and wanted(*key)]
        return float(np.mean(values)) if values else -1.0

    result = {
        "AP": mean(aps, lambda c, a, t: a == "all"),
        "AP50": mean(aps, lambda c, a, t: a == "all" and t == 0),
        "AP75": mean(aps, lambda c, a, t: a == "all" and t == 5),
    }
    for size in "sml":
        result[f"AP{size}"] = mean(aps, lambda c, a, t, size=size: a == size)
    for letter in "rcf":
        result[f"AP{letter}"] = mean(
            aps, lambda c, a, t, letter=letter: a == "all" and frequency[c] == letter
        )
    result["AR@300"] = mean(recalls, lambda c, a, t: a == "all")
    for size in "sml":
        result[f"AR{size}@300"] = mean(recalls, lambda c, a, t, size=size: a == size)
    classes = sorted({c for c, a, t in aps if aps[c, "all", 0] is not None})
    return result, {c: mean(aps, lambda k, a, t, c=c: k == c and a == "all") for c in classes}


def _class_ap(images, truth, detections, label, low, high, threshold):
    """AP and recall of one class, size range and threshold; None where there is nothing to find."""
    entries = []  # score, whether true; best first within an image
    total = 0
    for image in images:
        boxes = [t for t in truth if t["image"] == image and t["class"] == label]
        ignored = [not low <= t["area"] <= high for t in boxes]
        order = sorted(range(len(boxes)), key=lambda i: ignored[i])
        total += ignored.count(False)
        found = [d for d in detections if d["image"] == image and d["class"] == label]
        taken = set()
        for d in sorted(found, key=lambda d: -d["score"]):
            best, best_iou = None, min(threshold, 1 - 1e-10)
            for i in order:
                if i in taken:
                    continue
                if best is not None and not ignored[best] and ignored[i]:
                    break
                overlap = iou(d["shape"], boxes[i]["shape"])
                if overlap >= best_iou:
                    best, best_iou = i, overlap
            if best is not None:
                taken.add(best)
                if not ignored[best]:
                    entries.append((d["score"], True))
            elif low <= d["area"] <= high and label not in images[image]["not_exhaustive"]:
                entries.append((d["score"], False))
    if not total:
        return None, None
    entries.sort(key=lambda entry: -entry[0])
    recall, precision, hits = [], [], 0
    for rank, (_, true) in enumerate(entries, start=1):
        hits += true
        recall.append(hits / total)
        precision.append(hits / rank)
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    points = []
    for r in RECALLS:
        place = bisect.bisect_left(recall, r)
        points.append(precision[place] if place < len(recall) else 0.0)
    return float(np.mean(points)), recall[-1] if recall else 0.0
