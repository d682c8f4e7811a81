"""Turns detections in the forms of other tools and of challenge servers into a detections table.

    python -m scripts.import_detections --format=openimages --input=x.csv --output=x.parquet
    python -m scripts.import_detections --format=coco --input=x.json --output=x.parquet \\
        --dataset=DIR --split=validation

openimages, openimages_masks: submission or offline-evaluator CSV, told apart by the header.
coco, lvis: JSON results; --masks keeps their masks. Numbers of images and categories are turned
into the dataset's ids and labels, or those of --annotations, --image_ids and --category_ids.
yolo: a folder with one text file for each photo of --dataset.

With --split the table covers that split, and a row of another image is an error; without, it
covers the images that the file names. A row that breaks the rules of tables is named, and nothing
is written.
"""

from pathlib import Path

from absl import flags

from common.data.dataset import Dataset
from common.io.commands import run_main
from common.io.errors import UserError
from common.tables.exchange.openimages_csv import read_openimages
from common.tables.exchange.results_json import read_results
from common.tables.exchange.spool import Importer
from common.tables.exchange.yolo_labels import read_labels
from scripts.submit import FORMATS, define_id_flags, numbers


def define_flags() -> None:
    flags.DEFINE_enum("format", None, FORMATS, "Form of the file.", required=True)
    flags.DEFINE_string("input", None, "File to read, possibly .gz.", required=True)
    flags.DEFINE_string("output", None, "Detections table (Parquet) to write.", required=True)
    define_id_flags()
    flags.DEFINE_string("split", None, "Split of --dataset that the table covers.")
    flags.DEFINE_bool("masks", False, "coco, lvis: keep the masks.")
    flags.DEFINE_bool("clip", False, "Cut boxes that reach beyond the photo at its edge.")
    flags.DEFINE_string("model", None, "Model name for the table (default: name of the file).")


def main():
    args = flags.FLAGS
    path = Path(args.input)
    if not (path.is_dir() if args.format == "yolo" else path.is_file()):
        raise UserError(f"{path}: no such {'folder' if args.format == 'yolo' else 'file'}")
    dataset = Dataset.open(args.dataset) if args.dataset else None
    covered = indices = None
    covered_by = ""
    if args.split:
        if dataset is None:
            raise UserError("--split needs --dataset")
        indices = dataset.split(args.split)
        covered = [dataset.image_id(i) for i in indices]
        covered_by = f"split {args.split!r} of {dataset.directory}"
    masks = args.format == "openimages_masks" or args.masks
    if args.masks and args.format == "openimages":
        raise UserError("--masks: use --format=openimages_masks")
    importer = Importer(
        path,
        covered,
        covered_by,
        dataset.class_labels if dataset else None,
        masks=masks,
        clip=args.clip,
    )
    if args.format in ("coco", "lvis"):
        images, categories = numbers(dataset)
        rows = read_results(path, images, categories, masks=masks)
    elif args.format == "yolo":
        if dataset is None:
            raise UserError("--format=yolo needs --dataset")
        rows = read_labels(path, dataset, importer.cover)
    else:
        rows = read_openimages(path, masks=masks, cover=importer.cover)
    metadata = {
        "model": args.model or path.name.split(".")[0],
        "imported": {"file": path.name, "format": args.format},
    }
    if dataset is not None:
        metadata["dataset"] = dataset.meta["name"]
    if args.split:
        metadata["split"] = args.split
    count, image_count = importer.write(rows, args.output, metadata)
    print(f"{args.output}: {count} detections of {image_count} images")


if __name__ == "__main__":
    define_flags()
    run_main(main)
