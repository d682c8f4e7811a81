"""What all tables of a report are judged by: the images, the truth and the names of the tables.

Shape legend: I images scored, K classes, S sizes.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from common.data.dataset import GROUP_OF, Dataset
from common.io.errors import UserError
from common.metrics.coverage import split_images
from common.metrics.names import Metric
from common.metrics.rules import Rule, make_rule, metric_of
from common.report import gains
from common.tables import DetectionsReader
from common.tables.ranges import rows_of


@dataclasses.dataclass(frozen=True)
class Scope:
    """What all tables are judged by: images, truth and its counts (expanded to parents)."""

    dataset: Dataset
    split: str
    metric: Metric  # whose figures head the page, one of `common.metrics.names.METRICS`
    rule: Rule  # of that metric, which judges single detections
    images: Int[np.ndarray, " I"]  # sorted indices of the dataset
    parents: Bool[np.ndarray, "K K"]  # of the rule
    counts: Float[np.ndarray, " K"]  # boxes to find
    size_counts: Float[np.ndarray, "S K"]
    image_counts: Int[np.ndarray, " I"]
    train_counts: Float[np.ndarray, " K"] | None
    train_split: str | None


def open_scope(
    dataset: Dataset,
    split: str,
    readers: Sequence[DetectionsReader],
    *,
    train_split: str | None,
    metric: Metric | None = None,
    image_labels: bool = True,
    allow_partial: bool,
    say: Callable[[str], None] = print,
) -> Scope:
    """Checks that the tables cover the same images of the split, and counts the truth.

    Args:
      dataset: holds truth, verified labels and hierarchy.
      split: images to score.
      readers: the tables.
      metric: one of `common.metrics.names.METRICS`; None: that of the dataset (`metric_of`).
      image_labels: as in `evaluate_openimages`.
      train_split: its boxes per class say how rare a class is; None when there is no such split.
      allow_partial: other images of the split may be missing.
      say: where notes go.

    Raises:
      UserError: as `evaluate_openimages`, or tables of different images.
    """
    images: np.ndarray | None = None
    for reader in readers:
        indices, notes = split_images(dataset, split, reader, allow_partial)
        for line in notes:
            say(line)
        covered = np.sort(indices[indices >= 0])
        if images is not None and not np.array_equal(images, covered):
            raise UserError(
                f"{reader.path}: covers {len(covered)} images of split {split!r}, not the same as "
                f"the {len(images)} of {readers[0].path}: compare tables of the same images"
            )
        images = covered
    if images is None:
        raise ValueError("no tables")
    metric = metric or metric_of(dataset)
    rule = make_rule(dataset, metric.partition("_")[0], image_labels=image_labels)
    say(f"metric: {metric}")
    parents, counts = rule.parents, rule.counts(images)
    if not counts.any():
        raise UserError(f"{dataset.directory}: split {split!r} has no ground-truth boxes")
    owner, rows = rows_of(dataset.box_offsets, images)
    if not rule.group_of_weight:
        single = np.asarray(dataset.box_flags[rows]) & GROUP_OF == 0
        owner, rows = owner[single], rows[single]
    classes = np.asarray(dataset.box_classes[rows])
    sizes = gains.size_of(np.asarray(dataset.boxes[rows]))
    cells = np.bincount(
        sizes * np.int64(len(parents)) + classes, minlength=len(gains.SIZES) * len(parents)
    )
    size_counts = cells.reshape(-1, len(parents)).astype(np.float64)
    train = None
    if train_split is not None:
        train = rule.counts(dataset.split(train_split))
    return Scope(
        dataset=dataset,
        split=split,
        metric=metric,
        rule=rule,
        images=images,
        parents=parents,
        counts=counts,
        size_counts=size_counts + size_counts @ parents,
        image_counts=np.bincount(owner, 1 + parents.sum(1)[classes], len(images)).astype(int),
        train_counts=train,
        train_split=train_split,
    )


def table_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """Short names that tell the tables apart: the parts of the paths that differ.

    Raises:
      UserError: a table is given twice.
    """
    parts = [Path(os.path.abspath(path)).with_suffix("").parts for path in paths]
    if len(set(parts)) < len(parts):
        twice = next(path for i, path in enumerate(paths) if parts[i] in parts[:i])
        raise UserError(f"--detections: {twice} is given twice")
    stems = [part[-1] for part in parts]
    if len(set(stems)) == len(stems):
        return stems
    while all(len(part) > 1 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    while all(len(part) > 1 for part in parts) and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return ["/".join(part) for part in parts]
