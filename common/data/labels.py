"""What is known of each class on an image: verified present, verified absent, or unknown.

Shape legend: K classes of the run, n classes of a source, a of them absent on an image.
"""

import numpy as np
from jaxtyping import Int8, Int32, Int64

from common.data.dataset import Dataset
from common.data.dataset_format import ABSENT
from common.data.sources import Source
from common.tables.hierarchy import ancestors, transitive_closure


class VerifiedLabels:
    """Labels of images, expanded along the class hierarchy of the run.

    A class is present where it has a box or a verified label (LVIS' classes with not exhaustively
    annotated instances are present too), and so are all its ancestors: a photo of a man shows a
    person. It is absent where that was verified (LVIS' negative classes), and so are all its
    descendants, unless they are present. A class of the run that is several classes of a source
    (COCO's person is LVIS' baby and person) is absent only if each of these was verified absent.
    """

    def __init__(self, run: Dataset):
        """`run`: the dataset whose classes and hierarchy are those of the run."""
        above = transitive_closure(ancestors(run.hierarchy, run.class_labels))
        self._up = above | np.eye(run.num_classes, dtype=bool)
        self._down = np.ascontiguousarray(self._up.T)

    def of_image(self, source: Source, index: int) -> Int8[np.ndarray, " K"]:
        """1 where a class is present, -1 where it is absent, 0 where nobody looked."""
        verified, confidences = source.dataset.image_labels(index)
        is_absent = confidences == ABSENT
        present = source.classes[verified[~is_absent]]
        if source.has_boxes:
            boxed = source.classes[source.dataset.image_boxes(index)[1]]
            present = np.concatenate([present, boxed])
        up = self._up[np.unique(present[present >= 0])].any(axis=0)
        absent = _all_absent(source, np.unique(verified[is_absent]))
        down = self._down[absent].any(axis=0)
        return np.where(up, 1, np.where(down, -1, 0)).astype(np.int8)


def _all_absent(source: Source, absent: Int32[np.ndarray, " a"]) -> Int64[np.ndarray, " k"]:
    """The classes of the run all of whose classes in the source are among the `absent` ones."""

    def counts(classes: Int32[np.ndarray, " n"]) -> Int64[np.ndarray, " K"]:
        return np.bincount(classes[classes >= 0], minlength=source.num_classes)

    missing = counts(source.classes[absent])
    return np.flatnonzero((missing > 0) & (missing == counts(source.classes)))
