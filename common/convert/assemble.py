"""From columns of annotations to a dataset directory: clean, find photos, split, sort, write."""

import os
from pathlib import Path

import numpy as np

from common.convert.annotations import Annotations
from common.convert.cleaning import clean_boxes, clean_labels
from common.convert.ignore import read_ignore_boxes
from common.convert.options import Options
from common.convert.photo_paths import locate_photos
from common.convert.report import DROPPED, Report
from common.convert.splits import divided_splits, named_splits, note_overlaps
from common.data.dataset import DatasetWriter
from common.io.errors import UserError
from common.io.progress import Progress

_BLOCK = 50_000  # images written at once


def write_dataset(annotations: Annotations, options: Options, report: Report) -> None:
    """Writes the dataset directory and prints what became of the rows.

    Raises:
      UserError: no image or no box is left, photos or ids of splits are not there, ...
    """
    splits, candidates = named_splits(annotations, options.splits, report)
    paths, sizes, root = locate_photos(annotations, options, report, candidates)
    if annotations.unsized:
        _normalise(annotations, sizes, paths, report)
    num_rows = len(annotations.boxes["image"])
    box_table = clean_boxes(annotations.boxes, annotations.files, report)
    if num_rows and not len(box_table["image"]):
        raise UserError(
            f"{annotations.source}: found {num_rows:,} boxes and none that can be used "
            f"({report.most_frequent()})"
        )
    label_table = clean_labels(annotations.labels, annotations.files, report)
    annotations.boxes = annotations.labels = {}
    kept = np.array([i for i, path in enumerate(paths) if path is not None], np.int64)
    if not len(kept):
        raise UserError(
            f"{annotations.source}: found no image that can be used ({report.most_frequent()})"
        )
    place = np.full(len(paths), -1, np.int64)  # of each image among those that are written
    place[kept] = np.arange(len(kept))
    boxes = _Rows(box_table, place, len(kept))
    labels = _Rows(label_table, place, len(kept))
    ignore = None
    if options.ignore:
        table = read_ignore_boxes(options.ignore, annotations.images, sizes)
        ignore = _Rows(table, place, len(kept))
    if options.split:
        classes, num_classes = boxes.columns["class"], len(annotations.class_labels)
        names = [str(paths[i]) for i in kept]
        splits = divided_splits(splits, options, kept, classes, boxes.counts, num_classes, names)
    with DatasetWriter(
        options.output,
        annotations.name,
        annotations.class_labels,
        annotations.class_names,
        annotations.hierarchy,
        root,
        source=annotations.source,
        has_masks=annotations.mask_spool is not None,
        has_areas="area" in boxes.columns,
        has_ignore=ignore is not None,
        has_whole_boxes="whole_box" in boxes.columns,
        overwrite=options.overwrite,
        extra=annotations.extra,
    ) as writer:
        ids, files = [annotations.images.ids[i] for i in kept], [str(paths[i]) for i in kept]
        _write_images(
            writer, ids, files, sizes[kept], boxes, labels, ignore, annotations.mask_spool
        )
        sizes_of_splits, written = {}, {}
        for name, indices in splits.items():
            members = place[indices][place[indices] >= 0]
            sizes_of_splits[name] = len(members)
            written[name] = members
            writer.add_split(name, members)
        note_overlaps(written, ids, annotations.source, report)
        if annotations.photo_folder is not None:
            os.replace(annotations.photo_folder, writer.temporary / "images")
        writer.write_json("report.json", report.as_json())
    parts = ", ".join(f"{name} {size:,}" for name, size in sizes_of_splits.items())
    print(
        f"{writer.directory}: {writer.num_images:,} images ({parts}), {writer.num_boxes:,} boxes "
        f"of {len(np.unique(boxes.columns['class']))} of {writer.num_classes} classes, "
        f"{writer.num_labels:,} image labels{', masks' if annotations.mask_spool else ''}\n"
        f"{report.summary()}",
        flush=True,
    )


def _normalise(
    annotations: Annotations, sizes: np.ndarray, paths: list[str | None], report: Report
) -> None:
    """Divides boxes and areas in pixels by the sizes of their photos, which are known by now."""
    images = np.array(sorted(annotations.unsized), np.int64)
    known = (sizes[images] > 0).all(1)
    lost = [i for i in images[~known].tolist() if paths[i] is not None]
    for i in lost:
        paths[i] = None
    report.add(
        "size neither in the annotations nor to be read from the photo",
        DROPPED,
        annotations.source,
        [annotations.images.ids[i] for i in lost],
    )
    divisor = np.ones((len(sizes), 2))
    divisor[images[known]] = sizes[images[known]]
    boxes = annotations.boxes
    size = divisor[boxes["image"]]
    boxes["box"] = (boxes["box"] / size[:, [1, 0, 1, 0]]).astype(np.float32)
    if "area" in boxes:
        boxes["area"] = boxes["area"] / size.prod(1)


class _Rows:
    """Rows of kept images, sorted by image and else in the order of the source.

    Attributes:
      columns: name -> array, those that are written.
      counts: rows of each image.
    """

    def __init__(self, table: dict[str, np.ndarray], place: np.ndarray, num_images: int):
        """Empties `table`, so that each unsorted column goes as its sorted copy comes."""
        image = place[table.pop("image")]
        order = np.argsort(image, kind="stable")
        order = order[np.searchsorted(image, 0, sorter=order) :]  # -1 = dropped image
        self.counts = np.bincount(image[order], minlength=num_images)
        self._offsets = np.concatenate([[0], np.cumsum(self.counts)])
        del image
        written = [name for name in table if name not in ("file", "row", "mask_check")]
        self.columns = {name: table.pop(name)[order] for name in written}

    def of(self, name: str, images: slice) -> np.ndarray:
        """Part of a column that belongs to a run of images."""
        return self.columns[name][self._offsets[images.start] : self._offsets[images.stop]]


def _write_images(
    writer: DatasetWriter,
    ids: list[str],
    paths: list[str],
    sizes: np.ndarray,
    boxes: _Rows,
    labels: _Rows,
    ignore: _Rows | None,
    mask_spool: Path | None,
) -> None:
    spool = np.zeros(0, np.uint8)
    if mask_spool is not None and mask_spool.stat().st_size:
        spool = np.memmap(mask_spool, np.uint8, "r")
    progress = Progress(len(ids), what="writing")
    for start in range(0, len(ids), _BLOCK):
        images = slice(start, min(start + _BLOCK, len(ids)))
        lengths, texts = None, b""
        if mask_spool is not None:
            lengths = boxes.of("mask_length", images)
            pieces = zip(boxes.of("mask_start", images), lengths, strict=True)
            texts = b"".join(spool[s : s + n].tobytes() for s, n in pieces if n)
        writer.add_images(
            ids[images],
            paths[images],
            sizes[images],
            boxes.counts[images],
            boxes.of("box", images),
            boxes.of("class", images),
            boxes.of("flags", images),
            labels.counts[images],
            labels.of("class", images),
            labels.of("confidence", images),
            lengths,
            texts,
            boxes.of("area", images) if "area" in boxes.columns else None,
            None if ignore is None else ignore.counts[images],
            None if ignore is None else ignore.of("box", images),
            boxes.of("whole_box", images) if "whole_box" in boxes.columns else None,
        )
        progress.report(images.stop)
