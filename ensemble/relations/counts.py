"""Counts of class pairs, which say what is usually seen together, and their file.

Shape legend: K classes.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

from common.io.atomic import open_atomic
from common.io.errors import UserError
from common.io.json_file import parse_json
from common.io.npz_file import read_npz
from common.io.paths import PathLike, local_copy

FORMAT = 1
_PAIR_COUNTS = ("images_both", "images_known", "boxes_inside", "boxes_known")
_CLASS_COUNTS = ("images_present", "images_absent")


@dataclasses.dataclass(frozen=True)
class Relations:
    """Counts of ordered class pairs; row i, column j.

    Attributes:
      class_labels: (K,) what rows and columns stand for.
      images_both: images with a box of i and one of j, for i != j.
      images_known: images with a box of j in which i is verified, present or absent.
      boxes_inside: boxes of i that lie inside some box of j.
      boxes_known: boxes of i in images in which j is verified.
      images_present: images with a box of a class.
      images_absent: images in which a class is verified absent. A class that is never found absent
        is only verified where it is present, and every P and q of it would be 1.
      meta: dataset, split, share of a box that must be covered to be inside.
    """

    class_labels: Sequence[str]
    images_both: Int64[np.ndarray, "K K"]
    images_known: Int64[np.ndarray, "K K"]
    boxes_inside: Int64[np.ndarray, "K K"]
    boxes_known: Int64[np.ndarray, "K K"]
    images_present: Int64[np.ndarray, " K"]
    images_absent: Int64[np.ndarray, " K"]
    meta: Mapping[str, Any]

    def cooccurrence(
        self, denominator: str = "j", min_images: int = 1
    ) -> Float32[np.ndarray, "K K"]:
        """P[i, j]: how often i is in an image with j.

        Args:
          denominator: 'j' divides by the images with j, as the paper's example (a person in 90.7 %
            of the images with a guitar) has it; 'i' by those with i, as its formula is printed.
          min_images: pairs with fewer images to divide by, or whose other class was found absent
            from fewer images, count as 0.
        """
        judged = self.images_absent[:, None] >= min_images
        ratio = _ratio(self.images_both, self.images_known, judged, min_images)
        return ratio if denominator == "j" else ratio.T

    def containment(self, min_boxes: int = 1) -> Float32[np.ndarray, "K K"]:
        """q[i, j]: share of the i boxes inside a j box; 0 where too few, as in `cooccurrence`."""
        judged = self.images_absent[None, :] >= min_boxes
        return _ratio(self.boxes_inside, self.boxes_known, judged, min_boxes)

    def reordered(self, class_labels: Sequence[str]) -> "Relations":
        """The same relations for another list of classes; classes not known here have none."""
        place = {label: index for index, label in enumerate(self.class_labels)}
        source = np.array([place.get(label, -1) for label in class_labels], np.int64)
        known = np.flatnonzero(source >= 0)
        counts = {name: np.zeros(len(source), np.int64) for name in _CLASS_COUNTS}
        for name, count in counts.items():
            count[known] = getattr(self, name)[source[known]]
        for name in _PAIR_COUNTS:
            counts[name] = np.zeros((len(source), len(source)), np.int64)
            counts[name][np.ix_(known, known)] = getattr(self, name)[
                np.ix_(source[known], source[known])
            ]
        return Relations(list(class_labels), meta=self.meta, **counts)

    def write(self, path: PathLike) -> None:
        """Writes the NPZ file, which is seen whole or not at all."""
        header = {"format": FORMAT, "class_labels": list(self.class_labels), **self.meta}
        counts = {name: getattr(self, name) for name in (*_PAIR_COUNTS, *_CLASS_COUNTS)}
        with open_atomic(path, "wb") as file:
            np.savez_compressed(file, header=np.array(json.dumps(header)), **counts)


def read_relations(path: PathLike) -> Relations:
    """Reads what `Relations.write` wrote.

    Raises:
      UserError: no such file, or a broken one.
    """
    try:
        with local_copy(path) as local:
            content = read_npz(local)
        header = parse_json(str(content["header"]), f"{path}: header")
        arrays = {name: content[name] for name in (*_PAIR_COUNTS, *_CLASS_COUNTS)}
        version = header.pop("format")
        labels = header.pop("class_labels")
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file, expected relations written by scripts.mine_relations"
        ) from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: no readable relations, cut or damaged ({type(error).__name__}: {text}); "
            "expected a file written by scripts.mine_relations"
        ) from error
    if version != FORMAT:
        raise UserError(
            f"{path}: format is {version!r}, expected {FORMAT}: mine the relations again"
        )
    is_texts = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not is_texts or len(set(labels)) != len(labels):
        raise UserError(f"{path}: class_labels: expected a list of texts, none of them twice")
    for name, array in arrays.items():
        if array.dtype.kind not in "iu":
            raise UserError(f"{path}: {name} has type {array.dtype}, expected whole numbers")
        shape = (len(labels),) * (1 if name in _CLASS_COUNTS else 2)
        if array.shape != shape:
            raise UserError(f"{path}: {name} has shape {array.shape}, expected {shape}")
    return Relations(labels, meta=header, **arrays)


def _ratio(
    count: Int64[np.ndarray, "K K"],
    of: Int64[np.ndarray, "K K"],
    judged: Bool[np.ndarray, "..."],
    least: int,
) -> Float32[np.ndarray, "K K"]:
    enough = judged & (of >= max(least, 1))
    return np.where(enough, count / np.maximum(of, 1), 0).astype(np.float32)
