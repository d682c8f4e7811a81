"""Scores a trained detector on a split.

    python -m detection.evaluate --workdir=WORK --split=validation [--watch]

The config is that of the run; `--config.FIELD=VALUE` overrides it, --config=FILE replaces it.
Prints the result and writes WORK/evaluation/STEP/{SPLIT.parquet, SPLIT_metrics.json}; with
`--config.test_time.scales=600,800,1000` (`detection.tta.test_time`) they are SPLIT_test_time...
With --watch each checkpoint of a training is scored as it appears (`common.training.watch`).
Of a config that refines boxes, the table of `config.evaluation.proposals` is refined and scored.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh

from common.data.dataset import Dataset
from common.io import activity, run_flags
from common.io.atomic import write_json
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.paths import PathLike
from common.masks.dataset_masks import MaskReader
from common.metrics.official import evaluate
from common.metrics.readiness import check_metric, evaluation_split
from common.report import panels
from common.training import command, distributed, watch
from common.training.distributed import DATA_AXIS
from common.training.restore import restore_variables
from common.training.step import variable_shapes
from common.training.watchdog import StallWatchdog
from detection import watch as watching
from detection.batch_fields import init_shapes
from detection.inference import clear_table, predict_split
from detection.models.box_refiner import BoxRefiner
from detection.models.faster_rcnn import FasterRCNN, build
from detection.refine import mean_overlaps, refine_table
from detection.settings import RunSettings, read_run
from detection.tta.test_time import detect_split

_PICTURE_SIDE = 512  # pixels of a photo in TensorBoard
_PICTURE_SCORE = 0.3  # detections below are not drawn
_PICTURE_BOXES = 50


def score(settings: RunSettings, dataset: Dataset, split: str, table: PathLike) -> dict[str, float]:
    """Official figures of a detections table, by the metric of the config."""
    overlaps = {}
    if settings.model.refines:
        overlaps = mean_overlaps(dataset, split, settings.evaluation.proposals, table)
    metric, expand = settings.evaluation.metric, settings.evaluation.expand_predictions
    return overlaps | evaluate(metric, dataset, split, table, expand_predictions=expand)


def evaluate_variables(
    settings: RunSettings,
    model: FasterRCNN | BoxRefiner,
    dataset: Dataset,
    mesh: Mesh,
    variables: dict,
    step: int,
    folder: epath.Path,
    *,
    split: str | None = None,
    test_time: bool = False,
    say: Callable = print,
) -> dict[str, float]:
    """Detects in a split, scores the table and writes both; returns the summary figures.

    Every host detects its part; the first one scores. Per-class figures are in metrics.json only.
    `test_time` asks for the views of `config.test_time`, if there are any; training goes without.
    """
    split = split or settings.data.eval_split
    test_time = test_time and settings.test_time.is_on
    if test_time and settings.test_time.merge == "tables":
        raise UserError(
            "config.test_time.merge: found 'tables', expected 'union' or 'mean' to score; write "
            "the tables with detection.export, then ensemble.merge and scripts.score"
        )
    if settings.model.refines and not settings.evaluation.proposals:
        say("no config.evaluation.proposals, a detections table to refine: nothing to score")
        return {}
    name = f"{split}_test_time" if test_time else split
    table = folder / f"{name}.parquet"
    clear_table(table)
    options: dict[str, Any] = dict(step=step, say=say)
    if isinstance(model, BoxRefiner):
        proposals = settings.evaluation.proposals
        refine_table(settings, model, variables, dataset, proposals, mesh, table, **options)
    else:
        detect = detect_split if test_time else predict_split
        detect(settings, model, variables, dataset, split, mesh, table, **options)
    if not distributed.is_main_process():
        return {}
    with activity.doing(activity.SCORING):
        results = score(settings, dataset, split, table)
    write_json(folder / f"{name}_metrics.json", results)
    summary = {k: v for k, v in results.items() if "PerformanceByCategory" not in k}
    for metric, value in summary.items():
        say(f"step {step}  {name}  {metric} = {value:.4f}", flush=True)
    return summary


def evaluation_pictures(
    settings: RunSettings, dataset: Dataset, folder: epath.Path
) -> dict[str, np.ndarray]:
    """Ground truth beside the detections that an evaluation left in `folder`, on a few photos.

    Returns:
      (1, height, width, 3) uint8 by name.
    """
    split, limit = settings.data.eval_split, settings.evaluation.num_pictures
    indices = panels.choose_images(dataset, split, (), limit)
    table = folder / f"{split}.parquet"
    drawings = panels.read_drawings(table, dataset, indices, _PICTURE_SCORE, _PICTURE_BOXES)
    masks = MaskReader(dataset) if dataset.mask_offsets is not None else None
    pictures = {}
    for index in indices:
        arguments = (dataset, index, drawings[index], masks, _PICTURE_SIDE)
        try:
            picture = panels.truth_and_detections(*arguments)
        except UserError:  # a broken photo, which the evaluation has counted
            continue
        pictures[f"detections/{dataset.image_id(index)}"] = np.asarray(picture)[None]
    return pictures


def check_evaluation(settings: RunSettings, dataset: Dataset, say: Callable) -> RunSettings:
    """The settings of a training whose evaluations will find what they need.

    Raises:
      UserError: they will not.
    """
    if not settings.evaluation.is_on:
        return settings
    split = evaluation_split(dataset, settings.data.eval_split, say)
    if not settings.model.refines or settings.evaluation.proposals:
        check_metric(dataset, split, settings.evaluation.metric)
    data = dataclasses.replace(settings.data, eval_split=split)
    return dataclasses.replace(settings, data=data)


def define_flags() -> None:
    flags.DEFINE_string("split", None, "Split to score; default: config.data.eval_split.")
    flags.DEFINE_integer("step", None, "Checkpoint to score; default: the newest.")
    run_flags.define_watch_flags()
    exports = ["none", "each", "best"]
    flags.DEFINE_enum("export", "none", exports, "With --watch: detections to export.")
    flags.DEFINE_string("export_split", None, "Split to export; default: that of --split.")


def main() -> None:
    mesh, say = command.start()
    args = flags.FLAGS
    workdir = args.workdir
    times = dict(timeout=args.timeout, poll_seconds=args.poll_seconds)
    if args.watch:
        watch.wait_for_training(workdir, say, **times)
    settings = command.read_trained(read_run, args.config, workdir, say)
    dataset = command.open_model_dataset(
        settings.data.directory, workdir, has_classes=not settings.model.refines
    )
    split = evaluation_split(dataset, args.split or settings.data.eval_split, say)
    check_metric(dataset, split, settings.evaluation.metric)
    model = build(settings.model, dataset.num_classes, DATA_AXIS)
    shapes = variable_shapes(model, init_shapes(settings.data))
    if args.watch:
        watching.watch_training(
            *(settings, model, shapes, dataset, split, mesh, workdir, say, evaluate_variables),
            **times,
            export=args.export,
            export_split=args.export_split,
        )
        return
    with StallWatchdog.of(settings.log):
        variables, step = restore_variables(workdir, shapes, mesh, args.step)
        folder = epath.Path(workdir) / "evaluation" / f"{step}"
        common = (settings, model, dataset, mesh, variables, step, folder)
        evaluate_variables(*common, split=split, test_time=True, say=say)


if __name__ == "__main__":
    run_flags.define_flags(config_required=False)
    define_flags()
    run_main(main)
