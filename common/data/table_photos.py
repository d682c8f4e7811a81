"""The photos of a detections table that says where they lie, without a dataset directory."""

from pathlib import Path

import numpy as np

from common.data.dataset import Dataset, flat_hierarchy
from common.io.errors import UserError
from common.tables import DetectionsReader

# In a table's metadata: the folder below which image ids are paths, and names of its `classes`.
PHOTO_ROOT, CLASS_NAMES = "photo_root", "class_names"


def table_dataset(reader: DetectionsReader) -> Dataset | None:
    """The images of a table as a dataset without annotations, sizes unknown; None where the table
    does not say where its photos are.

    Its classes are those of the table's model.

    Raises:
      UserError: the table's metadata have no classes.
    """
    root, labels = reader.metadata.get(PHOTO_ROOT), reader.metadata.get("classes")
    if root is None:
        return None
    if not isinstance(root, str) or not isinstance(labels, list):
        raise UserError(f"{reader.path}: metadata: found {PHOTO_ROOT} {root!r}, expected a folder")
    count = len(reader.image_ids)
    names = np.array([name.encode() for name in reader.image_ids], bytes)
    offsets, none = np.zeros(count + 1, np.int64), np.zeros(0, np.int32)
    flags = none.astype(np.uint8)
    return Dataset(
        directory=Path(reader.path),
        meta={"image_root": root, "name": root},
        class_labels=labels,
        class_names=labels,
        hierarchy=flat_hierarchy(labels),
        splits=[],
        image_ids=names,
        image_paths=names,
        image_sizes=np.zeros((count, 2), np.int32),
        box_offsets=offsets,
        boxes=np.zeros((0, 4), np.float32),
        box_classes=none,
        box_flags=flags,
        label_offsets=offsets,
        label_classes=none,
        label_confidences=flags,
        image_id_order=np.argsort(names).astype(np.int32),
        mask_offsets=None,
    )
