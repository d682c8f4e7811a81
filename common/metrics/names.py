"""The metrics by name, apart: commands name them in their flags before anything is imported."""

from typing import Literal, get_args

Metric = Literal["openimages", "openimages_masks", "coco", "coco_masks", "lvis", "lvis_masks"]
METRICS: tuple[str, ...] = get_args(Metric)
BOX_METRICS = METRICS[::2]
