"""Names, types and flag bits of the dataset directory (described in common/data/dataset.py)."""

FORMAT = 1

# Bits of `box_flags`.
GROUP_OF = 1
OCCLUDED = 2
TRUNCATED = 4
DEPICTION = 8
INSIDE = 16
CROWD = 32  # a region of many objects (COCO's iscrowd); GROUP_OF is set beside it

# Values of `label_confidence`.
ABSENT = 0
PRESENT = 1
NOT_EXHAUSTIVE = 2  # present, and not every instance has a box (LVIS)

# File stem -> (dtype, columns or None for a vector); 'S' arrays have their own fixed width.
INDEX: dict[str, tuple[str, int | None]] = {
    "image_size": ("int32", 2),
    "box_offsets": ("int64", None),
    "boxes": ("float32", 4),
    "box_class": ("int32", None),
    "box_flags": ("uint8", None),
    "label_offsets": ("int64", None),
    "label_class": ("int32", None),
    "label_confidence": ("uint8", None),
    "mask_offsets": ("int64", None),
    "box_area": ("float64", None),
    "ignore_offsets": ("int64", None),
    "ignore_boxes": ("float32", 4),
}
# Only there when dataset.json says so under this key.
OPTIONAL = {
    "mask_offsets": "has_masks",
    "box_area": "has_areas",
    "ignore_offsets": "has_ignore",
    "ignore_boxes": "has_ignore",
}
STRINGS = ("image_id", "image_path")
