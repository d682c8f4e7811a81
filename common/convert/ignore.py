"""Ignore boxes from a second annotation file of the same photos.

LVIS labels only some classes on a photo, and COCO knows more of its objects: boxes of COCO on LVIS
photos say where something is that is no background.

Shape legend: N images, Q ignore boxes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from common.convert.annotations import ImageTable
from common.convert.coco_file import CocoFile
from common.data.photo_names import photo_name
from common.io.errors import UserError

# Largest difference of log(height / width): sizes of resized photos are rounded.
_SAME_SHAPE = 0.02
# Share of matched images of another shape above which the file is about other photos: image ids of
# two data sets can be the same numbers by chance.
_OTHER_PHOTOS = 0.1


def read_ignore_boxes(
    files: Sequence[str], images: ImageTable, sizes: Int32[np.ndarray, "N 2"]
) -> dict[str, np.ndarray]:
    """Reads files in COCO form; crowds and objects alike become ignore boxes.

    The images of a file are matched by file name (without folder and extension; an image without
    file name is called by its id), and where no name matches by image id.

    Args:
      files: paths.
      images: those of the data set.
      sizes: their height and width in pixels, 0 where unknown.

    Returns:
      Columns: `image` (Q), index into the image table, and `box` (Q, 4), normalised.

    Raises:
      UserError: a file without images of the set, or whose images have other shapes.
    """
    tables = [_read(Path(file), images, sizes) for file in files]
    return {name: np.concatenate([table[name] for table in tables]) for name in ("image", "box")}


def _read(path: Path, images: ImageTable, sizes: Int32[np.ndarray, "N 2"]) -> dict[str, np.ndarray]:
    content = CocoFile(path)
    places = _match(content, images)
    matched = np.flatnonzero(places >= 0)
    if not len(matched):
        first = next(iter(content.image_index), None)
        raise UserError(
            f"--ignore={path}: none of its {len(places):,} images is in the set (first id "
            f"{first!r}, file {content.image_files[0] if content.image_files else ''!r}; the set "
            f"has ids like {images.ids[0]!r} and files like {images.files.get(0, '')!r})"
        )
    theirs = np.array(content.image_sizes, np.float64)[matched]
    ours = np.asarray(sizes, np.float64)[places[matched]]
    known = (ours > 0).all(1) & (theirs > 0).all(1)
    ratio = (theirs[:, 0] * ours[:, 1])[known] / (theirs[:, 1] * ours[:, 0])[known]
    other = np.abs(np.log(ratio)) > _SAME_SHAPE
    if other.sum() > _OTHER_PHOTOS * len(other):
        raise UserError(
            f"--ignore={path}: {other.mean():.0%} of the {len(matched):,} matched images have "
            "another shape than the photos of the set: these are other photos"
        )
    places[matched[known][other]] = -1
    places[matched[~(theirs > 0).all(1)]] = -1  # their boxes are in pixels of an unknown size
    image = np.append(places, -1)[content.images()]
    box = np.clip(content.boxes(), 0, 1)
    with np.errstate(invalid="ignore"):
        good = (image >= 0) & (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])
    num_matched = int((places >= 0).sum())
    print(
        f"{path}: {int(good.sum()):,} ignore boxes on {num_matched:,} of {len(images):,} images; "
        f"{len(places) - num_matched:,} of its images are not in the set "
        f"({int(other.sum()):,} because of another shape)",
        flush=True,
    )
    return {"image": image[good], "box": box[good]}


def _match(content: CocoFile, images: ImageTable) -> np.ndarray:
    """Index in the image table for each image of the file, -1 = none."""
    by_name: dict[str, int] = {}
    for i, image_id in enumerate(images.ids):
        name = photo_name(image_id, images.files.get(i, ""))
        by_name[name] = -1 if name in by_name else i  # a name that two photos have matches none
    names = [by_name.get(Path(file).stem, -1) for file in content.image_files]
    if max(names, default=-1) < 0:
        names = [images.find(str(raw_id)) for raw_id in content.image_index]
    return np.array(names, np.int64)
