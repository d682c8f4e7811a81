"""Elaborate augmentation (paper section 5.3): a photo is turned and cropped around a drawn box.

The plan draws a class and a photo of it; here a box of that class is chosen, the photo is turned,
more for classes of long objects, and a scale is drawn at which the window covers the box. The scale
is such that boxes are as large in what the model sees as they are in the training photos: the
longer side of the turned box over that of the photo follows the training set's histogram.

Let z be how much larger the box becomes than in the whole photo fitted into the canvas. 'crop'
reads the paper's scale as that of a window cut out of the photo and fitted into the canvas: z lies
between 1, where the window is all of the photo (s_mem_max: no more fits into memory), and what
still covers the box. 'resize' reads it as that of the photo, of which what exceeds the canvas is
cut off: z may be below 1, and ends where the box would leave the canvas. In both readings
`max_zoom` bounds it, so that a box of few pixels does not fill a canvas.

Shape legend: K classes of the run, n boxes of a photo, N bins of `BoxShapes.ratios`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

from common.data.box_shapes import RATIO_BINS, BoxShapes, box_shapes
from common.data.placement import Geometry, fit, transform_boxes
from common.data.plans.plan import ignored_flags
from common.data.rotation import rotation_deviations, turn_angles
from common.data.settings import DataSettings, ElaborateSettings
from common.data.sources import Source

_MIN_ANGLE = np.radians(1.0)  # smaller ones change little and cost as much as large ones
NUM_DRAWS = 7  # random numbers of a photo: ratio, top, left, mirror, box, and two of the angle


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The box that a photo is cropped around.

    Attributes:
      box: (4,) normalised, with an area; None where the photo has none.
      deviation: standard deviation of the angle, radians.
    """

    box: Float32[np.ndarray, " 4"] | None
    deviation: float


@dataclasses.dataclass(frozen=True)
class ElaborateAugmentation:
    """See the module; `of` makes it.

    Attributes:
      settings: `config.data.elaborate`.
      flip: mirror half of the photos.
      jitter: least and largest scale of a photo, where the settings draw none.
      ignored: bits of boxes that are no objects.
      pools: of which pool each class is.
      deviations: of the angles, for each class of the run, radians.
      cumulative: share of the boxes of the training set with a smaller ratio than each bin's start,
        and 1.
    """

    settings: ElaborateSettings
    flip: bool
    jitter: tuple[float, float]
    ignored: int
    pools: Int32[np.ndarray, " K"]
    deviations: Float[np.ndarray, " K"]
    cumulative: Float[np.ndarray, " N+1"]

    @classmethod
    def of(
        cls, sources: Sequence[Source], data: DataSettings, pools: Int32[np.ndarray, " K"]
    ) -> "ElaborateAugmentation":
        """Reads the shapes of all boxes of the training photos, or finds them (seconds).

        Args:
          sources: of the run.
          data: `config.data`.
          pools: of the classes of the run (`common.data.plans.pools`).
        """
        ignored = ignored_flags(data)
        boxed = [source for source in sources if source.has_boxes]
        shapes = [box_shapes(source.dataset, source.images, ignored) for source in boxed]
        aspects = _of_run(sources[0].num_classes, boxed, shapes)
        ratios = sum((of_source.ratios for of_source in shapes), np.zeros(RATIO_BINS))
        cumulative = np.concatenate([[0.0], np.cumsum(ratios)])
        return cls(
            data.elaborate,
            data.flip,
            data.scale_jitter,
            ignored,
            pools,
            rotation_deviations(aspects) * data.elaborate.rotate,
            cumulative / max(cumulative[-1], 1.0),
        )

    def geometry(
        self,
        photo_size: tuple[int, int],
        canvas: tuple[int, int],
        source: Source,
        image: int,
        drawn_class: int,
        draws: Sequence[float],
    ) -> Geometry:
        """Where a photo lies on its canvas.

        Args:
          photo_size: height, width as displayed.
          canvas: height, width.
          source: of the photo.
          image: index in its dataset.
          drawn_class: class of the run that the photo was drawn for, -1: none.
          draws: NUM_DRAWS random numbers in [0, 1).
        """
        ratio, top, left, coin, which, *normal = draws
        chosen = self._choose(source, image, drawn_class, which)
        angle = float(turn_angles(np.array([chosen.deviation]), np.array([normal]))[0])
        angle = 0.0 if abs(angle) < _MIN_ANGLE else angle
        flip = self.flip and coin < 0.5
        placed = self._place(photo_size, canvas, flip, ratio, (top, left))
        whole = dataclasses.replace(placed, angle=angle)
        if chosen.box is None:
            return whole
        box = chosen.box[None]
        if angle and not transform_boxes(box, whole)[1][0]:  # it would leave the frame
            whole = dataclasses.replace(whole, angle=0.0)
        if self.settings.scale == "none":
            return whole
        window = whole.full if self.settings.scale == "crop" else canvas
        zoom = self._zoom(box, whole, window, ratio)
        full = fit(photo_size, canvas, scale=zoom).full
        content = (min(full[0], window[0]), min(full[1], window[1]))
        placed = dataclasses.replace(whole, full=full, content=full, flip=False)
        x0, y0, x1, y1 = transform_boxes(box, placed)[0][0].tolist()
        offset = (
            _cover(y0, y1, full[0], content[0], top),
            _cover(x0, x1, full[1], content[1], left),
        )
        return dataclasses.replace(placed, offset=offset, content=content, flip=flip)

    def _place(
        self,
        photo_size: tuple[int, int],
        canvas: tuple[int, int],
        flip: bool,
        draw: float,
        crop: tuple[float, float],
    ) -> Geometry:
        """The photo before it is turned: whole, or with the plain jitter where no scale is."""
        if self.settings.scale != "none":
            return fit(photo_size, canvas, flip=flip)
        low, high = self.jitter
        return fit(photo_size, canvas, scale=low + (high - low) * draw, crop=crop, flip=flip)

    def _choose(self, source: Source, image: int, drawn_class: int, which: float) -> Chosen:
        """A box of the drawn class, else of its pool, else any object of the photo."""
        boxes, classes = np.zeros((0, 4), np.float32), np.zeros(0, np.int32)
        if source.has_boxes:
            boxes, annotated, flags = source.dataset.image_boxes(image)
            boxes, classes = np.clip(boxes, 0.0, 1.0), source.classes[annotated]
            has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
            objects = np.flatnonzero((classes >= 0) & (flags & self.ignored == 0) & has_area)
            boxes, classes = boxes[objects], classes[objects]
        if not len(boxes):
            known = self.deviations if drawn_class < 0 else self.deviations[[drawn_class]]
            return Chosen(None, float(known.min()))
        rows = np.flatnonzero(self._wanted(classes, drawn_class))
        row = rows[int(which * len(rows))]
        return Chosen(boxes[row], float(self.deviations[classes[row]]))

    def _wanted(self, classes: Int32[np.ndarray, " n"], drawn_class: int) -> Bool[np.ndarray, " n"]:
        if drawn_class >= 0:
            for wanted in (classes == drawn_class, self.pools[classes] == self.pools[drawn_class]):
                if wanted.any():
                    return wanted
        return np.ones(len(classes), bool)

    def _zoom(
        self, box: Float32[np.ndarray, "1 4"], whole: Geometry, window: tuple[int, int], draw: float
    ) -> float:
        """How much larger than in the whole fitted photo the box is to be drawn."""
        x0, y0, x1, y1 = transform_boxes(box, whole)[0][0].tolist()
        ratio = max(x1 - x0, y1 - y0) / max(whole.full)
        most = min(window[1] / (x1 - x0), window[0] / (y1 - y0), self.settings.max_zoom)
        least = 1.0 if self.settings.scale == "crop" else 1.0 / self.settings.max_zoom
        return self._draw_ratio(least * ratio, max(most, least) * ratio, draw) / ratio

    def _draw_ratio(self, low: float, high: float, draw: float) -> float:
        """A ratio between two, distributed as in the training set; evenly if it has none there."""
        edges = np.linspace(0.0, 1.0, RATIO_BINS + 1)
        first, last = np.interp([low, high], edges, self.cumulative).tolist()
        if last <= first:
            return low + draw * (high - low)
        share = first + draw * (last - first)
        place = min(int(np.searchsorted(self.cumulative, share, "right")), RATIO_BINS)
        start, end = self.cumulative[place - 1 : place + 1].tolist()
        found = (place - 1 + (share - start) / max(end - start, 1e-300)) / RATIO_BINS
        return min(max(found, low), high)


def _of_run(
    num_classes: int, sources: Sequence[Source], shapes: Sequence[BoxShapes]
) -> Float[np.ndarray, " K"]:
    """Median aspects of the run's classes; the mean by boxes of what becomes one class; else 1."""
    boxes, sums = np.zeros((2, num_classes))
    for source, of_source in zip(sources, shapes, strict=True):
        mapped = source.classes >= 0
        classes, counts = source.classes[mapped], of_source.counts[mapped].astype(np.float64)
        boxes += np.bincount(classes, counts, num_classes)
        sums += np.bincount(classes, counts * of_source.aspects[mapped], num_classes)
    return np.where(boxes > 0, sums / np.maximum(boxes, 1), 1.0)


def _cover(low: float, high: float, length: int, window: int, draw: float) -> int:
    """A random start of a window, in whole pixels, that covers low ... high as far as it can."""
    room = length - window
    first = min(max(int(np.ceil(high)) - window, 0), room)
    last = min(int(low), room)
    return last if last <= first else first + int(draw * (last - first + 1))
