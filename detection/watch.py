"""An evaluation job beside a training: `python -m detection.evaluate --watch`."""

from collections.abc import Callable

from etils import epath
from jax.sharding import Mesh

from common.data.dataset import Dataset
from common.io.paths import PathLike
from common.metrics import openimages, openimages_masks
from common.training.restore import restore_variables
from common.training.watch import watch
from detection.inference import clear_table
from detection.models.box_refiner import BoxRefiner
from detection.models.faster_rcnn import FasterRCNN
from detection.settings import RunSettings
from detection.tta.test_time import detect_split


def best_metric(settings: RunSettings) -> str:
    """The figure that the best checkpoint has most of."""
    official = {"openimages": openimages.MEAN_AP, "openimages_masks": openimages_masks.MEAN_AP}
    return official.get(settings.evaluation.metric, "AP").format(0.5)


def watch_training(
    settings: RunSettings,
    model: FasterRCNN | BoxRefiner,
    shapes: dict,
    dataset: Dataset,
    split: str,
    mesh: Mesh,
    workdir: PathLike,
    say: Callable,
    evaluate: Callable[..., dict[str, float]],
    *,
    timeout: float,
    poll_seconds: float,
    export: str,
    export_split: str | None,
) -> None:
    """Scores each checkpoint of a training on a split, and exports detections.

    Args:
      settings: of the run.
      model: detector or refiner.
      shapes: of its variables.
      dataset: as the model sees it.
      split: to score.
      mesh: all devices.
      workdir: of the training.
      say: where lines go.
      evaluate: `detection.evaluate.evaluate_variables`.
      timeout: as that of `common.training.watch.watch`.
      poll_seconds: likewise.
      export: 'each', 'best' or 'none' of the checkpoints; refiners export nothing.
      export_split: to detect in; None: `split`.
    """
    folder = epath.Path(workdir) / "watch" / split

    def score(candidate: epath.Path, step: int, output: epath.Path) -> dict[str, float]:
        variables, _ = restore_variables(candidate, shapes, mesh, step)
        common = (settings, model, dataset, mesh, variables, step, output)
        return evaluate(*common, split=split, test_time=True, say=say)

    def write(candidate: epath.Path, step: int, is_best: bool) -> None:
        if isinstance(model, BoxRefiner) or export == "none" or (export == "best" and not is_best):
            return
        variables, _ = restore_variables(candidate, shapes, mesh, step)
        photos = export_split or split
        name = "best" if export == "best" else f"{step}"
        output = folder / "export" / f"{photos}_{name}.parquet"
        clear_table(output)
        detect_split(settings, model, variables, dataset, photos, mesh, output, step=step, say=say)
        say(f"wrote {output}: step {step}", flush=True)

    watch(
        epath.Path(workdir),
        split,
        score,
        best_metric(settings),
        timeout=timeout,
        poll_seconds=poll_seconds,
        log=settings.log,
        say=say,
        on_scored=write,
    )
