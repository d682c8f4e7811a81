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
from common.tables import DetectionsReader, DetectionsWriter


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
    masks = reader.has_masks
    rows = written = 0
    with DetectionsWriter(output, reader.metadata | {"split": split}, masks=masks) as writer:
        for chunk in reader.chunks(masks=masks):
            rows += len(chunk)
            known = np.array([label in labels for label in chunk.labels], bool)
            names = np.array(chunk.labels, object)
            for part in chunk.chunks(rows=1):
                name = reader.image_ids[part.image_index[0]]
                if name not in wanted:
                    continue
                wanted.remove(name)
                keep = known[part.label_index] & (part.scores >= min_score)
                written += int(keep.sum())
                writer.add(
                    name,
                    names[part.label_index[keep]],
                    part.scores[keep],
                    part.boxes[keep],
                    None if part.masks is None else part.masks[keep],
                    None if part.mask_sizes is None else part.mask_sizes[keep],
                )
        for name in sorted(wanted):
            writer.add_empty(name)
    return written, rows


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
