"""The OpenImages Challenge 2019 metric, one image, class and detection at a time.

Plain Python over dictionaries: no array code, nothing shared with `common.metrics.openimages`.
"""


def ancestors_of(hierarchy: dict) -> dict[str, set[str]]:
    """Label -> all labels above it on any path from the root (root excluded)."""
    result: dict[str, set[str]] = {}

    def visit(node, above):
        label = node["LabelName"]
        result.setdefault(label, set()).update(above - {label})
        for child in node.get("Subcategory", []):
            visit(child, above | {label})

    for child in hierarchy.get("Subcategory", []):
        visit(child, set())
    return result


def expand_ground_truth(boxes, labels, hierarchy):
    """Expands the rows of one image.

    Args:
      boxes: list of (label, (xmin, ymin, xmax, ymax), is_group_of).
      labels: list of (label, confidence).
      hierarchy: nested dictionary.
    """
    above = ancestors_of(hierarchy)
    below = {}
    for label, parents in above.items():
        for parent in parents:
            below.setdefault(parent, set()).add(label)
    out_boxes, out_labels = [], []
    for label, box, group in boxes:
        for copy in [label, *above.get(label, ())]:
            out_boxes.append((copy, box, group))
    for label, confidence in labels:
        relatives = above if confidence == 1 else below
        for copy in [label, *relatives.get(label, ())]:
            out_labels.append((copy, confidence))
    return out_boxes, out_labels


def expand_predictions(detections, hierarchy):
    """Copies detections (label, score, box) to ancestors; equal scores keep the input order."""
    above = ancestors_of(hierarchy)
    out = []
    for label, score, box in detections:
        out.append((label, score, box))
        for parent in above.get(label, ()):
            out.append((parent, score, box))
    return out


def _area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def _intersection(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def match_image_class(detections, truth, threshold, weight):
    """Entries (score, credit) of one image and class.

    Args:
      detections: list of (score, box), best score first.
      truth: list of (box, is_group_of).
      threshold: on IoU and on the share of a detection inside a group-of box.
      weight: credit of a hit group-of box.
    """
    single = [box for box, group in truth if not group]
    groups = [box for box, group in truth if group]
    taken = set()
    is_true = []
    for _, box in detections:
        best, best_iou = None, -1.0
        for index, other in enumerate(single):
            inter = _intersection(box, other)
            iou = inter / (_area(box) + _area(other) - inter)
            if iou > best_iou:
                best, best_iou = index, iou
        hit = best is not None and best_iou >= threshold and best not in taken
        if hit:
            taken.add(best)
        is_true.append(hit)
    group_scores = [0.0] * len(groups)
    entries = []
    for (score, box), hit in zip(detections, is_true, strict=True):
        if not hit and groups:
            shares = [_intersection(box, other) / _area(box) for other in groups]
            best = max(range(len(groups)), key=lambda i: (shares[i], -i))
            if shares[best] >= threshold:
                group_scores[best] = max(group_scores[best], score)
                continue
        entries.append((score, 1.0 if hit else 0.0))
    for score in group_scores:
        if score > 0 and weight > 0:
            entries.append((score, weight))
    return entries


def average_precision(entries, count):
    """All-point interpolated AP of (score, credit) entries; earlier entries win ties."""
    entries = sorted(entries, key=lambda entry: -entry[0])
    true = false = 0.0
    recalls, precisions = [0.0], [0.0]
    for _, credit in entries:
        true += credit
        false += 1.0 if credit <= 0 else 0.0
        recalls.append(true / count)
        precisions.append(true / (true + false))
    recalls.append(1.0)
    precisions.append(0.0)
    for index in range(len(precisions) - 2, -1, -1):
        precisions[index] = max(precisions[index], precisions[index + 1])
    return sum(
        (recalls[i] - recalls[i - 1]) * precisions[i]
        for i in range(1, len(recalls))
        if recalls[i] != recalls[i - 1]
    )


def evaluate(
    images,
    class_labels,
    hierarchy,
    *,
    threshold=0.5,
    weight=1.0,
    expand_truth=True,
    expand_detections=False,
    use_labels=True,
):
    """Returns (mean AP, {label: AP}) over the classes with truth.

    Args:
      images: {image id: {"boxes": [(label, box, is_group_of)], "labels": [(label, confidence)],
        "detections": [(label, score, box)]}}.
    """
    entries = {label: [] for label in class_labels}
    counts = dict.fromkeys(class_labels, 0.0)
    for image_id in sorted(images):
        image = images[image_id]
        boxes, labels = image["boxes"], image["labels"]
        if expand_truth:
            boxes, labels = expand_ground_truth(boxes, labels, hierarchy)
            boxes = [box for box in boxes if box[0] in entries]
        evaluated = {label for label, _, _ in boxes}
        if use_labels:
            evaluated |= {label for label, _ in labels}
        for label, _, group in boxes:
            counts[label] += weight if group else 1.0
        found = sorted(image["detections"], key=lambda detection: -detection[1])
        if expand_detections:
            found = expand_predictions(found, hierarchy)
        found = [d for d in found if d[2][0] < d[2][2] and d[2][1] < d[2][3]]
        for label in class_labels:
            if label in evaluated:
                entries[label] += match_image_class(
                    [(score, box) for name, score, box in found if name == label],
                    [(box, group) for name, box, group in boxes if name == label],
                    threshold,
                    weight,
                )
    aps = {c: average_precision(entries[c], counts[c]) for c in class_labels if counts[c] > 0}
    return sum(aps.values()) / len(aps), aps
