"""From columns of annotations to a dataset directory: clean, find photos, split, sort, write."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.convert.annotations import Annotations
from common.convert.cleaning import clean_boxes, clean_labels
from common.convert.ignore import read_ignore_boxes
from common.convert.photos import find_photos, read_sizes
from common.convert.report import DROPPED, EXAMPLES, REPAIRED, Report
from common.convert.split import random_split, stratified_split
from common.data.dataset import DatasetWriter
from common.io.errors import UserError
from common.io.progress import Progress

# Up to here the headers of the photos are read without being asked for (about 0.1 ms each).
_SIZES_UNASKED = 200_000
_BLOCK = 50_000  # images written at once


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asked for, the same for all formats.

    Attributes:
      output: dataset directory to write.
      images: folder of the photos or an address such as gs://bucket/folder; None = look for them
        where the annotations are.
      image_pattern: path below `images` with {id} in it, taken without looking ('' = look).
      splits: JSON file {"name": [ids]} that adds or replaces splits.
      read_sizes: read photo sizes from headers; None = for up to 200,000 photos.
      check_photos: decode every photo once.
      overwrite: replace an existing dataset.
      split: 'random' or 'stratified' divides the images of `pool` anew ('' = do not).
      shares: split name -> share of the images.
      seed: of the division.
      pool: splits to divide, () = all; others stay as they are.
      ignore: files in COCO form whose boxes on the same photos become ignore boxes.
    """

    output: Path
    images: str | None = None
    image_pattern: str = ""
    splits: Path | None = None
    read_sizes: bool | None = None
    check_photos: bool = False
    overwrite: bool = False
    split: str = ""
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    pool: Sequence[str] = ()
    ignore: Sequence[str] = ()


def write_dataset(annotations: Annotations, options: Options, report: Report) -> None:
    """Writes the dataset directory and prints what became of the rows.

    Raises:
      UserError: no image or no box is left, photos or ids of splits are not there, ...
    """
    boxes = clean_boxes(annotations.boxes, annotations.files, report)
    labels = clean_labels(annotations.labels, annotations.files, report)
    annotations.boxes = annotations.labels = {}
    splits, candidates = _splits(annotations, options, report)
    paths, sizes, root = _photos(annotations, options, report, candidates)
    images = np.array([path is not None for path in paths], bool)
    if not images.any():
        raise UserError(f"{annotations.source}: no image is left")
    kept = np.flatnonzero(images)
    place = np.full(len(paths), -1, np.int64)
    place[kept] = np.arange(len(kept))
    boxes, box_counts = _by_image(boxes, place, len(kept))
    labels, label_counts = _by_image(labels, place, len(kept))
    if options.split:
        splits = _divided(splits, options, kept, place, (boxes["class"], box_counts), annotations)
    ignore = None
    if options.ignore:
        table = read_ignore_boxes(options.ignore, annotations.images, sizes)
        ignore = _by_image(table, place, len(kept))
    writer = DatasetWriter(
        options.output,
        annotations.name,
        annotations.class_labels,
        annotations.class_names,
        annotations.hierarchy,
        root,
        source=annotations.source,
        has_masks=annotations.mask_spool is not None,
        has_areas="area" in boxes,
        has_ignore=ignore is not None,
        overwrite=options.overwrite,
        extra=annotations.extra,
    )
    with writer:
        ids = annotations.images.ids
        _write_blocks(
            writer,
            [ids[i] for i in kept],
            [paths[i] for i in kept],
            sizes[kept],
            (boxes, box_counts),
            (labels, label_counts),
            ignore,
            annotations.mask_spool,
        )
        for name, indices in splits.items():
            places = place[indices]
            writer.add_split(name, places[places >= 0])
        if annotations.photo_folder is not None:
            os.replace(annotations.photo_folder, writer.temporary / "images")
        writer.write_json("report.json", report.as_json())
    print(_overview(annotations, writer, splits, place, boxes, report), flush=True)


def _splits(
    annotations: Annotations, options: Options, report: Report
) -> tuple[dict[str, np.ndarray], set[int]]:
    """Splits of the source with those of the user's file over them.

    Ids that have no annotations become images too, as photos without labels (test sets), if their
    photo is found: these candidates are the second result.
    """
    splits = dict(annotations.splits)
    if options.splits is None:
        return splits, set()
    images = annotations.images
    numbers: dict[str, int] = {}
    for i, image_id in enumerate(images.ids):
        if image_id.isdecimal():
            numbers.setdefault(image_id.lstrip("0"), i)
    first_new = len(images)
    for name, ids in _read_splits(options.splits).items():
        members = []
        for text in map(str, ids):
            index = images.find(text)
            if index < 0 and text.isdecimal():  # 9 means 000000000009
                index = numbers.get(text.lstrip("0"), -1)
            members.append(images.add(text) if index < 0 else index)
        if members and min(members) >= first_new and first_new:
            raise UserError(
                f"{options.splits}: none of the ids of split {name!r} is in the annotations "
                f"(first {ids[0]!r}; the annotations have ids like {images.ids[0]!r})"
            )
        unique = list(dict.fromkeys(members))
        report.add(
            "id twice in a split", REPAIRED, str(options.splits), [name] * (len(ids) - len(unique))
        )
        splits[name] = np.array(unique, np.int64)
    return splits, set(range(first_new, len(images)))


def _divided(
    splits: dict[str, np.ndarray],
    options: Options,
    kept: np.ndarray,
    place: np.ndarray,
    box_rows: tuple[np.ndarray, np.ndarray],
    annotations: Annotations,
) -> dict[str, np.ndarray]:
    """Splits in which those of the pool are divided anew, by the classes of the boxes."""
    pool = options.pool or list(splits)
    others = {name: images for name, images in splits.items() if name not in pool}
    if not set(pool) <= set(splits) or set(others) & set(options.shares):
        raise UserError(
            f"--pool={','.join(pool)} --shares={','.join(options.shares)}: the splits are "
            f"{', '.join(splits)}; expected to pool some of them, and new names unlike the others"
        )
    members = np.unique(np.concatenate([place[splits[name]] for name in pool]))
    members = members[members >= 0]
    shares = np.array(list(options.shares.values()))
    if options.split == "random":
        number = random_split(len(members), shares, options.seed)
    else:
        position = np.full(len(kept), -1, np.int64)
        position[members] = np.arange(len(members))
        classes, counts = box_rows
        image = np.repeat(position, counts)
        number = stratified_split(
            image[image >= 0],
            classes[image >= 0],
            len(members),
            len(annotations.class_labels),
            shares,
            options.seed,
        )
    images = kept[members]
    return others | {name: images[number == i] for i, name in enumerate(options.shares)}


def _read_splits(path: Path) -> dict[str, list[str | int]]:
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the splits ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON ({error})") from error
    good = isinstance(splits, dict) and all(
        isinstance(ids, list) and all(isinstance(i, str | int) for i in ids)
        for ids in splits.values()
    )
    if not good:
        raise UserError(f'{path}: expected {{"name": [ids], ...}}')
    return splits


def _photos(
    annotations: Annotations, options: Options, report: Report, candidates: set[int]
) -> tuple[list[str | None], np.ndarray, str]:
    """Path of each image (None = drop the image), sizes (N, 2), and the root of the paths."""
    images = annotations.images
    sizes = np.zeros((len(images), 2), np.int32)
    for i, size in images.sizes.items():
        sizes[i] = size
    if annotations.photo_folder is not None:
        new = [images.ids[i] for i in sorted(candidates)]
        report.add("split id without photo", DROPPED, str(options.splits), new)
        files = [images.files.get(i) for i in range(len(images))]
        return [file and f"images/{file}" for file in files], sizes, ""
    remote = options.images is not None and re.match(r"[a-z0-9]+://", options.images)
    if remote or options.image_pattern:
        pattern = options.image_pattern
        return (
            [
                pattern.format(id=images.ids[i]) if pattern else _unseen(images, i)
                for i in range(len(images))
            ],
            sizes,
            options.images or "",
        )
    folder = Path(options.images) if options.images is not None else annotations.search
    if options.images is not None and not folder.is_dir():
        raise UserError(f"--images={folder}: no such folder")
    wanted: dict[str, list[int]] = {}
    for i in range(len(images)):
        file = images.files.get(i, "")
        stem = os.path.splitext(os.path.basename(file))[0] if file else images.ids[i]
        wanted.setdefault(stem, []).append(i)
    hints = images.files
    paths, seen = find_photos(folder, wanted, lambda i: hints.get(i, ""), len(images))
    found = [i for i, path in enumerate(paths) if path is not None]
    if not found and options.images is None:
        print(f"no photos below {folder}: the index is written without them", flush=True)
        new = [images.ids[i] for i in sorted(candidates)]
        report.add("split id without photo", DROPPED, str(options.splits), new)
        paths = [None if i in candidates else _unseen(images, i) for i in range(len(images))]
        return paths, sizes, ""
    if not found:
        raise UserError(
            f"{folder}: none of the {len(images):,} photos is there ({seen:,} other photos seen); "
            f"looked for names like {next(iter(wanted), '')!r} with .jpg, .jpeg or .png"
        )
    missing = [i for i, path in enumerate(paths) if path is None]
    annotated = [images.ids[i] for i in missing if i not in candidates]
    report.add("photo not found", DROPPED, annotations.source, annotated)
    unknown = [images.ids[i] for i in missing if i in candidates]
    report.add("split id without photo", DROPPED, str(options.splits), unknown)
    ask = options.read_sizes
    if options.check_photos or (len(found) <= _SIZES_UNASKED if ask is None else ask):
        _check_sizes(annotations, options, report, folder, paths, sizes, found)
    return paths, sizes, str(folder.absolute())


def _check_sizes(
    annotations: Annotations,
    options: Options,
    report: Report,
    folder: Path,
    paths: list[str | None],
    sizes: np.ndarray,
    found: list[int],
) -> None:
    """Reads the photos' sizes into `sizes`; photos that cannot be read lose their path."""
    read, readable = read_sizes(folder, [paths[i] or "" for i in found], options.check_photos)
    rows = np.array(found)
    bad = rows[~readable]
    report.add(
        "unreadable photo",
        DROPPED,
        [str(folder / str(paths[i])) for i in bad],
        [annotations.images.ids[i] for i in bad],
    )
    for i in bad:
        paths[i] = None
    told = sizes[rows]
    other = rows[readable & (told > 0).all(1) & (told != read).any(1)]
    pairs = dict(zip(found, zip(told.tolist(), read.tolist(), strict=True), strict=True))
    notes = [
        "annotated {}x{}, photo {}x{} (height x width)".format(*pairs[i][0], *pairs[i][1])
        for i in other[:EXAMPLES].tolist()
    ]
    if annotations.mask_spool is None:  # else: polygons are in pixels of the annotated size
        sizes[rows] = read
    else:
        sizes[rows] = np.where((told > 0).all(1, keepdims=True), told, read)
    report.add(
        "size in the annotations is not that of the photo",
        REPAIRED,
        [str(folder / str(paths[i])) for i in other],
        [annotations.images.ids[i] for i in other],
        notes,
    )


def _unseen(images, index: int) -> str:
    return images.files.get(index) or f"{images.ids[index]}.jpg"


def _by_image(
    table: dict[str, np.ndarray], place: np.ndarray, num_images: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows of kept images, sorted by image and else in their order; and rows per image."""
    image = place[table["image"]]
    order = np.argsort(image, kind="stable")
    order = order[np.searchsorted(image, 0, sorter=order) :]  # -1 = dropped image
    counts = np.bincount(image[order], minlength=num_images)
    del image
    # Written columns only; pop so that each unsorted column goes as its sorted copy comes.
    dropped = ("image", "file", "row")
    return {name: table.pop(name)[order] for name in list(table) if name not in dropped}, counts


def _write_blocks(writer, ids, paths, sizes, box_rows, label_rows, ignore_rows, mask_spool) -> None:
    boxes, box_counts = box_rows
    labels, label_counts = label_rows
    ignore, ignore_counts = ignore_rows or ({"box": np.zeros((0, 4), np.float32)}, 0 * box_counts)
    box_offsets = np.concatenate([[0], np.cumsum(box_counts)])
    label_offsets = np.concatenate([[0], np.cumsum(label_counts)])
    ignore_offsets = np.concatenate([[0], np.cumsum(ignore_counts)])
    spool = np.zeros(0, np.uint8)
    if mask_spool is not None and mask_spool.stat().st_size:
        spool = np.memmap(mask_spool, np.uint8, "r")
    progress = Progress(len(ids), what="writing")
    for start in range(0, len(ids), _BLOCK):
        stop = min(start + _BLOCK, len(ids))
        rows = slice(start, stop)
        box_slice = slice(box_offsets[start], box_offsets[stop])
        label_slice = slice(label_offsets[start], label_offsets[stop])
        lengths, texts = None, b""
        if mask_spool is not None:
            lengths = boxes["mask_length"][box_slice]
            starts = boxes["mask_start"][box_slice]
            pieces = zip(starts, lengths, strict=True)
            texts = b"".join(spool[s : s + n].tobytes() for s, n in pieces if n)
        writer.add_images(
            ids[rows],
            paths[rows],
            sizes[rows],
            box_counts[rows],
            boxes["box"][box_slice],
            boxes["class"][box_slice],
            boxes["flags"][box_slice],
            label_counts[rows],
            labels["class"][label_slice],
            labels["confidence"][label_slice],
            lengths,
            texts,
            boxes["area"][box_slice] if "area" in boxes else None,
            ignore_counts[rows],
            ignore["box"][ignore_offsets[start] : ignore_offsets[stop]],
        )
        progress.report(stop)


def _overview(annotations, writer, splits, place, boxes, report) -> str:
    used = len(np.unique(boxes["class"]))
    parts = ", ".join(f"{name} {int((place[i] >= 0).sum()):,}" for name, i in splits.items())
    return (
        f"{writer.directory}: {writer.num_images:,} images ({parts}), {writer.num_boxes:,} boxes "
        f"of {used} of {writer.num_classes} classes, {writer.num_labels:,} image labels"
        + (", masks" if annotations.mask_spool is not None else "")
        + f"\n{report.summary()}"
    )
