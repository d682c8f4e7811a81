"""`config.test_time`: at which scales, and whether mirrored, each photo is looked at."""

import dataclasses
from typing import Literal

from common.io.settings import check


@dataclasses.dataclass(frozen=True)
class ViewSettings:
    """The views of a photo; `detection.tta.test_time` says what the fields mean."""

    scales: tuple[int, ...]
    long_ratios: tuple[float, ...]
    max_long: int
    flip: bool
    merge: Literal["union", "tables", "mean"]

    def __post_init__(self):
        scales, ratios = self.scales, self.long_ratios
        distinct = min(scales, default=1) >= 1 and len(set(scales)) == len(scales)
        check(distinct, "scales", scales, "short sides in pixels, none twice")
        ascending = bool(ratios) and ratios[0] >= 1 and list(ratios) == sorted(set(ratios))
        check(ascending, "long_ratios", ratios, "ascending numbers from 1 on")
        enough = self.max_long >= max(scales, default=1)
        check(enough, "max_long", self.max_long, "pixels, at least the largest scale")

    @property
    def is_on(self) -> bool:
        """Whether several views are asked for."""
        return bool(self.scales)

    @property
    def views(self) -> list[tuple[int, bool]]:
        """(place in `scales`, mirrored?) of each view."""
        mirrored = (False, True) if self.flip else (False,)
        return [(place, flip) for place in range(len(self.scales)) for flip in mirrored]

    def view_name(self, view: tuple[int, bool]) -> str:
        """Such as `scale0800_flip`."""
        return f"scale{self.scales[view[0]]:04d}" + "_flip" * view[1]
