"""Writes the ground-truth boxes of a split as a detections table, each with score 1.

    python -m scripts.truth_table --dataset=DIR --split=validation --output=truth.parquet

For upper bounds: what a later step (masks, refined boxes) gets with boxes that are right. Group-of
boxes are left out; masks are not written.
"""

import numpy as np
from absl import flags
from etils import epath

from common.data.dataset import GROUP_OF, Dataset
from common.io.commands import run_main
from common.tables import DetectionsWriter


def write_truth(dataset: Dataset, split: str, output: epath.Path) -> int:
    """Writes the table; returns its number of rows.

    Raises:
      UserError: no such split, or the file cannot be written.
    """
    labels = np.array(dataset.class_labels)
    metadata = {
        "model": "ground truth",
        "dataset": dataset.meta.get("name", str(dataset.directory)),
        "split": split,
    }
    rows = 0
    with DetectionsWriter(output, metadata) as writer:
        for image in dataset.split(split):
            boxes, classes, flags_ = dataset.image_boxes(image)
            single = flags_ & GROUP_OF == 0
            rows += int(single.sum())
            writer.add(
                dataset.image_id(image),
                labels[classes[single]],
                np.ones(single.sum(), np.float32),
                boxes[single],
            )
    return rows


def define_flags() -> None:
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("split", None, "Split whose boxes are written.", required=True)
    flags.DEFINE_string("output", None, "Parquet file to write.", required=True)


def main():
    dataset = Dataset.open(flags.FLAGS.dataset)
    output = epath.Path(flags.FLAGS.output)
    rows = write_truth(dataset, flags.FLAGS.split, output)
    print(f"wrote {output}: {rows} ground-truth boxes", flush=True)


if __name__ == "__main__":
    define_flags()
    run_main(main)
