"""What is known of each class on an image: present, absent, or unknown.

Shape legend: K classes of the run, n classes of a source, a of them absent on an image, b boxes of
an image.
"""

import numpy as np
from jaxtyping import Bool, Int, Int8, Int32, Int64

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

    A dataset that is annotated exhaustively (COCO) has a box of every object: of its photos whose
    boxes are used, all other classes that the source knows are absent, but for descendants of a
    boxed class (a box of a person may be a man) and for photos with ignore boxes, in which they
    may be.
    """

    def __init__(self, run: Dataset):
        """`run`: the dataset whose classes and hierarchy are those of the run."""
        above = transitive_closure(ancestors(run.hierarchy, run.class_labels))
        self._up = above | np.eye(run.num_classes, dtype=bool)
        self._down = np.ascontiguousarray(self._up.T)

    def of_image(
        self,
        source: Source,
        index: int,
        visible: Bool[np.ndarray, " b"] | None = None,
        *,
        cropped: bool = False,
    ) -> Int8[np.ndarray, " K"]:
        """1 where a class is present, -1 where it is absent, 0 where nobody looked.

        Args:
          source: of the image.
          index: in the dataset of the source.
          visible: which boxes of the image are seen; None: all. A class that is present by boxes
            none of which is seen is unknown: a bit of one may be left.
          cropped: part of the photo is not seen, so that a class which is present by its label
            alone is unknown.
        """
        verified, confidences = source.dataset.image_labels(index)
        is_absent = confidences == ABSENT
        labelled, boxed = source.classes[verified[~is_absent]], np.zeros(0, np.int32)
        if source.has_boxes:
            boxed = source.classes[source.dataset.image_boxes(index)[1]]
        annotated = np.concatenate([labelled, boxed])
        present = self._with(self._up, annotated)
        absent = self._with(self._down, _all_absent(source, np.unique(verified[is_absent])))
        if _has_every_box(source, index):
            absent |= source.known & ~self._with(self._down, annotated)
        seen = present
        if visible is not None:
            alone = labelled[:0] if cropped else np.setdiff1d(labelled, boxed)
            seen = self._with(self._up, np.concatenate([boxed[visible], alone]))
        return np.where(seen, 1, np.where(absent & ~present, -1, 0)).astype(np.int8)

    def _with(
        self, relatives: Bool[np.ndarray, "K K"], classes: Int[np.ndarray, " n"]
    ) -> Bool[np.ndarray, " K"]:
        """Which classes are in the rows of some classes; -1 is none."""
        return relatives[np.unique(classes[classes >= 0])].any(axis=0)


def _has_every_box(source: Source, index: int) -> bool:
    """Whether each object of an image has a box that is used."""
    exhaustive = source.has_boxes and bool(source.dataset.meta.get("exhaustive"))
    return exhaustive and not len(source.dataset.image_ignore_boxes(index))


def _all_absent(source: Source, absent: Int32[np.ndarray, " a"]) -> Int64[np.ndarray, " k"]:
    """The classes of the run all of whose classes in the source are among the `absent` ones."""

    def counts(classes: Int32[np.ndarray, " n"]) -> Int64[np.ndarray, " K"]:
        return np.bincount(classes[classes >= 0], minlength=source.num_classes)

    missing = counts(source.classes[absent])
    return np.flatnonzero((missing > 0) & (missing == counts(source.classes)))
