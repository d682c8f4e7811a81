"""Copies every detection to the parent classes of its class, box and score.

    python -m scripts.expand_detections --detections=x.parquet --dataset=DIR --output=y.parquet

The OpenImages metric and the challenge server expect it of every entry; `scripts.score` expands
only when asked. The output says `expanded: true` in its metadata and is refused as input.
"""

from absl import flags

from common.data.dataset import Dataset
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.paths import PathLike
from common.tables import DetectionsReader
from common.tables.hierarchy import ancestors, expand_detections
from common.tables.rewrite import rewrite_table


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
    written = rewrite_table(
        reader,
        output,
        reader.metadata | {"expanded": True},
        lambda rows: expand_detections(rows, parents, dataset.class_labels),
        labels=dataset.class_labels,
    )
    return reader.num_rows, written


def main():
    dataset = Dataset.open(flags.FLAGS.dataset)
    read, written = expand_table(flags.FLAGS.detections, dataset, flags.FLAGS.output)
    print(f"{flags.FLAGS.output}: {written} detections from {read}")


if __name__ == "__main__":
    define_flags()
    run_main(main)
