"""Schema, value rules and rows in memory of the detections table (`common.tables`).

Shape legend: n detections, I covered images, C labels.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int, Int32

from common.io.paths import PathLike, to_epath

METADATA_KEY = b"detections"
MAX_SCORE = 1.5
COORDINATE_SLACK = 1e-4
COORDINATES = ("xmin", "ymin", "xmax", "ymax")
COLUMNS = {
    "image_id": pa.string(),
    "label": pa.string(),
    "score": pa.float32(),
    **{name: pa.float32() for name in COORDINATES},
}
MASK_COLUMNS = {"mask": pa.binary(), "mask_height": pa.int32(), "mask_width": pa.int32()}


def shard_name(index: int, count: int) -> str:
    return f"part-{index:05d}-of-{count:05d}.parquet"


def remove_table(path: PathLike) -> None:
    """Removes a table, be it a file or a folder of shards, if there is one."""
    table = to_epath(path)
    if table.is_dir():
        table.rmtree()
    else:
        table.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Detections:
    """Rows of a detections table in table order.

    Attributes:
      image_ids: (I,) sorted ids of all images covered.
      labels: (C,) labels that `label_index` points into.
      image_index: (n,) into `image_ids`, non-decreasing.
      label_index: (n,) into `labels`.
      scores: (n,) descending within an image.
      boxes: (n, 4) normalised xmin, ymin, xmax, ymax.
      metadata: the file metadata without `image_ids`.
      masks: (n,) objects, COCO RLE counts as bytes; None when the table has none.
      mask_sizes: (n, 2) height and width of the masks, or None.
    """

    image_ids: Sequence[str]
    labels: Sequence[str]
    image_index: Int32[np.ndarray, " n"]
    label_index: Int32[np.ndarray, " n"]
    scores: Float32[np.ndarray, " n"]
    boxes: Float32[np.ndarray, "n 4"]
    metadata: Mapping[str, Any]
    masks: np.ndarray | None = None
    mask_sizes: Int32[np.ndarray, "n 2"] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: slice | np.ndarray) -> "Detections":
        """The given rows; the covered images stay."""
        names = ("image_index", "label_index", "scores", "boxes", "masks", "mask_sizes")
        arrays = {name: getattr(self, name) for name in names}
        taken: dict[str, Any] = {n: None if a is None else a[rows] for n, a in arrays.items()}
        return dataclasses.replace(self, **taken)

    def mask_columns(self) -> tuple[list[bytes], Int32[np.ndarray, "n 2"]]:
        """Masks and their sizes of a table that was read with masks."""
        if self.masks is None or self.mask_sizes is None:
            raise ValueError("the detections were read without masks")
        return self.masks.tolist(), self.mask_sizes

    def chunks(self, rows: int = 1 << 19) -> Iterator["Detections"]:
        """Pieces of whole images of about `rows` rows."""
        start = 0
        while start < len(self):
            stop = min(start + rows, len(self))
            stop = int(np.searchsorted(self.image_index, self.image_index[stop - 1], "right"))
            yield self.take(slice(start, stop))
            start = stop


def rank_in_image(image_index: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Number of earlier rows of the same image; rows of an image lie together."""
    positions = np.arange(len(image_index))
    new = np.diff(image_index, prepend=-1) != 0
    return positions - np.maximum.accumulate(np.where(new, positions, 0))


def find_invalid(scores: np.ndarray, boxes: np.ndarray) -> tuple[int, str] | None:
    """First row that breaks the value rules and what is wrong with it, or None."""
    good_score = (scores >= 0) & (scores <= MAX_SCORE)
    # Comparisons with NaN are false, so NaN never passes.
    inside = (boxes >= -COORDINATE_SLACK) & (boxes <= 1 + COORDINATE_SLACK)
    upright = (boxes[:, 0] <= boxes[:, 2]) & (boxes[:, 1] <= boxes[:, 3])
    good = good_score & inside.all(1) & upright
    if good.all():
        return None
    row = int(np.argmin(good))
    box = ", ".join(f"{value:g}" for value in boxes[row])
    if not good_score[row]:
        return row, f"score {scores[row]:g}, expected a number in [0, {MAX_SCORE:g}]"
    if not inside[row].all():
        return row, f"box [{box}], expected coordinates normalised to [0, 1]"
    return row, f"inverted box [{box}], expected xmin <= xmax and ymin <= ymax"


def find_duplicate(
    image_index: np.ndarray, label_index: np.ndarray, scores: np.ndarray, boxes: np.ndarray, **_
) -> tuple[int, int] | None:
    """An earlier and a later row that are equal, or None. Rows must be in table order."""
    tied = np.zeros(len(scores), bool)
    same = (image_index[1:] == image_index[:-1]) & (scores[1:] == scores[:-1])
    tied[1:] |= same
    tied[:-1] |= same
    rows = np.flatnonzero(tied)
    if not len(rows):
        return None
    # -0 becomes 0, so that equal values have equal bits.
    values = np.column_stack([scores[rows], boxes[rows]]) + np.float32(0)
    keys = np.column_stack([image_index[rows], label_index[rows], values.view(np.int32)])
    order = np.lexsort((rows, *keys.T))
    equal = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    if not equal.any():
        return None
    pairs = np.column_stack([rows[order[:-1]], rows[order[1:]]])[equal]
    earlier, later = pairs[np.argmin(pairs[:, 1])]
    return int(earlier), int(later)
