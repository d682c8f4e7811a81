"""The OpenImages instance-segmentation metric, one image, class, detection and pixel at a time.

Plain Python over dictionaries and NumPy pixels; nothing is shared with
`common.metrics.openimages_masks`. The steps that segmentation has in common with boxes are those
of `tests.oracles.openimages`.
"""

from tests.oracles.openimages import average_precision, expand_ground_truth, expand_predictions


def at_centres(mask, height, width):
    """A mask (list of rows) at the pixel centres of another frame."""
    rows, columns = len(mask), len(mask[0])
    return [
        [
            bool(mask[(2 * y + 1) * rows // (2 * height)][(2 * x + 1) * columns // (2 * width)])
            for x in range(width)
        ]
        for y in range(height)
    ]


def _pixels(mask):
    return {(y, x) for y, row in enumerate(mask) for x, value in enumerate(row) if value}


def tight_box(mask):
    """Normalised xmin, ymin, xmax, ymax around the pixels, None without any."""
    pixels = _pixels(mask)
    if not pixels:
        return None
    height, width = len(mask), len(mask[0])
    ys, xs = [y for y, _ in pixels], [x for _, x in pixels]
    return min(xs) / width, min(ys) / height, (max(xs) + 1) / width, (max(ys) + 1) / height


def _area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def _box_overlap(box, other, of_first):
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    inter = max(width, 0.0) * max(height, 0.0)
    return inter / (_area(box) if of_first else _area(box) + _area(other) - inter)


def _mask_overlap(pixels, other, of_first):
    inter = len(pixels & other)
    return inter / (len(pixels) if of_first else len(pixels | other))


def match_image_class(detections, truth, threshold, weight):
    """Entries (score, credit) of one image and class.

    Args:
      detections: list of (score, pixels, box), best score first, none of them empty.
      truth: list of (box, pixels or None, is_group_of).
      threshold: on all overlaps.
      weight: credit of a hit group-of mask.
    """
    states = [None] * len(detections)  # 'true', 'ignored' or None

    def best_of(candidates, overlap):
        values = [overlap(candidate) for candidate in candidates]
        return max(range(len(values)), key=lambda i: (values[i], -i)), max(values)

    single = [pixels for _, pixels, group in truth if pixels is not None and not group]
    taken = set()
    for index, (_, pixels, _) in enumerate(detections):
        if single:
            best, value = best_of(single, lambda t, p=pixels: _mask_overlap(p, t, False))
            if value >= threshold and best not in taken:
                taken.add(best)
                states[index] = "true"

    groups = [pixels for _, pixels, group in truth if pixels is not None and group]
    group_scores = [0.0] * len(groups)
    for index, (score, pixels, _) in enumerate(detections):
        if states[index] is None and groups:
            best, value = best_of(groups, lambda t, p=pixels: _mask_overlap(p, t, True))
            if value >= threshold:
                group_scores[best] = max(group_scores[best], score)
                states[index] = "ignored"

    single_boxes = [box for box, pixels, group in truth if pixels is None and not group]
    taken = set()
    for index, (_, _, box) in enumerate(detections):
        if states[index] is None and single_boxes:
            best, value = best_of(single_boxes, lambda t, b=box: _box_overlap(b, t, False))
            if value >= threshold and best not in taken:
                taken.add(best)
                states[index] = "ignored"

    group_boxes = [box for box, pixels, group in truth if pixels is None and group]
    for index, (_, _, box) in enumerate(detections):
        if states[index] is None and group_boxes:
            _, value = best_of(group_boxes, lambda t, b=box: _box_overlap(b, t, True))
            if value >= threshold:
                states[index] = "ignored"

    entries = [
        (score, 1.0 if state == "true" else 0.0)
        for (score, _, _), state in zip(detections, states, strict=True)
        if state != "ignored"
    ]
    return entries + [(score, weight) for score in group_scores if score > 0 and weight > 0]


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
    """Returns (mean AP, {label: AP}) over the classes with masks in the truth.

    Args:
      images: {image id: {"boxes": [(label, box, is_group_of)], "masks": [rows of pixels or None],
        "labels": [(label, confidence)], "detections": [(label, score, rows of pixels)]}}; the
        masks of detections of an image have one size, those of the truth any.
    """
    entries = {label: [] for label in class_labels}
    counts = dict.fromkeys(class_labels, 0.0)
    for image_id in sorted(images):
        image = images[image_id]
        frame = None
        if image["detections"]:
            mask = image["detections"][0][2]
            frame = len(mask), len(mask[0])
        boxes = []
        for (label, box, group), mask in zip(image["boxes"], image["masks"], strict=True):
            pixels = None
            if mask is not None and any(any(row) for row in mask):
                pixels = _pixels(at_centres(mask, *frame) if frame else mask)
            boxes.append((label, (box, pixels), group))
        labels = image["labels"]
        if expand_truth:
            boxes, labels = expand_ground_truth(boxes, labels, hierarchy)
            boxes = [box for box in boxes if box[0] in entries]
        evaluated = {label for label, _, _ in boxes}
        if use_labels:
            evaluated |= {label for label, _ in labels}
        for label, (_, pixels), group in boxes:
            if pixels is not None:
                counts[label] += weight if group else 1.0
        found = sorted(image["detections"], key=lambda detection: -detection[1])
        if expand_detections:
            found = expand_predictions(found, hierarchy)
        found = [
            (label, score, _pixels(mask), tight_box(mask))
            for label, score, mask in found
            if tight_box(mask) is not None
        ]
        for label in class_labels:
            if label in evaluated:
                entries[label] += match_image_class(
                    [rest for name, *rest in found if name == label],
                    [(box, pixels, group) for name, (box, pixels), group in boxes if name == label],
                    threshold,
                    weight,
                )
    aps = {c: average_precision(entries[c], counts[c]) for c in class_labels if counts[c] > 0}
    return sum(aps.values()) / len(aps) if aps else None, aps
