"""What a detector found on one photo.

Shape legend: n detections, H, W the photo.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32
from PIL import Image

from common.data import images, placement
from common.data.model_classes import ModelClasses
from common.geometry import boxes as box_ops
from common.masks import rle
from common.report.photo_drawing import draw_boxes, drawing_of
from common.tables import Detections
from detection.inference import PhotoRows

MIN_SCORE = 0.4  # of what is drawn, as in scripts.draw_detections


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Result:
    """Detections of one photo, best first.

    Attributes:
      name: path of the photo, or its place in the call.
      size: height and width of the photo.
      scores: from 0 to 1.
      labels: class numbers, places in the lists of `classes`.
      normalised_boxes: xmin, ymin, xmax, ymax as shares of width and height.
      mask_counts: COCO's compressed run lengths of each mask; None without mask head.
      classes: labels and names of all classes of the model.
    """

    name: str
    size: tuple[int, int]
    scores: Float32[np.ndarray, " n"]
    labels: Int32[np.ndarray, " n"]
    normalised_boxes: Float32[np.ndarray, "n 4"]
    mask_counts: list[bytes] | None
    classes: ModelClasses
    _open: Callable[[], images.Photo]

    @classmethod
    def of(
        cls, rows: PhotoRows, classes: ModelClasses, name: str, open_photo: Callable
    ) -> "Result":
        """The rows of a photo, sorted as a detections table is."""
        order = np.argsort(-rows.scores, kind="stable")
        masks = None if rows.masks is None else [rows.masks[i] for i in order]
        labels = rows.classes[order].astype(np.int32)
        given = (rows.size, rows.scores[order], labels, rows.boxes[order], masks)
        return cls(name, *given, classes, open_photo)

    def __repr__(self) -> str:
        height, width = self.size
        return f"Result({self.name!r}, {width}x{height} pixels, {len(self)} detections)"

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def boxes(self) -> Float32[np.ndarray, "n 4"]:
        """xmin, ymin, xmax, ymax in pixels of the photo."""
        pixels = self.normalised_boxes * box_ops.per_side(np.array(self.size))
        return pixels.astype(np.float32)

    @property
    def names(self) -> list[str]:
        """Name of the class of each detection."""
        return [self.classes.names[label] for label in self.labels]

    @property
    def masks(self) -> Bool[np.ndarray, "n H W"] | None:
        """Pixels of each object, made at each call; None without mask head."""
        if self.mask_counts is None:
            return None
        return rle.decode_all(self.mask_counts, self.size)

    def above(self, score: float) -> "Result":
        """Only what scores at least `score`."""
        count = int((self.scores >= score).sum())
        rows = slice(count)
        return dataclasses.replace(
            self,
            scores=self.scores[rows],
            labels=self.labels[rows],
            normalised_boxes=self.normalised_boxes[rows],
            mask_counts=None if self.mask_counts is None else self.mask_counts[rows],
        )

    def draw(self, min_score: float = MIN_SCORE, side: int = 1280) -> Image.Image:
        """The photo with boxes, names and masks.

        Args:
          min_score: weaker ones are left out.
          side: a photo whose longest side has more pixels is drawn smaller.
        """
        shown = self.above(min_score)
        count = len(shown)
        sizes = np.tile(np.array(self.size, np.int32), (count, 1))
        table = Detections(
            [self.name],
            self.classes.labels,
            np.zeros(count, np.int32),
            shown.labels,
            shown.scores,
            shown.normalised_boxes,
            {},
            None if shown.mask_counts is None else np.array(shown.mask_counts, object),
            None if shown.mask_counts is None else sizes,
        )
        photo = self._open()
        limit = min(side, max(photo.size))
        picture = Image.fromarray(
            placement.draw_content(photo, placement.fit(photo.size, (limit, limit)))
        )
        names = dict(zip(self.classes.labels, self.classes.names, strict=True))
        return draw_boxes(picture, drawing_of(table, names))

    def to_supervision(self) -> dict[str, Any]:
        """What `supervision.Detections(**result.to_supervision())` takes."""
        return {
            "xyxy": self.boxes,
            "confidence": self.scores,
            "class_id": self.labels.astype(int),
            "mask": self.masks,
            "data": {"class_name": np.array(self.names, dtype=str)},
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, as JSON holds them; masks as COCO's {"size", "counts"}."""
        rows: list[dict[str, Any]] = [
            {
                "label": self.classes.labels[label],
                "name": self.classes.names[label],
                "score": round(float(score), 6),
                "box": [round(float(side), 3) for side in box],
            }
            for label, score, box in zip(self.labels, self.scores, self.boxes, strict=True)
        ]
        for row, counts in zip(rows, self.mask_counts or (), strict=bool(self.mask_counts)):
            row["mask"] = {"size": list(self.size), "counts": counts.decode()}
        return {"width": self.size[1], "height": self.size[0], "detections": rows}
