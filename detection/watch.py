"""An evaluation job beside a training: `python -m detection.evaluate --watch`."""

from collections.abc import Callable

from absl import flags
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
) -> None:
    """Scores each checkpoint of a training on a split, and exports what --export asks for.

    `evaluate` is `detection.evaluate.evaluate_variables`.
    """
    folder = epath.Path(workdir) / "watch" / split

    def score(candidate: epath.Path, step: int, output: epath.Path) -> dict[str, float]:
        variables, _ = restore_variables(candidate, shapes, mesh, step)
        common = (settings, model, dataset, mesh, variables, step, output)
        return evaluate(*common, split=split, test_time=True, say=say)

    def export(candidate: epath.Path, step: int, is_best: bool) -> None:
        wanted = flags.FLAGS.export
        if isinstance(model, BoxRefiner) or wanted == "none" or (wanted == "best" and not is_best):
            return
        variables, _ = restore_variables(candidate, shapes, mesh, step)
        photos = flags.FLAGS.export_split or split
        name = "best" if wanted == "best" else f"{step}"
        output = folder / "export" / f"{photos}_{name}.parquet"
        clear_table(output)
        detect_split(settings, model, variables, dataset, photos, mesh, output, step=step, say=say)
        say(f"wrote {output}: step {step}", flush=True)

    watch(
        epath.Path(workdir),
        split,
        score,
        best_metric(settings),
        timeout=flags.FLAGS.timeout,
        poll_seconds=flags.FLAGS.poll_seconds,
        say=say,
        on_scored=export,
    )
