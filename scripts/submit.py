"""Writes a detections table in the form that a challenge server or an official evaluator reads.

    python -m scripts.submit --format=openimages       --detections=x.parquet --output=x.csv
    python -m scripts.submit --format=openimages_masks --detections=x.parquet --output=x.csv \\
        --dataset=DIR
    python -m scripts.submit --format=coco|lvis        --detections=x.parquet --output=x.json \\
        --dataset=DIR
    python -m scripts.submit --format=yolo             --detections=x.parquet --output=labels \\
        --dataset=DIR

openimages, openimages_masks: one row for every covered image, empty if nothing was found there;
--offline writes one row a detection instead, for the official offline evaluator.
coco, lvis: a JSON list; the numbers of images and categories and the sizes of photos come from a
dataset made of COCO or LVIS files, or from --annotations, --image_ids and --category_ids. LVIS
takes the best 300 detections of an image. Output names that end in .gz are compressed.
yolo: a folder with one text file a photo. `scripts.import_detections` reads all of these back.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from common.data.dataset import Dataset
from common.io.commands import run_main
from common.io.errors import UserError
from common.metrics.coverage import split_images
from common.tables import DetectionsReader
from common.tables.exchange import ids, results_json
from common.tables.exchange.openimages_csv import write_openimages
from common.tables.exchange.rows import SCORES, Outgoing
from common.tables.exchange.yolo_labels import write_labels

FORMATS = ("openimages", "openimages_masks", "coco", "lvis", "yolo")


def define_flags() -> None:
    flags.DEFINE_enum("format", None, FORMATS, "Form to write.", required=True)
    flags.DEFINE_string("detections", None, "Detections table to read.", required=True)
    flags.DEFINE_string("output", None, "File to write.", required=True)
    define_id_flags()
    flags.DEFINE_string("split", None, "Write the images of this split, which must be covered.")
    flags.DEFINE_bool("allow_partial", False, "Write although images of --split are missing.")
    flags.DEFINE_bool("offline", False, "openimages: one row a detection, for the offline tool.")
    flags.DEFINE_enum(
        "geometry",
        None,
        results_json.GEOMETRIES,
        "coco, lvis: what to write of a detection (default: masks if the table has them, and then "
        "no boxes, since official tools would take the boxes' areas).",
    )
    flags.DEFINE_enum(
        "scores",
        None,
        SCORES,
        "Scores above 1, which voting makes: clip = write 1 (default), scale = divide all scores "
        "by 1.5, which keeps their order, keep = write them (default with --offline).",
    )
    flags.DEFINE_integer(
        "digits", None, "Decimals of numbers (default: all that the table holds).", lower_bound=1
    )


def define_id_flags() -> None:
    """Flags that say what numbers COCO files give to images and categories."""
    flags.DEFINE_string("dataset", None, "Dataset directory.")
    flags.DEFINE_string("annotations", None, "coco, lvis: official file with images, categories.")
    flags.DEFINE_enum(
        "image_id",
        "auto",
        ids.IMAGE_IDS,
        "coco, lvis: what tables call an image of --annotations, as in scripts.prepare_data; auto "
        "= as in --dataset.",
    )
    flags.DEFINE_string("image_ids", None, "coco, lvis: CSV image_id,id[,height,width].")
    flags.DEFINE_string("category_ids", None, "coco, lvis: CSV label,id.")


def main():
    args = flags.FLAGS
    reader = DetectionsReader(args.detections)
    dataset = Dataset.open(args.dataset) if args.dataset else None
    selected = None
    if args.split:
        if dataset is None:
            raise UserError("--split needs --dataset")
        indices, notes = split_images(dataset, args.split, reader, args.allow_partial)
        selected = indices >= 0
        for line in notes:
            print(line)
    masks = _with_masks(reader)
    outgoing = Outgoing(
        reader=reader,
        selected=selected,
        class_labels=dataset.class_labels if dataset and args.format.startswith("open") else None,
        masks=masks,
        scores=args.scores or ("keep" if args.offline else "clip"),
        max_per_image=results_json.LVIS_MAX_PER_IMAGE if args.format == "lvis" else None,
    )
    if args.format in ("coco", "lvis"):
        if args.offline:
            raise UserError(f"--offline: {args.format} has one form only")
        images, categories = numbers(dataset, reader.image_ids)
        results_json.write_results(
            outgoing,
            args.output,
            images,
            categories,
            geometry=args.geometry or ("masks" if masks else "boxes"),
            digits=args.digits,
        )
    elif args.format == "yolo":
        if dataset is None:
            raise UserError("--format=yolo needs --dataset")
        write_labels(outgoing, args.output, dataset, args.digits)
    else:
        if not reader.metadata.get("expanded"):
            print(
                "note: the table does not say that it is expanded to parent classes, which the "
                "challenge expects: python -m scripts.expand_detections"
            )
        write_openimages(
            outgoing,
            args.output,
            offline=args.offline,
            sizes=_sizes(dataset, reader.image_ids) if masks and dataset else None,
            digits=args.digits,
        )
    outgoing.tell(print)
    count = len(reader.image_ids) if selected is None else int(selected.sum())
    print(f"{args.output}: {outgoing.written} detections of {count} images")


def _with_masks(reader: DetectionsReader) -> bool:
    """Whether the output holds masks."""
    args = flags.FLAGS
    if args.format in ("openimages", "yolo") or args.geometry == "boxes":
        return False
    wanted = args.format == "openimages_masks" or args.geometry in ("masks", "both")
    if wanted and not reader.has_masks:
        raise UserError(f"{reader.path}: no mask column, expected a table with masks")
    return reader.has_masks


def _sizes(dataset: Dataset, image_ids) -> dict[str, tuple[int, int]]:
    indices = dataset.find_images(image_ids)
    sizes = np.where(indices[:, None] >= 0, dataset.image_sizes[np.maximum(indices, 0)], 0)
    return dict(zip(image_ids, map(tuple, sizes.tolist()), strict=True))


def numbers(
    dataset: Dataset | None, image_ids: Sequence[str] | None = None
) -> tuple[ids.Images, ids.Categories]:
    """Numbers of images and categories as the flags say.

    Args:
      dataset: of --dataset.
      image_ids: ids whose numbers are needed of the dataset; None = all.
    """
    args = flags.FLAGS
    images = categories = None
    own = dataset.meta.get("image_id", "id") if dataset is not None else "id"
    if args.annotations:
        image_id = own if args.image_id == "auto" else args.image_id
        images, categories = ids.read_annotations(Path(args.annotations), image_id)
    if args.image_ids:
        images = ids.read_image_csv(args.image_ids)
    if args.category_ids:
        categories = ids.read_category_csv(args.category_ids)
    if images is not None and categories is not None:
        return images, categories
    if dataset is None:
        raise UserError(
            f"--format={args.format} needs numbers of images and categories: give --dataset=DIR "
            "(made of COCO or LVIS files), --annotations=FILE.json, or --image_ids=FILE.csv and "
            "--category_ids=FILE.csv"
        )
    if images is None and image_ids is not None and own == "file_stem":
        raise UserError(
            f"{dataset.directory}: its images are called by their file names; give the numbers of "
            "the images by --annotations=FILE.json or --image_ids=FILE.csv"
        )
    if images is None:
        indices = np.arange(dataset.num_images)
        if image_ids is not None:
            indices = dataset.find_images(image_ids)
        images = ids.images_of_dataset(dataset, indices[indices >= 0])
    return images, categories or ids.categories_of_dataset(dataset)


if __name__ == "__main__":
    define_flags()
    run_main(main)
