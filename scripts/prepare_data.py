"""Turns the official files of a detection data set into a dataset directory (one for all formats).

    python -m scripts.prepare_data openimages --source=DIR --images=DIR --output=DIR
    python -m scripts.prepare_data coco       --source='DIR/inst*.json' --images=DIR --output=DIR
    python -m scripts.prepare_data lvis       --source='DIR/lvis_v*.json' --images=DIR --output=DIR
    python -m scripts.prepare_data objects365 --source=DIR --images=DIR --output=DIR
    python -m scripts.prepare_data voc        --source=DIR --output=DIR
    python -m scripts.prepare_data yolo       --source=DIR/data.yaml --output=DIR
    python -m scripts.prepare_data cvat       --source=annotations.xml --images=DIR --output=DIR
    python -m scripts.prepare_data label_studio --source=export.json --images=DIR --output=DIR
    python -m scripts.prepare_data folders    --source=DIR --output=DIR
    python -m scripts.prepare_data tfds       --source=NAME[:VERSION] --data_dir=DIR --output=DIR

Rows that mean nothing are dropped or repaired, counted by reason on the screen and listed in
report.json; --strict refuses them. The directory appears when it is complete, or not at all.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from common.convert import openimages
from common.convert.annotations import Annotations
from common.convert.assemble import write_dataset
from common.convert.coco import read_coco
from common.convert.folders import read_folders
from common.convert.options import Options
from common.convert.report import Report
from common.convert.splits import KINDS, parse_shares
from common.convert.tfds import read_tfds
from common.convert.tool_exports import read_cvat, read_label_studio
from common.convert.voc import read_voc
from common.convert.yolo import read_yolo
from common.data.dataset import check_output
from common.io.atomic import remove_leftovers, temporary_beside
from common.io.commands import run_main
from common.io.errors import UserError

FORMATS = (
    "openimages",
    "coco",
    "lvis",
    "objects365",
    "voc",
    "yolo",
    "cvat",
    "label_studio",
    "folders",
    "tfds",
)


def define_flags() -> None:
    flags.DEFINE_string("source", None, "Folder or file(s) of the annotations.", required=True)
    flags.DEFINE_string("output", None, "Dataset directory to write.", required=True)
    flags.DEFINE_string(
        "images",
        None,
        "Folder of the photos, found by id below it; or an address like gs://bucket/x.",
    )
    flags.DEFINE_string(
        "image_pattern", "", "Path of a photo below --images, such as 'train/{id}.jpg': no listing."
    )
    flags.DEFINE_enum(
        "match_photos",
        None,
        ["path", "name"],
        "What tells a photo: with 'path' one in another folder than the annotations store is "
        "another photo; 'name' where no two photos have one name (default: name for objects365).",
    )
    flags.DEFINE_string("splits", None, 'JSON {"name": [ids]} that adds or replaces splits.')
    flags.DEFINE_enum(
        "split",
        None,
        KINDS,
        "Divide the images anew: at random, so that each class divides like the shares, or so that "
        "photos of a group (--group) stay together. The "
        "paper's AutoEnsemble pools OpenImages V5 and divides it 80/10/10 with equal classes: "
        "--boxes=v5 --split=stratified.",
    )
    flags.DEFINE_list(
        "shares", ["train=0.8", "validation=0.1", "test=0.1"], "NAME=SHARE of --split's results."
    )
    flags.DEFINE_list("pool", [], "Splits that --split divides (default: all); others stay.")
    flags.DEFINE_string(
        "group",
        "",
        "--split=grouped: regular expression that finds the group of a photo in its path, such as "
        "'(cam[0-9]+)' (default: its folder).",
    )
    flags.DEFINE_integer("split_seed", 0, "The same gives the same splits.", lower_bound=0)
    flags.DEFINE_list(
        "ignore",
        [],
        "Files in COCO form whose boxes on the same photos become ignore boxes, in which nothing "
        "is background: such as those of COCO on the photos of LVIS.",
    )
    flags.DEFINE_bool("strict", False, "Refuse input with rows to drop or repair.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing dataset directory.")
    flags.DEFINE_bool(
        "read_sizes", None, "Read photo sizes from headers (default: for up to 200,000 photos)."
    )
    flags.DEFINE_bool("check_photos", False, "Decode every photo once, to find cut ones.")
    flags.DEFINE_string("classes", None, "Class list (label,name); openimages, voc, yolo, folders.")
    flags.DEFINE_string("hierarchy", None, "Hierarchy JSON.")
    flags.DEFINE_enum(
        "task",
        "detection",
        ["detection", "segmentation"],
        "openimages: which of the challenge's files.",
    )
    flags.DEFINE_enum(
        "boxes",
        "auto",
        ["auto", *openimages.EDITIONS],
        "openimages: boxes and image labels of the challenge or of V5 (train, validation and test; "
        "V4 to V7 alike). auto = the challenge's, if they are there.",
    )
    flags.DEFINE_string("masks", None, "openimages: folder of the mask PNGs (default: source).")
    flags.DEFINE_list(
        "boxes_from_masks",
        [],
        "openimages: classes (labels or names) whose instance masks become boxes where they have "
        "none, such as Grape, which is boxed in groups; or the least share of group-of boxes of "
        "the classes to take, such as 0.5.",
    )
    flags.DEFINE_enum(
        "voc_one_based",
        "auto",
        ["auto", "true", "false"],
        "voc: pixels count from 1 and the last one is inside, as in the official sets; auto = "
        "where <source><database> says that the file is of the official VOC.",
    )
    flags.DEFINE_enum(
        "image_id",
        "auto",
        ["auto", "id", "file_stem"],
        "coco, lvis, objects365: what identifies a photo; auto = file_stem where each split is a "
        "folder with _annotations.coco.json, else the id.",
    )
    flags.DEFINE_string("data_dir", None, "tfds: folder of the prepared TFDS data sets.")
    flags.DEFINE_bool("download", False, "tfds: download and prepare the set if needed.")


def main(format_name: str) -> None:
    started, args = time.monotonic(), flags.FLAGS
    _refuse_division_without_split()
    output = Path(args.output)
    check_output(output.absolute(), args.overwrite)
    _refuse_output_around(output.absolute(), ("source", "images", "masks", "splits"))
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={output}: cannot make its folder ({error.strerror})") from error
    report = Report(strict=args.strict)
    options = Options(
        output=output,
        images=args.images,
        image_pattern=args.image_pattern,
        match_photos=args.match_photos or ("name" if format_name == "objects365" else "path"),
        splits=_path(args.splits),
        read_sizes=args.read_sizes,
        check_photos=args.check_photos,
        overwrite=args.overwrite,
        split=args.split or "",
        shares=parse_shares(args.shares),
        seed=args.split_seed,
        group=args.group,
        pool=args.pool,
        ignore=args.ignore,
    )
    # Beside the output: spooled masks and photos move there without a copy.
    remove_leftovers(output.absolute())
    spool = temporary_beside(output.absolute())
    try:
        spool.mkdir()
        annotations = _read(format_name, args.source, report, spool)
        write_dataset(annotations, options, report)
    except OSError as error:
        raise UserError(f"{output}: cannot prepare the dataset ({error})") from error
    finally:
        shutil.rmtree(spool, ignore_errors=True)
    print(f"done in {time.monotonic() - started:.1f} s", flush=True)


def _refuse_output_around(output: Path, inputs: Sequence[str]) -> None:
    """Refuses an output folder that holds an input: it would go with what the folder replaces."""
    for name in inputs:
        value = flags.FLAGS[name].value
        if value and "://" not in value and output in Path(value).absolute().parents:
            raise UserError(f"--output={output}: --{name}={value} lies in it, expected another one")


def _refuse_division_without_split() -> None:
    for name in ("shares", "pool", "split_seed", "group"):
        if not (flags.FLAGS.split or flags.FLAGS[name].using_default_value):
            kinds = "|".join(KINDS)
            raise UserError(f"--{name}: found no --split, expected --split={kinds} with it")


def _read(format_name: str, source: str, report: Report, spool: Path) -> Annotations:
    args = flags.FLAGS
    hierarchy, classes = _path(args.hierarchy), _path(args.classes)
    if classes is not None and format_name not in ("openimages", "voc", "yolo", "folders"):
        raise UserError(f"--classes: {format_name} brings its own class list")
    if args.boxes_from_masks and format_name != "openimages":
        raise UserError(f"--boxes_from_masks: found with {format_name}, expected openimages")
    if format_name == "openimages":
        return openimages.read_openimages(
            Path(source),
            report,
            spool,
            task=args.task,
            edition=args.boxes,
            classes=classes,
            hierarchy=hierarchy,
            mask_folder=_path(args.masks),
            boxes_from_masks=args.boxes_from_masks,
        )
    if format_name == "folders":
        return read_folders(Path(source), report, classes=classes, hierarchy=hierarchy)
    if format_name == "voc":
        one_based = args.voc_one_based
        return read_voc(
            Path(source), report, classes=classes, hierarchy=hierarchy, one_based=one_based
        )
    if format_name == "yolo":
        return read_yolo(Path(source), report, spool, classes=classes, hierarchy=hierarchy)
    if format_name in ("cvat", "label_studio"):
        read = read_cvat if format_name == "cvat" else read_label_studio
        return read(Path(source), report, spool, hierarchy)
    if format_name == "tfds":
        folder, download = args.data_dir, args.download
        return read_tfds(source, report, folder, spool, download=download, hierarchy=hierarchy)
    return read_coco(
        source, report, spool, name=format_name, image_id=args.image_id, hierarchy=hierarchy
    )


def _path(value: str | None) -> Path | None:
    return Path(value) if value else None


if __name__ == "__main__":
    define_flags()
    run_main(main, FORMATS)
