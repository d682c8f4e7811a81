"""Measures a trained segmenter inside the ground-truth boxes of a split.

    python -m segmentation.evaluate --config=... --workdir=WORK --split=validation

Prints the figures and writes WORK/evaluation/STEP/SPLIT_metrics.json, there also class by class:

    mean_iou         mean over instances of the foreground's IoU inside the box
    foreground_iou   of the pixels of all instances together
    iou_above_0.5    share of the instances whose IoU is above one half, likewise 0.75
    pixel_accuracy, loss   means over all pixels
"""

from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Float64
from ml_collections import ConfigDict

from common.data.dataset import Dataset
from common.io.atomic import write_json
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.progress import Progress
from common.training import command, distributed
from segmentation import setup
from segmentation.crops.batches import eval_batches
from segmentation.inference import FIGURES, evaluation_step
from segmentation.models.segmenter import Segmenter


def evaluate_variables(
    config: ConfigDict,
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
    """Figures of a split with ground-truth boxes, cut as `config.test` says; writes them, too.

    Raises:
      UserError: the split has no instance with a mask.
    """
    split = split or config.data.eval_split
    batch_size = -(-config.evaluation.batch_size // mesh.size) * mesh.size
    measure = evaluation_step(model, dataset.num_classes, bool(config.test.flip), mesh)
    fields = tuple(setup.batch_shapes((1, 1), 1))
    batches = eval_batches(
        dataset,
        split,
        setup.evaluation_data(config),
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    progress = Progress(batches.num_batches, batch_size, mesh.size)
    totals = np.zeros((dataset.num_classes, len(FIGURES)))
    ahead = None  # the host adds batch i while the devices work on i + 1
    for number, host_batch in enumerate(progress.timed(batches), start=1):
        batch = distributed.to_global({k: host_batch[k] for k in fields}, mesh)
        found = measure(variables, batch)
        if ahead is not None:
            totals += distributed.to_host(ahead)
        ahead = found
        progress.step_done(number)
        if number % max(batches.num_batches // 10, 1) == 0:
            say(f"evaluate {split}: {progress.line(number, {})}", flush=True)
    if ahead is not None:
        totals += distributed.to_host(ahead)
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
    """Figures of classes together from their sums (`predict.FIGURES`); {} without an instance."""
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


def define_flags() -> None:
    flags.DEFINE_string("split", None, "Split to measure; default: config.data.eval_split.")
    flags.DEFINE_integer("step", None, "Checkpoint to measure; default: the newest.")


def main():
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    mesh, say = command.start()
    dataset = command.open_dataset(config.data.dir)
    model = setup.build_model(config, dataset.num_classes)
    variables, step = setup.restore_variables(config, model, workdir, mesh, flags.FLAGS.step)
    folder = epath.Path(workdir) / "evaluation" / f"{step}"
    evaluate_variables(
        config, model, dataset, mesh, variables, step, folder, split=flags.FLAGS.split, say=say
    )


if __name__ == "__main__":
    command.define_flags()
    define_flags()
    run_main(main)
