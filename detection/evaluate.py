"""Scores a trained detector on a split.

    python -m detection.evaluate --config=... --workdir=WORK --split=validation

Prints the result and writes WORK/evaluation/STEP/{SPLIT.parquet, SPLIT_metrics.json}; with
`--config.test_time.scales=600,800,1000` (`detection.tta.test_time`) they are SPLIT_test_time...
Of a config that refines boxes, the table of `config.evaluation.proposals` is refined and scored.
"""

from collections.abc import Callable
from pathlib import Path

from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common.data.dataset import Dataset
from common.io.atomic import write_json
from common.io.commands import run_main
from common.io.errors import UserError
from common.metrics.coco import evaluate_coco
from common.metrics.openimages import evaluate_openimages
from common.training import command, distributed
from common.training.checkpoint import Checkpoints
from detection import setup
from detection.inference import predict_split
from detection.models.faster_rcnn import FasterRCNN
from detection.refine import mean_overlaps, refine_table
from detection.tta.test_time import detect_split, is_on

METRICS = ("openimages", "coco")


def score(config: ConfigDict, dataset: Dataset, split: str, table: Path) -> dict[str, float]:
    """Official figures of a detections table, by the metric of the config."""
    overlaps = {}
    if setup.refines(config):
        overlaps = mean_overlaps(dataset, split, Path(config.evaluation.proposals), table)
    return overlaps | _official(config, dataset, split, table)


def _official(config: ConfigDict, dataset: Dataset, split: str, table: Path) -> dict[str, float]:
    if config.evaluation.metric == "coco":
        return evaluate_coco(dataset, split, table)
    expand = config.evaluation.expand_predictions
    return evaluate_openimages(dataset, split, table, expand_predictions=expand)


def restore_variables(config: ConfigDict, model: FasterRCNN, workdir: str, mesh: Mesh, step=None):
    """Parameters and statistics of a checkpoint (the newest by default), and its step."""
    checkpoints = Checkpoints(Path(workdir) / "checkpoints")
    step = step or checkpoints.latest_step()
    variables, _ = checkpoints.restore_params(
        step, distributed.abstract(setup.variable_shapes(config, model), mesh)
    )
    checkpoints.close()
    return variables, step


def evaluate_variables(
    config: ConfigDict,
    model: FasterRCNN,
    dataset: Dataset,
    mesh: Mesh,
    variables: dict,
    step: int,
    folder: Path,
    *,
    split: str | None = None,
    test_time: bool = False,
    say: Callable = print,
) -> dict[str, float]:
    """Detects in a split, scores the table and writes both; returns the summary figures.

    Every host detects its part; the first one scores. Per-class figures are in metrics.json only.
    `test_time` asks for the views of `config.test_time`, if there are any; training goes without.
    """
    if config.evaluation.metric not in METRICS:
        raise UserError(
            f"config.evaluation.metric: found {config.evaluation.metric!r}, expected one of "
            f"{', '.join(METRICS)}"
        )
    split = split or config.data.eval_split
    test_time = test_time and is_on(config)
    if test_time and config.test_time.merge == "tables":
        raise UserError(
            "config.test_time.merge: found 'tables', expected 'union' or 'mean' to score; write "
            "the tables with detection.export, then ensemble.merge and scripts.score"
        )
    if setup.refines(config) and not config.evaluation.proposals:
        say("no config.evaluation.proposals, a detections table to refine: nothing to score")
        return {}
    name = f"{split}_test_time" if test_time else split
    table = folder / f"{name}.parquet"
    common = (config, model, variables, dataset)
    if setup.refines(config):
        proposals = Path(config.evaluation.proposals)
        refine_table(*common, proposals, mesh, table, step=step, say=say)
    else:
        detect = detect_split if test_time else predict_split
        detect(*common, split, mesh, table, step=step, say=say)
    if not distributed.is_main_process():
        return {}
    results = score(config, dataset, split, table)
    write_json(folder / f"{name}_metrics.json", results)
    summary = {k: v for k, v in results.items() if "PerformanceByCategory" not in k}
    for metric, value in summary.items():
        say(f"step {step}  {name}  {metric} = {value:.4f}", flush=True)
    return summary


def define_flags() -> None:
    flags.DEFINE_string("split", None, "Split to score; default: config.data.eval_split.")
    flags.DEFINE_integer("step", None, "Checkpoint to score; default: the newest.")


def main():
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    distributed.initialize()
    mesh = distributed.make_mesh()
    dataset = command.open_dataset(config)
    model = setup.build_model(config, dataset.num_classes)
    variables, step = restore_variables(config, model, workdir, mesh, flags.FLAGS.step)
    folder = Path(workdir) / "evaluation" / f"{step}"
    evaluate_variables(
        config,
        model,
        dataset,
        mesh,
        variables,
        step,
        folder,
        split=flags.FLAGS.split,
        test_time=True,
        say=print if distributed.is_main_process() else lambda *_, **__: None,
    )


if __name__ == "__main__":
    command.define_flags()
    define_flags()
    run_main(main)
