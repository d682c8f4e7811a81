"""Scores a detections table against a split of a dataset, without the model.

    python -m scripts.score --metric=openimages --dataset=DIR --split=validation \\
        --detections=x.parquet [--expand_predictions] [--json=out.json]

Metrics: openimages, openimages_masks, coco, coco_masks, lvis, lvis_masks; the masks are those of
the table.

Prints the figures, the best and worst classes, and whether the predictions were expanded to
parent classes. `--json` gets plain {"name": value} pairs with the official metric names and one
value per class that has ground truth.
"""

from collections.abc import Mapping

from absl import flags

from common.data.dataset import Dataset
from common.io.atomic import write_json
from common.io.commands import run_main
from common.io.errors import UserError
from common.metrics import official
from common.metrics.names import METRICS
from common.tables import DetectionsReader


def define_flags() -> None:
    flags.DEFINE_string("metric", "openimages", f"One of {', '.join(METRICS)}.")
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("split", "validation", "Split of the dataset.")
    flags.DEFINE_string(
        "detections", None, "Detections table: Parquet file or folder of shards.", required=True
    )
    flags.DEFINE_string("json", None, 'Also write {"name": value} pairs here.')
    flags.DEFINE_bool(
        "allow_partial", False, "Score the covered images although others of the split are missing."
    )
    flags.DEFINE_bool(
        "expand_predictions",
        False,
        "openimages: copy detections to parent classes first, unless the table says it is "
        "expanded. The official tool does not.",
    )
    flags.DEFINE_bool(
        "image_labels",
        True,
        "openimages: use verified image-level labels, as official; without them detections count "
        "only for classes boxed in the image.",
    )
    flags.DEFINE_integer("show", 5, "Best and worst classes to print.")


def main():
    values = flags.FLAGS
    metric = values.metric
    if metric not in METRICS:
        raise UserError(f"--metric={metric}: expected one of {', '.join(METRICS)}")
    dataset = Dataset.open(values.dataset)
    if metric.startswith("openimages"):
        expanded = DetectionsReader(values.detections).metadata.get("expanded")
        print(f"predictions expanded to parent classes: {_expansion(expanded)}", flush=True)
    results = official.evaluate(
        metric,
        dataset,
        values.split,
        values.detections,
        expand_predictions=values.expand_predictions,
        image_labels=values.image_labels,
        allow_partial=values.allow_partial,
    )
    print(
        format_table(
            results,
            dict(zip(dataset.class_labels, dataset.class_names, strict=True)),
            flags.FLAGS.show,
        )
    )
    if flags.FLAGS.json:
        write_json(flags.FLAGS.json, results)
        print(f"wrote {flags.FLAGS.json}")


def _expansion(expanded: bool | None) -> str:
    if expanded:
        return "yes, in the table"
    if flags.FLAGS.expand_predictions:
        return "yes, by --expand_predictions"
    return "no"


def format_table(results: Mapping[str, float], names: Mapping[str, str], show: int) -> str:
    """Summary figures, then the best and worst `show` classes.

    Args:
      results: of an evaluation.
      names: class label to the name to print.
      show: how many classes at either end.
    """
    classes = {k: v for k, v in results.items() if "PerformanceByCategory" in k}
    lines = [f"{k:<60} {v:8.4f}" for k, v in results.items() if k not in classes]
    lines.append(f"{'classes with ground truth':<60} {len(classes):8d}")
    ranked = sorted(classes.items(), key=lambda item: -item[1])
    split = max(len(ranked) - show, show)
    for title, part in (("best classes", ranked[:show]), ("worst classes", ranked[split:])):
        if part:
            lines.append(f"{title}:")
        for key, value in part:
            label = next(ending for ending in _endings(key) if ending in names)
            lines.append(f"  {names[label][:38]:<38} {label[:18]:<19} {value:8.4f}")
    return "\n".join(lines)


def _endings(key: str):
    """Texts after each slash: labels such as MIDs hold slashes themselves."""
    parts = key.split("/")
    return ("/".join(parts[i:]) for i in range(1, len(parts)))


if __name__ == "__main__":
    define_flags()
    run_main(main)
