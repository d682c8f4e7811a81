"""One HTML page about one or several detections tables: where they are right, and where wrong.

    python -m scripts.report --dataset=DIR --split=validation \\
        --detections=a.parquet,b.parquet --output=report.html

The page needs nothing but a browser: mAP side by side, precision-recall curves, classes sortable by
AP and by rarity, what each kind of error costs, confusion pairs with examples, box sizes, best and
worst images with their boxes. The figures are those of `scripts.score` with the same --metric.
"""

import os

from absl import flags
from etils import epath

from common.data.dataset import Dataset
from common.io.atomic import write_text
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.paths import is_remote
from common.metrics import official
from common.metrics.names import METRICS, Metric
from common.report.analysis import analyse
from common.report.confusion import count_confusions
from common.report.page import build_page
from common.report.pictures import choose, read_photos
from common.report.scope import Scope, open_scope, table_names
from common.tables import DetectionsReader


def define_flags() -> None:
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("split", "validation", "Split of the dataset.")
    flags.DEFINE_list(
        "detections", None, "Detections tables: Parquet files or folders of shards.", required=True
    )
    flags.DEFINE_string("output", None, "HTML file to write.", required=True)
    flags.DEFINE_enum(
        "metric",
        None,
        METRICS,
        "Whose figures head the page, and by whose rules detections are judged. Default: lvis for "
        "a dataset made of LVIS files, coco for one that is annotated exhaustively, else "
        "openimages.",
    )
    flags.DEFINE_list("names", [], "What the page calls the tables; else parts of their paths.")
    flags.DEFINE_string(
        "train_split",
        "train",
        "Split whose boxes say how rare a class is; the scored split when there is no such one.",
    )
    flags.DEFINE_integer("max_pictures", 80, "Photos on the page.", lower_bound=0)
    flags.DEFINE_float(
        "min_score",
        None,
        "Counts, confusions and pictures take detections above it; else above the score of the "
        "best F1 of each class.",
    )
    flags.DEFINE_bool(
        "allow_partial", False, "Judge the covered images although others of the split are missing."
    )
    flags.DEFINE_bool(
        "expand_predictions",
        False,
        "Copy detections to parent classes first, unless the table says it is expanded.",
    )
    flags.DEFINE_bool("image_labels", True, "Use verified image-level labels, as official.")


def main():
    values = flags.FLAGS
    paths = [path for path in values.detections if path]
    if not paths:
        raise UserError("--detections: names no table")
    names = values.names or table_names(paths)
    if len(names) != len(paths) or len(set(names)) != len(names):
        raise UserError(f"--names={','.join(names)}: expected {len(paths)} different names")
    page = report(
        Dataset.open(values.dataset),
        values.split,
        [DetectionsReader(path) for path in paths],
        names,
        check_output(values.output),
        metric=values.metric,
        train_split=values.train_split,
        max_pictures=values.max_pictures,
        min_score=values.min_score,
        allow_partial=values.allow_partial,
        expand_predictions=values.expand_predictions,
        image_labels=values.image_labels,
    )
    print(f"wrote {page}, {page.stat().length / 1e6:.1f} MB", flush=True)


def report(
    dataset: Dataset,
    split: str,
    readers: list[DetectionsReader],
    names: list[str],
    output: epath.Path,
    *,
    metric: Metric | None = None,
    train_split: str = "train",
    max_pictures: int = 80,
    min_score: float | None = None,
    allow_partial: bool = False,
    expand_predictions: bool = False,
    image_labels: bool = True,
) -> epath.Path:
    """Writes the page by atomic rename; the arguments are the flags of the command."""
    scope = open_scope(
        dataset,
        split,
        readers,
        train_split=train_split if train_split in dataset.splits else None,
        metric=metric,
        image_labels=image_labels,
        allow_partial=allow_partial,
        say=_say,
    )

    def official_figures(scope: Scope, reader: DetectionsReader) -> dict[str, float] | None:
        if scope.metric == "openimages":
            return None  # what the analysis finds itself
        figures = official.evaluate(
            scope.metric,
            dataset,
            split,
            reader.path,
            expand_predictions=expand_predictions,
            image_labels=image_labels,
            allow_partial=allow_partial,
        )
        return official.headline(scope.metric, figures)

    tables = [
        analyse(
            scope,
            reader,
            name,
            expand_predictions=expand_predictions,
            official=official_figures(scope, reader),
            min_score=min_score,
            say=_say,
        )
        for reader, name in zip(readers, names, strict=True)
    ]
    confusions = count_confusions(scope, tables)
    pictures, shown = choose(scope, tables, confusions, max_pictures)
    _say(f"reading {len(pictures)} photos")
    read_photos(dataset, pictures, say=_say)
    text = build_page(scope, tables, confusions, pictures, shown, min_score)
    write_text(output, text)
    return output


def check_output(path: str) -> epath.Path:
    """The path, when a file can be written there: told before the work, not after it."""
    output = epath.Path(path)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={path}: cannot write ({error})") from error
    if output.is_dir() or not (is_remote(path) or os.access(output.parent, os.W_OK)):
        raise UserError(f"--output={path}: cannot write, expected the name of an HTML file")
    return output


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    define_flags()
    run_main(main)
