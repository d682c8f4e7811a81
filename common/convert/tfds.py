"""Any TensorFlow Datasets detection set: an `image` and a sequence of `bbox` + `label`.

The encoded bytes of every photo are written as they are into `images/` of the dataset directory,
without decoding. Crowd and group-of flags and the other `is_*` flags are taken where they exist;
image-level labels are not (their names and meanings differ from set to set).
"""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from common.convert.annotations import BOX_COLUMNS, LABEL_COLUMNS, Annotations, Columns, ImageTable
from common.convert.classes import read_hierarchy
from common.convert.cleaning import check_layout
from common.convert.report import DROPPED, Report
from common.data.dataset import CROWD, DEPICTION, GROUP_OF, INSIDE, OCCLUDED, TRUNCATED
from common.data.image_file import ImageError, open_image
from common.io.errors import UserError
from common.io.progress import Progress

_FLAGS = {
    "is_crowd": CROWD | GROUP_OF,
    "is_group_of": GROUP_OF,
    "is_occluded": OCCLUDED,
    "is_truncated": TRUNCATED,
    "is_depiction": DEPICTION,
    "is_inside": INSIDE,
}
_IDS = ("image/id", "image_id", "id", "image/filename", "filename", "image_name")
_MAGIC = {b"\xff\xd8": ".jpg", b"\x89P": ".png"}


def read_tfds(
    name: str,
    report: Report,
    data_dir: str | None,
    spool_folder: Path,
    *,
    download: bool = False,
    hierarchy: Path | None = None,
) -> Annotations:
    """Reads all splits of a prepared TFDS data set.

    Args:
      name: such as 'coco/2017' or 'voc/2007:4.0.0'.
      report: gets photos that are no photos.
      data_dir: TFDS folder, None = its default.
      spool_folder: photos are written below it.
      download: let TFDS download and prepare the set when it is not there.
      hierarchy: optional hierarchy of the class names.

    Raises:
      UserError: no such set, not prepared, or without boxes and labels.
    """
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")  # they are JAX's
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, AssertionError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"--source={name}: TFDS finds no such data set ({first})") from error
    if download:
        builder.download_and_prepare()
    if not builder.is_prepared():
        raise UserError(
            f"--source={name}: not prepared in {builder.data_dir}; say --download, or prepare it "
            "with the tfds command"
        )
    objects, class_names, box_format = _find_objects(name, builder.info.features)
    (spool_folder / "images").mkdir()
    state = _Reader(objects, box_format, spool_folder / "images", report, str(builder.data_dir))
    splits = {}
    for split, info in builder.info.splits.items():
        examples = builder.as_dataset(
            split=split, decoders={"image": tfds.decode.SkipDecoding()}, shuffle_files=False
        )
        progress = Progress(info.num_examples, what=f"{name} {split}", unit="photos")
        members = []
        for number, example in enumerate(examples.as_numpy_iterator()):
            index = state.add(example, split, number)
            members += [] if index is None else [index]
            progress.report(number + 1)
        splits[split] = np.array(members, np.int64)
        state.files.append(f"{builder.data_dir} {split}")
    boxes = state.columns.take()
    check_layout(boxes["box"], name, f"{objects}/bbox")
    return Annotations(
        name=name,
        source=f"tfds {builder.info.full_name}",
        class_labels=class_names,
        class_names=class_names,
        hierarchy=read_hierarchy(hierarchy, class_names),
        images=state.images,
        splits=splits,
        boxes=boxes,
        labels=Columns(LABEL_COLUMNS).take(),
        files=state.files,
        photo_folder=spool_folder / "images",
        extra={"exhaustive": "open_images" not in name},
    )


def _find_objects(name: str, features: Any) -> tuple[str, list[str], str]:
    """Key of the sequence of boxes, class names, and format of the boxes."""
    for key, feature in features.items():
        inner: Any = getattr(feature, "feature", None)  # of a Sequence
        if not hasattr(inner, "keys") or not {"bbox", "label"} <= set(inner.keys()):
            continue
        class_names = getattr(inner["label"], "names", None)
        if "image" in features and class_names:
            box_format = getattr(inner["bbox"], "bbox_format", None)
            return key, list(class_names), box_format.value if box_format else "rel_yxyx"
    raise UserError(
        f"--source={name}: no detection data set: expected features image and a sequence with bbox "
        f"and label (with class names); found {', '.join(features.keys())}"
    )


class _Reader:
    """Collects examples; photos go to disk at once."""

    def __init__(self, objects: str, box_format: str, folder: Path, report: Report, source: str):
        self.images, self.columns = ImageTable(), Columns(BOX_COLUMNS)
        self.files: list[str] = []
        self._objects, self._format, self._folder = objects, box_format, folder
        self._report, self._source = report, source

    def add(self, example: dict[str, Any], split: str, number: int) -> int | None:
        """Index of the new image, None when its bytes are no photo."""
        data = example["image"]
        image_id = _image_id(example, split, number)
        if self.images.find(image_id) >= 0:
            image_id = f"{split}/{image_id}"
        try:
            with open_image(io.BytesIO(data)) as image:
                width, height = image.size
        except ImageError:
            self._report.add("unreadable photo", DROPPED, f"{self._source} {split}", [image_id])
            return None
        if data[:2] not in _MAGIC:
            raise UserError(f"{self._source} {split}: photo {image_id} is neither JPEG nor PNG")
        index = self.images.add(image_id)
        name = re.sub(r"[^\w.-]", "_", image_id) + _MAGIC[data[:2]]
        if (self._folder / split / name).exists():
            name = f"{index}_{name}"
        (self._folder / split).mkdir(exist_ok=True)
        (self._folder / split / name).write_bytes(data)
        self.images.files[index] = f"{split}/{name}"
        self.images.sizes[index] = (height, width)
        objects = example[self._objects]
        flags = np.zeros(len(objects["label"]), np.uint8)
        for key in set(_FLAGS) & set(objects):
            flags |= (np.asarray(objects[key]) == 1) * np.uint8(_FLAGS[key])  # -1 = unknown
        self.columns.append(
            **{"class": objects["label"]},
            image=np.full(len(flags), index),
            box=_corners(objects["bbox"], self._format, height, width),
            flags=flags,
            file=np.full(len(flags), len(self.files)),
            row=np.full(len(flags), number),
        )
        return index


def _image_id(example: dict[str, Any], split: str, number: int) -> str:
    for key in _IDS:
        value = example.get(key)
        if isinstance(value, bytes) and value:
            return re.sub(r"\.(jpe?g|png)$", "", value.decode("utf-8", "replace"), flags=re.I)
        if isinstance(value, int | np.integer):
            return str(value)
    return f"{split}-{number:07d}"


def _corners(
    box: Float[np.ndarray, "n 4"], box_format: str, height: int, width: int
) -> Float[np.ndarray, "n 4"]:
    """Normalised xmin, ymin, xmax, ymax from any of TFDS's formats."""
    box = np.asarray(box, np.float32).reshape(-1, 4)
    layout = box_format.lower().removeprefix("rel_")
    scale = (
        1.0 if box_format.lower().startswith("rel_") else np.array([width, height] * 2, np.float32)
    )
    if layout == "yxyx":
        box = box[:, [1, 0, 3, 2]]
    elif layout == "xywh":
        box = np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], 1)
    elif layout != "xyxy":
        raise UserError(f"bbox_format {box_format!r} of the TFDS features is not supported")
    return box / scale
