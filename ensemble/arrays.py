"""Merging of detections in memory, with the conventions of the package ensemble-boxes.

    import ensemble

    boxes, scores, labels = ensemble.merge_arrays(boxes_list, scores_list, labels_list,
                                                  weights=[2, 1], method="wbf", iou_thr=0.55)

The operators are those of `ensemble.merge`, for tables on disk.

Shape legend: M models, n boxes of a model, m merged boxes, K distinct labels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, Shaped
from numpy.typing import ArrayLike

from common.io.errors import UserError
from ensemble.operators import OPERATORS, Operator, make_operator
from ensemble.operators.groups import Rows, apply_operator, rank_rows

METHODS = (*OPERATORS, "linear_soft_nms")
_FEW_ROWS = 1 << 14  # of one image or so
# The package's arguments -> fields of the operators.
_FIELDS = {"iou_thr": "iou_threshold", "thresh": "min_score"}
# Where the package's defaults are not those of the operators.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"linear_soft_nms": {"iou_threshold": 0.5}}
_BY_LABEL = ("nms", "soft_nms", "linear_soft_nms")  # whose results the package orders by label


def merge_arrays(
    boxes_list: Sequence[ArrayLike],
    scores_list: Sequence[ArrayLike],
    labels_list: Sequence[ArrayLike],
    weights: Sequence[float] | None = None,
    *,
    method: str = "wbf",
    images_list: Sequence[ArrayLike] | None = None,
    skip_box_thr: float = 0.0,
    **options: Any,
) -> tuple[np.ndarray, ...]:
    """Merges the detections of several models on one image, or on many at once.

    Takes the place of `weighted_boxes_fusion` (method "wbf"), `non_maximum_weighted` ("nmw"),
    `nms`, and `soft_nms` ("soft_nms" is its method 2, "linear_soft_nms" its method 1) of
    ensemble-boxes; "adj_nms" and "voting" are operators that it lacks. As there, boxes are clipped
    to [0, 1] and turned upright, those without area and those of scores below `skip_box_thr` are
    left out, and scores are multiplied by their model's weight: as it is with "wbf", divided by the
    largest weight with "nmw", by the sum of all with the others.

    Different from ensemble-boxes on purpose: "soft_nms" returns the lowered scores, where the
    package returns those that it was given; clusters whose scores are all zero keep their first
    box, where it has NaN; equal scores are visited in the order of the input; `skip_box_thr` holds
    for all methods; labels may be anything that can be sorted, texts too, and come back as they
    were; results are float32; wrong lengths are errors, not warnings.

    The first call of a size compiles a program. Many images in one call (`images_list`, or
    `merge_batch`) are far faster than one by one.

    Args:
      boxes_list: M arrays (n, 4) of xmin, ymin, xmax, ymax, normalised to [0, 1].
      scores_list: M arrays (n,), not negative.
      labels_list: M arrays (n,).
      weights: of the M models; None: 1 each.
      method: one of `METHODS`.
      images_list: M arrays (n,) of image numbers; boxes of different images never meet.
      skip_box_thr: boxes of lower scores, before weights, are left out.
      **options: `iou_thr`, `sigma`, `thresh`, `conf_type`, `allows_overflow` as in the package, or
        any field of the operator, such as `k` of "voting".

    Returns:
      boxes (m, 4), scores (m,), labels (m,), and with `images_list` image numbers (m,). By image;
      within one by falling score, of "nms" and the soft ones by label first, as the package does.

    Raises:
      UserError: lengths that do not fit, values out of range, an unknown method or option.
    """
    counts = _counts(boxes_list, scores_list, labels_list, images_list)
    operator, factors = _operator(method, weights, len(counts), options)
    model = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    boxes = np.concatenate([np.asarray(part, np.float32).reshape(-1, 4) for part in boxes_list])
    scores, labels = np.concatenate(scores_list), np.concatenate(labels_list)
    images = None if images_list is None else np.concatenate(images_list)

    low, high = np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])
    boxes = np.clip(np.concatenate([low, high], axis=1), 0.0, 1.0)
    wanted = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    if not (np.isfinite(scores) & (scores >= 0)).all() or not np.isfinite(boxes).all():
        raise UserError("merge_arrays: found negative scores or no numbers, expected scores >= 0")
    if skip_box_thr:
        wanted &= scores >= skip_box_thr
    if not wanted.all():
        boxes, scores, labels, model = boxes[wanted], scores[wanted], labels[wanted], model[wanted]
        images = None if images is None else images[wanted]

    known, group = _numbered(labels)
    if images is not None:
        pictures, image_number = _numbered(images)
        group += image_number * len(known)
    weighted = (scores * factors[model]).astype(np.float32)
    rows = Rows(group, weighted, boxes, model)
    merged, _ = apply_operator(rows, operator, few=len(rows) <= _FEW_ROWS)

    count = max(len(known), 1)
    if method != "nms":  # which comes in this order
        by = merged.group if method in _BY_LABEL else merged.group // count
        merged = merged.take(rank_rows(by, merged.scores))
    found = merged.boxes, merged.scores, known[merged.group % count]
    return found if images is None else (*found, pictures[merged.group // count])


def merge_batch(
    boxes_lists: Sequence[Sequence[Any]],
    scores_lists: Sequence[Sequence[Any]],
    labels_lists: Sequence[Sequence[Any]],
    weights: Sequence[float] | None = None,
    **options: Any,
) -> list[tuple[Float32[np.ndarray, "m 4"], Float32[np.ndarray, " m"], Shaped[np.ndarray, " m"]]]:
    """`merge_arrays` for a list of images at once.

    Args:
      boxes_lists: of each image what `merge_arrays` takes.
      scores_lists: likewise.
      labels_lists: likewise.
      weights: of the models, the same for all images.
      **options: of `merge_arrays`.

    Returns:
      Of each image what `merge_arrays` returns.

    Raises:
      UserError: as `merge_arrays`; an image with another number of models.
    """
    if not len(scores_lists):
        return []
    models = {len(lists) for part in (boxes_lists, scores_lists, labels_lists) for lists in part}
    if len(models) != 1 or len({len(boxes_lists), len(scores_lists), len(labels_lists)}) != 1:
        raise UserError("merge_batch: found other numbers of models, expected as many each time")
    boxes_list, scores_list, labels_list = (
        [np.concatenate(parts) for parts in zip(*lists, strict=True)]
        for lists in (_shaped(boxes_lists), scores_lists, labels_lists)
    )
    counts = np.array([[len(scores) for scores in lists] for lists in scores_lists])
    images = [np.repeat(np.arange(len(counts)), column) for column in counts.T]
    boxes, scores, labels, image = merge_arrays(
        boxes_list, scores_list, labels_list, weights, images_list=images, **options
    )
    ends = np.searchsorted(image, np.arange(1, len(scores_lists)))
    parts = (np.split(array, ends) for array in (boxes, scores, labels))
    return list(zip(*parts, strict=True))


def _shaped(boxes_lists: Sequence[Sequence[Any]]) -> list[list[np.ndarray]]:
    """Lists without boxes have the shape (0,), which does not go with (n, 4)."""
    return [
        [np.asarray(boxes, np.float32).reshape(-1, 4) for boxes in lists] for lists in boxes_lists
    ]


def _operator(
    method: str, weights: Sequence[float] | None, models: int, options: Mapping[str, Any]
) -> tuple[Operator, np.ndarray]:
    """The operator, and what the scores of each model are multiplied by."""
    if method not in METHODS:
        raise UserError(f"method {method!r}: unknown, expected one of {', '.join(METHODS)}")
    own = np.ones(models) if weights is None else np.asarray(weights, np.float64)
    if own.shape != (models,) or not (own >= 0).all() or not (own.sum() > 0 or not models):
        raise UserError(f"weights: found {weights}, expected {models} numbers of at least 0")
    fields = dict(_DEFAULTS.get(method, {}))
    fields |= {_FIELDS.get(name, name): value for name, value in options.items()}
    name = method
    if method == "linear_soft_nms":
        name, fields["method"] = "soft_nms", "linear"
    factors = own
    if method == "nmw":
        factors = own / own.max(initial=1e-30)
    elif method != "wbf" and weights is not None:
        factors = own / own.sum()
    return make_operator({"name": name, **fields}, own.tolist()), factors


def _counts(
    boxes_list: Sequence, scores_list: Sequence, labels_list: Sequence, images_list: Sequence | None
) -> list[int]:
    """Boxes of each model.

    Raises:
      UserError: no models, or lists of different lengths.
    """
    counts = [len(scores) for scores in scores_list]
    if not counts:
        raise UserError("scores_list: found no models, expected at least one")
    given = {"boxes_list": boxes_list, "labels_list": labels_list, "images_list": images_list}
    for name, parts in given.items():
        if parts is None:
            continue
        found = [len(part) for part in parts]
        if found != counts:
            raise UserError(f"{name}: found {found} entries, expected {counts} as in scores_list")
    return counts


def _numbered(values: Shaped[np.ndarray, " n"]) -> tuple[np.ndarray, Int64[np.ndarray, " n"]]:
    """The distinct values, ascending, and the place of each value among them."""
    if len(values) and values.dtype.kind in "iu":
        low, high = int(values.min()), int(values.max())
        if high - low <= 4 * len(values) + _FEW_ROWS:  # without sorting
            shifted = (values - low).astype(np.int64)
            there = np.zeros(high - low + 1, bool)
            there[shifted] = True
            places = np.cumsum(there) - 1
            return np.flatnonzero(there).astype(values.dtype) + values.dtype.type(low), places[
                shifted
            ]
    known, places = np.unique(values, return_inverse=True)
    return known, places.astype(np.int64)
