"""Copies every detection to the parent classes of its class, box and score.

    python -m scripts.expand_detections --detections=x.parquet --dataset=DIR --output=y.parquet

The OpenImages metric and the challenge server expect it of every entry; `scripts.score` expands
only when asked. The output says `expanded: true` in its metadata and is refused as input.
"""

import numpy as np
from absl import flags

from common.data.dataset import Dataset
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.paths import PathLike
from common.tables import DetectionsReader, DetectionsWriter
from common.tables.hierarchy import ancestors, expand_detections


def define_flags() -> None:
    flags.DEFINE_string("detections", None, "Table to read.", required=True)
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("output", None, "Parquet file to write.", required=True)


def expand_table(path: PathLike, dataset: Dataset, output: PathLike) -> tuple[int, int]:
    """Writes the expanded table; returns the numbers of rows read and written.

    Raises:
      UserError: the table is broken, expanded already, or has labels that the dataset lacks.
    """
    reader = DetectionsReader(path)
    if reader.metadata.get("expanded"):
        raise UserError(f"{path}: is expanded to parent classes already")
    parents = ancestors(dataset.hierarchy, dataset.class_labels)
    labels = np.array(dataset.class_labels)
    metadata = {**reader.metadata, "expanded": True}
    written = 0
    with DetectionsWriter(output, metadata, masks=reader.has_masks) as writer:
        empty = set(reader.image_ids)
        for chunk in reader.chunks(dataset.class_labels, masks=reader.has_masks):
            chunk = expand_detections(chunk, parents, dataset.class_labels)
            for rows in chunk.chunks(rows=1):
                image_id = reader.image_ids[rows.image_index[0]]
                writer.add(
                    image_id,
                    labels[rows.label_index],
                    rows.scores,
                    rows.boxes,
                    rows.masks,
                    rows.mask_sizes,
                )
                empty.remove(image_id)
            written += len(chunk)
        for image_id in empty:
            writer.add_empty(image_id)
    return reader.num_rows, written


def main():
    dataset = Dataset.open(flags.FLAGS.dataset)
    read, written = expand_table(flags.FLAGS.detections, dataset, flags.FLAGS.output)
    print(f"{flags.FLAGS.output}: {written} detections from {read}")


if __name__ == "__main__":
    define_flags()
    run_main(main)
