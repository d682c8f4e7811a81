"""What an evaluation at the end of a training will need, asked before the training."""

from collections.abc import Callable

import numpy as np

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.metrics.coco import require_masks, require_sizes
from common.tables.ranges import rows_of

_USUAL = "validation"
_OTHER_NAMES = ("val", "valid", "test")


def evaluation_split(
    dataset: Dataset, name: str, say: Callable = print, off: str = "config.evaluation.every_epochs"
) -> str:
    """The split `name`, or for the usual name, where it is absent, another name of the same thing.

    Args:
      dataset: opened dataset directory.
      name: `config.data.eval_split` or --split.
      say: told of another name.
      off: field that ends the need for a split when it is -1.

    Raises:
      UserError: there is no such split.
    """
    if name in dataset.splits:
        return name
    found = ", ".join(dataset.splits) or "none"
    other = next((other for other in _OTHER_NAMES if other in dataset.splits), None)
    if name == _USUAL and other is not None:
        say(f"note: {dataset.directory} has no split 'validation', {other!r} is taken", flush=True)
        return other
    raise UserError(
        f"{dataset.directory}: no split {name!r}; it has {found} (choose one by "
        "config.data.eval_split, make one by scripts.prepare_data --split=random, or "
        f"--{off}=-1 to train without evaluation)"
    )


def check_masks(dataset: Dataset, split: str) -> None:
    """Raises UserError where no box of a split has a mask."""
    _, rows = rows_of(dataset.box_offsets, dataset.split(split))
    offsets = dataset.mask_offsets
    if offsets is None or not np.any(offsets[rows + 1] > offsets[rows]):
        raise UserError(
            f"{dataset.directory}: split {split!r} has no ground-truth masks, expected some to "
            "compare with"
        )


def check_metric(dataset: Dataset, split: str, metric: str) -> None:
    """Refuses a split that a metric cannot score, whatever the detections are.

    Args:
      dataset: ground truth.
      split: of it.
      metric: one of scripts.score.

    Raises:
      UserError: no ground truth, no masks, sizes of photos or verified classes that are not known.
    """
    kind, _, masks = metric.partition("_")
    images = dataset.split(split)
    _, rows = rows_of(dataset.box_offsets, images)
    if not len(rows):
        raise UserError(
            f"{dataset.directory}: split {split!r} has no ground-truth boxes to score by, "
            "--config.evaluation.every_epochs=-1 trains without evaluation"
        )
    if masks:
        check_masks(dataset, split)
    if kind == "lvis" and len(dataset.meta.get("frequency") or ()) != dataset.num_classes:
        raise UserError(
            f"{dataset.directory}/dataset.json: no frequency of the classes, metric {metric} needs "
            "a dataset made by python -m scripts.prepare_data lvis"
        )
    if kind in ("coco", "lvis"):
        require_sizes(dataset, images, f"metric {metric}")
        if masks:
            require_masks(dataset, images, lambda _: None)
