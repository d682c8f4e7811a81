"""Keeps of a detections table what belongs to a dataset: the photos of a split, and its classes.

    python -m scripts.restrict_detections --detections=x.parquet --dataset=DIR --split=validation \\
        --output=y.parquet [--min_score=0.01]

From the 500 classes of the detection track to the 300 of the segmentation track, say, or from all
photos to those of one split.
"""

import numpy as np
from absl import flags
from etils import epath

from common.data.dataset import Dataset
from common.io.commands import run_main
from common.io.errors import UserError
from common.tables import Detections, DetectionsReader
from common.tables.rewrite import rewrite_table


def restrict_table(
    source: epath.Path, dataset: Dataset, split: str, output: epath.Path, min_score: float
) -> tuple[int, int]:
    """Writes the table; returns its number of rows and that of the source.

    Raises:
      UserError: a photo of the split is not covered by the table, or the table is broken.
    """
    reader = DetectionsReader(source)
    wanted = {dataset.image_id(image) for image in dataset.split(split)}
    missing = sorted(wanted - set(reader.image_ids))
    if missing:
        raise UserError(
            f"{source}: found no entry of image {missing[0]!r}, expected all photos of split "
            f"{split!r} ({len(missing)} of {len(wanted)} are missing)"
        )
    labels = set(dataset.class_labels)

    def keep(rows: Detections) -> Detections:
        known = np.array([label in labels for label in rows.labels], bool)
        return rows.take(np.flatnonzero(known[rows.label_index] & (rows.scores >= min_score)))

    metadata = reader.metadata | {"split": split}
    return rewrite_table(reader, output, metadata, keep, image_ids=wanted), reader.num_rows


def define_flags() -> None:
    flags.DEFINE_string("detections", None, "Table to read: file or folder.", required=True)
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("split", None, "Split whose photos stay.", required=True)
    flags.DEFINE_string("output", None, "Parquet file to write.", required=True)
    flags.DEFINE_float("min_score", 0.0, "Detections below are left out.", 0.0)


def main():
    values = flags.FLAGS
    written, rows = restrict_table(
        epath.Path(values.detections),
        Dataset.open(values.dataset),
        values.split,
        epath.Path(values.output),
        values.min_score,
    )
    print(f"wrote {values.output}: {written} of {rows} detections", flush=True)


if __name__ == "__main__":
    define_flags()
    run_main(main)
