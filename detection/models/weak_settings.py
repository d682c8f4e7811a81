"""`config.model.weak`, read and checked once; configs/detection/base.py explains each field."""

import dataclasses
from typing import Literal

from common.io.settings import check


@dataclasses.dataclass(frozen=True)
class MiningSettings:
    rule: Literal["top1", "mist"]
    threshold: float
    top_share: float
    seed_iou: float
    max_boxes: int
    refine: bool
    background_iou: float
    start_steps: int
    ramp_steps: int

    def __post_init__(self):
        for name, limit in (("threshold", 1), ("seed_iou", 1), ("background_iou", 0.5)):
            value = getattr(self, name)
            check(0 <= value < limit, name, value, f"a number in [0, {limit})")
        check(0.001 <= self.top_share <= 1, "top_share", self.top_share, "from 0.001 to 1")
        check(self.max_boxes >= 1, "max_boxes", self.max_boxes, "at least 1")
        for name in ("start_steps", "ramp_steps"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


@dataclasses.dataclass(frozen=True)
class WeakSettings:
    kind: Literal["none", "wsddn"]
    class_stream: Literal["softmax", "sigmoid"]
    width: int
    num_proposals: int
    refinements: int
    feature_gradient: float
    truth_seeds: bool
    mining: MiningSettings

    def __post_init__(self):
        for name in ("width", "num_proposals"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        share = self.feature_gradient
        check(0 <= share <= 1, "feature_gradient", share, "a share from 0 to 1")
        check(self.refinements >= 0, "refinements", self.refinements, "0 (none) or more")

    @property
    def is_on(self) -> bool:
        """Whether the model has the head."""
        return self.kind != "none"
