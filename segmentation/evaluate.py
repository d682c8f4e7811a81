"""Measures a trained segmenter inside the ground-truth boxes of a split.

    python -m segmentation.evaluate --workdir=WORK --split=validation [--watch]

The config is that of the run; `--config.FIELD=VALUE` overrides it, --config=FILE replaces it.
Prints the figures and writes WORK/evaluation/STEP/SPLIT_metrics.json, there also class by class:

    mean_iou         mean over instances of the foreground's IoU inside the box
    foreground_iou   of the pixels of all instances together
    iou_above_0.5    share of the instances whose IoU is above one half, likewise 0.75
    pixel_accuracy, loss   means over all pixels
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Float64

from common.data.dataset import Dataset
from common.io import run_flags
from common.io.atomic import write_json
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.parallel import behind
from common.io.progress import Progress
from common.metrics.readiness import check_masks, evaluation_split
from common.training import command, distributed, watch
from common.training.compiling import announced
from common.training.preemption import stoppable
from common.training.restore import restore_variables
from common.training.step import variable_shapes
from common.training.watchdog import StallWatchdog
from segmentation.batch_fields import init_shapes
from segmentation.crops.batches import eval_batches
from segmentation.inference import FIGURES, evaluation_step
from segmentation.models.segmenter import Segmenter, build
from segmentation.settings import RunSettings, read_run


def evaluate_variables(
    settings: RunSettings,
    model: Segmenter,
    dataset: Dataset,
    mesh: Mesh,
    variables: dict,
    step: int,
    folder: epath.Path,
    *,
    split: str | None = None,
    say: Callable = print,
) -> dict[str, float]:
    """Figures of a split with ground-truth boxes, cut as `settings.test` says; writes them, too.

    Raises:
      UserError: the split has no instance with a mask.
    """
    split = split or settings.data.eval_split
    batch_size = -(-settings.evaluation.batch_size // mesh.size) * mesh.size
    measure = evaluation_step(model, dataset.num_classes, settings.test.flip, mesh)
    measure = announced(measure, "segmenter", say)
    batches = eval_batches(
        dataset,
        split,
        settings.evaluation_data,
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    progress = Progress(
        batches.num_batches, batch_size, mesh.size, what=f"evaluate {split}", unit="crops", say=say
    )
    totals = np.zeros((dataset.num_classes, len(FIGURES)))
    fields = tuple(init_shapes())
    started = (
        measure(variables, distributed.to_global(batch, mesh, fields))
        for batch in progress.timed(batches)
    )
    # The host adds the figures of batch i while the devices work on batch i + 1.
    for number, figures in enumerate(stoppable(behind(started)), start=1):
        totals += distributed.to_host(figures)
        progress.report(number, last=number == batches.num_batches)
    results = summary(totals)
    if not results:
        raise UserError(f"{dataset.directory}: found no readable instance with a mask in {split}")
    if distributed.is_main_process():
        by_class = {
            f"{name}/{label}": value
            for label, row in zip(dataset.class_labels, totals, strict=True)
            for name, value in summary(row[None]).items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{split}_metrics.json", results | by_class)
        for name, value in results.items():
            say(f"step {step}  {split}  {name} = {value:.4f}", flush=True)
    return results


def summary(totals: Float64[np.ndarray, "K F"]) -> dict[str, float]:
    """Figures of classes together from their sums (`inference.FIGURES`); {} without an instance."""
    sums = dict(zip(FIGURES, totals.sum(axis=0).tolist(), strict=True))
    instances, pixels = sums["instances"], max(sums["pixels"], 1.0)
    if not instances:
        return {}
    return {
        "mean_iou": sums["iou"] / instances,
        "foreground_iou": sums["intersection"] / sums["union"] if sums["union"] else 1.0,
        "iou_above_0.5": sums["iou_above_0.5"] / instances,
        "iou_above_0.75": sums["iou_above_0.75"] / instances,
        "pixel_accuracy": sums["correct"] / pixels,
        "loss": sums["loss"] / pixels,
        "instances": instances,
    }


def check_evaluation(settings: RunSettings, dataset: Dataset, say: Callable) -> RunSettings:
    """The settings of a training whose evaluations will find what they need.

    Raises:
      UserError: they will not.
    """
    if not settings.evaluation.is_on:
        return settings
    name, off = settings.data.eval_split, "config.evaluation.every_steps"
    split = evaluation_split(dataset, name, say, off)
    check_masks(dataset, split)
    data = dataclasses.replace(settings.data, eval_split=split)
    return dataclasses.replace(settings, data=data)


def define_flags() -> None:
    flags.DEFINE_string("split", None, "Split to measure; default: config.data.eval_split.")
    flags.DEFINE_integer("step", None, "Checkpoint to measure; default: the newest.")
    run_flags.define_watch_flags()


def main():
    mesh, say = command.start()
    args = flags.FLAGS
    workdir = args.workdir
    times = dict(timeout=args.timeout, poll_seconds=args.poll_seconds)
    if args.watch:
        watch.wait_for_training(workdir, say, **times)
    settings = command.read_trained(read_run, args.config, workdir, say)
    dataset = command.open_model_dataset(
        settings.data.dir, workdir, has_classes=settings.model.class_specific
    )
    split = evaluation_split(dataset, args.split or settings.data.eval_split, say)
    model = build(settings.model, dataset.num_classes, distributed.DATA_AXIS)
    shapes = variable_shapes(model, init_shapes())
    if args.watch:

        def measure(candidate: epath.Path, step: int, folder: epath.Path) -> dict[str, float]:
            variables, _ = restore_variables(candidate, shapes, mesh, step)
            common = (settings, model, dataset, mesh, variables, step, folder)
            return evaluate_variables(*common, split=split, say=say)

        watch.watch(workdir, split, measure, "mean_iou", **times, log=settings.log, say=say)
        return
    with StallWatchdog.of(settings.log):
        variables, step = restore_variables(workdir, shapes, mesh, args.step)
        folder = epath.Path(workdir) / "evaluation" / f"{step}"
        common = (settings, model, dataset, mesh, variables, step, folder)
        evaluate_variables(*common, split=split, say=say)


if __name__ == "__main__":
    run_flags.define_flags(config_required=False)
    define_flags()
    run_main(main)
