"""`config.model.box_head.classifier`, read and checked once.

The classes mirror tables of fields of configs/detection/base.py, where each field is explained.
"""

import dataclasses
from typing import Literal

from common.io.settings import check
from detection.classifiers.kinds import KINDS

HIERARCHICAL = ("sigmoid", "eql", "federated")  # losses that can know of ancestors
BY_FREQUENCY = ("softmax_eql", "eql", "federated")  # losses that ask how frequent classes are


@dataclasses.dataclass(frozen=True)
class EQLSettings:
    threshold: float
    gamma: float

    def __post_init__(self):
        check(0 <= self.threshold <= 1, "threshold", self.threshold, "a share of the photos, 0..1")
        check(0 <= self.gamma <= 1, "gamma", self.gamma, "a number from 0 to 1")


@dataclasses.dataclass(frozen=True)
class FederatedSettings:
    num_classes: int
    power: float

    def __post_init__(self):
        check(self.num_classes >= 1, "num_classes", self.num_classes, "at least 1")
        check(self.power >= 0, "power", self.power, "at least 0")


@dataclasses.dataclass(frozen=True)
class EQLv2Settings:
    gamma: float
    mu: float
    alpha: float

    def __post_init__(self):
        for name in ("gamma", "mu", "alpha"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")


@dataclasses.dataclass(frozen=True)
class SeesawSettings:
    p: float
    q: float
    floor: float

    def __post_init__(self):
        for name in ("p", "q"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        check(0 < self.floor <= 1, "floor", self.floor, "more than 0, at most 1")


@dataclasses.dataclass(frozen=True)
class RoIClassifierSettings:
    kind: Literal["softmax", "softmax_eql", "sigmoid", "eql", "federated", "eqlv2", "seesaw"]
    prior: float
    hierarchy: bool
    eql: EQLSettings
    federated: FederatedSettings
    eqlv2: EQLv2Settings
    seesaw: SeesawSettings

    def __post_init__(self):
        check(0 < self.prior < 1, "prior", self.prior, "a number between 0 and 1")
        check(
            not self.hierarchy or self.kind in HIERARCHICAL,
            "hierarchy",
            self.hierarchy,
            f"False: kind {self.kind!r} gives a region one class (one of "
            f"{', '.join(HIERARCHICAL)} can give it the ancestors too)",
        )

    @property
    def has_background(self) -> bool:
        """Whether there is a score of background."""
        return KINDS[self.kind].has_background

    @property
    def needs_frequencies(self) -> bool:
        """Whether training asks how frequent the classes are."""
        return self.kind in BY_FREQUENCY
