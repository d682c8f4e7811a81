"""Detections judged by the overlap of their masks with the object that their box found.

Shape legend: m judged detections.
"""

import numpy as np
from jaxtyping import Int

from common.data.dataset import Dataset
from common.masks import rle
from common.masks.dataset_masks import MaskReader
from common.metrics import matching
from common.metrics.openimages import Matches, Truth
from ensemble.chunks import Chunk

_NEAR = 0.3  # IoU of boxes from which masks are compared
_LEAST_IOU = 0.5


class MaskOverlaps:
    """Compares masks of detections with those of a dataset."""

    def __init__(self, dataset: Dataset):
        self._reader = MaskReader(dataset)

    def apply(
        self, matches: Matches, truth: Truth, chunk: Chunk, source: Int[np.ndarray, " n"]
    ) -> Matches:
        """The same detections, judged by their masks.

        Those that found an object without a mask are ABSORBED: nobody knows.

        Args:
          matches: by boxes.
          truth: that they were matched with.
          chunk: with masks.
          source: row of the chunk of each detection that was matched.
        """
        assert chunk.masks is not None and chunk.mask_sizes is not None
        overlaps = np.where(matches.overlaps >= 0, 0.0, -1.0)
        kinds = np.where(matches.kinds == matching.ABSORBED, matching.ABSORBED, matching.FALSE)
        kinds = kinds.astype(np.int8)
        near = np.flatnonzero((matches.overlaps >= _NEAR) & (matches.matched_idx >= 0))
        objects = truth.rows[matches.matched_idx[near]]
        for place, row in zip(near.tolist(), objects.tolist(), strict=True):
            own = source[matches.rows[place]]
            size = (int(chunk.mask_sizes[own, 0]), int(chunk.mask_sizes[own, 1]))
            mask = self._reader.rle(row, size)
            if mask is None:
                kinds[place] = matching.ABSORBED
            else:
                overlaps[place] = rle.iou([chunk.masks[own]], [mask], size)[0, 0]
        matching.claim(kinds, overlaps, matches.matched_idx, _LEAST_IOU, matching.TRUE)
        return matches._replace(kinds=kinds, overlaps=overlaps)
