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

# --8<-- [start:index]
# File stem -> dtype, columns (None for a vector), and what there is one row of.
INDEX: dict[str, tuple[str, int | None, str]] = {
    "image_size": ("int32", 2, "images"),
    "box_offsets": ("int64", None, "images + 1"),
    "boxes": ("float32", 4, "boxes"),
    "box_class": ("int32", None, "boxes"),
    "box_flags": ("uint8", None, "boxes"),
    "label_offsets": ("int64", None, "images + 1"),
    "label_class": ("int32", None, "labels"),
    "label_confidence": ("uint8", None, "labels"),
    "mask_offsets": ("int64", None, "boxes + 1"),
    "box_area": ("float64", None, "boxes"),
    "whole_boxes": ("float32", 4, "boxes"),
    "ignore_offsets": ("int64", None, "images + 1"),
    "ignore_boxes": ("float32", 4, "ignore boxes"),
}
# Arrays that a dataset may lack -> key of dataset.json that says whether it has them.
OPTIONAL = {
    "mask_offsets": "has_masks",
    "box_area": "has_areas",
    "whole_boxes": "has_whole_boxes",
    "ignore_offsets": "has_ignore",
    "ignore_boxes": "has_ignore",
}
# Byte strings, one an image, each file in the width of its longest.
STRINGS = ("image_id", "image_path")
# --8<-- [end:index]
