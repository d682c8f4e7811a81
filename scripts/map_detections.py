"""Renames the labels of a detections table into another vocabulary.

    python -m scripts.map_detections --detections=coco_model.parquet \\
        --mapping=coco_to_openimages --dataset=DIR --output=expert.parquet

Maps between COCO, LVIS, Objects365 and OpenImages are shipped (common/tables/class_maps). Those of
one's own are CSV files, a column for each vocabulary: --mapping=FILE:SOURCE_COLUMN:TARGET_COLUMN.

So a model trained on COCO or Objects365 becomes an expert for the classes that it shares with
OpenImages. Rows of other classes are left out; the output's metadata list under `classes` what the
mapping can give. Parents are not expanded: that comes after (`scripts.expand_detections`), with the
hierarchy of the new vocabulary.
"""

from collections import Counter

import numpy as np
from absl import flags

from common.data.dataset import Dataset
from common.io.commands import run_main
from common.io.errors import UserError
from common.tables import Detections, DetectionsReader
from common.tables.class_mapping import RULES, find_class_mapping, map_detections
from common.tables.rewrite import rewrite_table


def define_flags() -> None:
    flags.DEFINE_string("detections", None, "Table to read.", required=True)
    flags.DEFINE_string(
        "mapping",
        None,
        "Shipped map such as coco_to_openimages, or FILE.csv:SOURCE_COLUMN:TARGET_COLUMN.",
        required=True,
    )
    flags.DEFINE_enum("rule", "error", RULES, "For a label with several targets.")
    flags.DEFINE_multi_string(
        "where", [], "COLUMN=VALUE: only rows of the mapping with this value, repeatable."
    )
    flags.DEFINE_string(
        "dataset", None, "Dataset directory of the new vocabulary: targets must be its classes."
    )
    flags.DEFINE_string("output", None, "Parquet file to write.", required=True)


def main():
    args = flags.FLAGS
    for text in args.where:
        if "=" not in text:
            raise UserError(f"--where={text}: expected COLUMN=VALUE")
    where = dict(text.split("=", 1) for text in args.where)
    mapping = find_class_mapping(args.mapping, rule=args.rule, where=where)
    targets = mapping.target_labels
    if args.dataset:
        known = set(Dataset.open(args.dataset).class_labels)
        unknown = [label for label in targets if label not in known]
        if unknown:
            raise UserError(
                f"{args.mapping}: target {unknown[0]!r} is no class of {args.dataset} "
                f"({len(unknown)} such targets)"
            )
    reader = DetectionsReader(args.detections)
    if reader.metadata.get("expanded"):
        raise UserError(
            f"{args.detections}: is expanded to the parent classes of its own vocabulary, expected "
            "a table that is not: expand after renaming"
        )
    metadata = {**reader.metadata, "expanded": False, "classes": sorted(targets)}
    metadata["mapping"] = {"map": args.mapping, "where": where}
    counts: Counter[str] = Counter()

    def rename(rows: Detections) -> Detections:
        found = np.bincount(rows.label_index, minlength=len(rows.labels))
        counts.update(dict(zip(rows.labels, found.tolist(), strict=True)))
        return map_detections(rows, mapping, targets)

    def check() -> None:
        if counts and not mapping.targets.keys() & counts.keys():
            raise UserError(
                f"{args.detections}: none of its labels ({', '.join(list(counts)[:3])}...) is a "
                f"source label of {args.mapping} ({', '.join(list(mapping.targets)[:3])}...)"
            )

    written = rewrite_table(reader, args.output, metadata, rename, finish=check)
    lost = {label: count for label, count in counts.items() if label not in mapping.targets}
    print(f"{args.output}: {written} detections from {reader.num_rows}")
    print(f"labels renamed: {len(counts) - len(lost)}, target classes: {len(targets)}")
    if lost:
        named = ", ".join(sorted(lost, key=lambda label: lost[label], reverse=True)[:10])
        print(f"labels without a target: {len(lost)} with {sum(lost.values())} rows: {named}")


if __name__ == "__main__":
    define_flags()
    run_main(main)
