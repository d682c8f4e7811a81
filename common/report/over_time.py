"""The same photos at several steps of a run: truth, then what the detector found by then.

Shape legend: n boxes of an image.
"""

from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import Bool, Float, Int

from common.data.dataset import GROUP_OF, Dataset
from common.geometry.boxes import paired_iou
from common.report.drawing import box_path, box_text
from common.report.pictures import Picture
from common.report.run_log import Evaluation
from common.tables import DetectionsReader

MAX_STEPS = 4  # columns of detections
MAX_BOXES = 30  # drawn of an image


def chosen_steps(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """At most MAX_STEPS that have a table: the first, the last, and some between."""
    kept = [evaluation for evaluation in evaluations if evaluation.table is not None]
    if len(kept) <= MAX_STEPS:
        return kept
    return [kept[i] for i in np.linspace(0, len(kept) - 1, MAX_STEPS).round().astype(int)]


def choose_images(dataset: Dataset, split: Int[np.ndarray, " n"], number: int) -> list[int]:
    """Images with the most classes, then boxes: the same ones at every look at the run."""
    counts = []
    for image in split:
        _, classes, _ = dataset.image_boxes(image)
        counts.append((-len(np.unique(classes)), -min(len(classes), MAX_BOXES), image))
    return [int(image) for *_, image in sorted(counts)[:number]]


def grid(
    dataset: Dataset,
    pictures: Sequence[Picture],
    evaluations: Sequence[Evaluation],
    min_score: float,
) -> str:
    """A row for each photo, a column for the truth and one for each evaluation."""
    columns = [_read(evaluation, dataset, pictures) for evaluation in evaluations]
    rows = []
    for picture in pictures:
        boxes, classes, flags = dataset.image_boxes(picture.image)
        views = [("truth", _truth(dataset, picture, boxes, classes, flags))]
        for evaluation, found in zip(evaluations, columns, strict=True):
            layer = _found(dataset, picture, boxes, classes, found, min_score)
            views.append((f"step {evaluation.step:,}", layer))
        name = escape(dataset.image_id(picture.image))
        photo = f"photo-{picture.image}"
        figures = "".join(
            f"<figure>{_svg(picture, photo, layer, first=not place)}"
            f"<figcaption>{title}</figcaption></figure>"
            for place, (title, layer) in enumerate(views)
        )
        rows.append(f'<h3>{name}</h3><div class="steps">{figures}</div>')
    return "".join(rows)


def _svg(picture: Picture, photo: str, layer: str, first: bool) -> str:
    """The first picture of a row holds the photo, the others refer to it."""
    content = f'<use href="#{photo}"/>'
    if first:
        size = f'width="{picture.width}" height="{picture.height}"'
        image = f'<image id="{photo}" {size} href="{picture.data}"/>' if picture.data else ""
        content = image or f'<rect id="{photo}" {size} fill="#3a3d42"/>'
    return (
        f'<svg viewBox="0 0 {picture.width} {picture.height}" role="img" '
        f'aria-label="photo with boxes">{content}{layer}</svg>'
    )


def _read(
    evaluation: Evaluation, dataset: Dataset, pictures: Sequence[Picture]
) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Image -> boxes, classes, scores of a table, best first."""
    if evaluation.table is None:
        return {}
    reader = DetectionsReader(evaluation.table)
    wanted = {dataset.image_id(picture.image): picture.image for picture in pictures}
    found = {}
    for image_id, image in wanted.items():
        place = reader.image_codes.get(image_id)
        if place is None:
            continue
        for chunk in reader.chunks(dataset.class_labels, images=range(place, place + 1)):
            found[image] = (chunk.boxes, chunk.label_index, chunk.scores)
    return found


def _truth(
    dataset: Dataset,
    picture: Picture,
    boxes: Float[np.ndarray, "n 4"],
    classes: Int[np.ndarray, " n"],
    flags: Int[np.ndarray, " n"],
) -> str:
    parts, texts = [], []
    for box, index, flag in list(zip(boxes, classes, flags, strict=True))[:MAX_BOXES]:
        name = dataset.class_names[index] + (" (group)" if flag & GROUP_OF else "")
        pixels = box * _size(picture)
        parts.append(box_path(pixels, "found", name))
        texts.append(box_text(pixels, "found", name, picture))
    return "".join(parts + texts)


def _found(
    dataset: Dataset,
    picture: Picture,
    boxes: Float[np.ndarray, "n 4"],
    classes: Int[np.ndarray, " n"],
    found: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]],
    min_score: float,
) -> str:
    if picture.image not in found:
        return ""
    rows = found[picture.image]
    keep = np.flatnonzero(rows[2] >= min_score)[:MAX_BOXES]
    found_boxes, found_classes, scores = (values[keep] for values in rows)
    right = _on_its_class(found_boxes, found_classes, boxes, classes)
    parts, texts = [], []
    for box, index, score, is_right in zip(found_boxes, found_classes, scores, right, strict=True):
        text = f"{dataset.class_names[index]} {score:.2f}"
        status = "correct" if is_right else "background"
        pixels = np.clip(box, 0, 1) * _size(picture)
        parts.append(box_path(pixels, status, text))
        texts.append(box_text(pixels, status, text, picture))
    return "".join(parts + texts)


def _on_its_class(
    found: Float[np.ndarray, "n 4"],
    found_classes: Int[np.ndarray, " n"],
    boxes: Float[np.ndarray, "m 4"],
    classes: Int[np.ndarray, " m"],
) -> Bool[np.ndarray, " n"]:
    """Whether half of each overlaps an object of its class (IoU at least 0.5)."""
    if not len(found) or not len(boxes):
        return np.zeros(len(found), bool)
    pairs = np.repeat(found, len(boxes), 0), np.tile(boxes, (len(found), 1))
    overlaps = paired_iou(*pairs).reshape(len(found), len(boxes))
    return ((overlaps >= 0.5) & (found_classes[:, None] == classes[None])).any(1)


def _size(picture: Picture) -> np.ndarray:
    return np.array([picture.width, picture.height] * 2)
