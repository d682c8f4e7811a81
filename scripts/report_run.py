"""One HTML page about one training: how it learned, how fast, and what it found by when.

    python -m scripts.report_run --workdir=WORK --output=run.html

Also while the training runs. The page needs nothing but a browser: losses, learning rate, images a
second and wait for data, proposal recall; where the time went (`goodput.json`); the official
figures and the AP of each class at each evaluation (those of `detection.evaluate --watch`
included); photos with what was detected on them; of a detector, some photos as training is fed with
them.

Shape legend: K classes.
"""

import base64
import tempfile

import numpy as np
from absl import flags
from jaxtyping import Int

from common.data.dataset import Dataset
from common.data.model_classes import read_model_classes, with_model_classes
from common.io.atomic import write_text
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.json_file import read_json
from common.io.paths import PathLike, to_epath
from common.report import over_time
from common.report.pictures import Picture, read_photos
from common.report.run_log import Evaluation, RunLog, read_evaluations
from common.report.run_page import RunView, build_run_page
from common.tables.ranges import rows_of
from configs import of_workdir


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Work directory of the run.", required=True)
    flags.DEFINE_string("output", None, "HTML file to write.", required=True)
    flags.DEFINE_string("dataset", None, "Dataset directory; default: that of the run.")
    flags.DEFINE_integer("max_pictures", 6, "Photos of each kind on the page.", lower_bound=0)
    flags.DEFINE_float("min_score", 0.3, "Least score of the detections drawn.")


def main() -> None:
    values = flags.FLAGS
    page = report_run(
        values.workdir,
        dataset=values.dataset,
        max_pictures=values.max_pictures,
        min_score=values.min_score,
    )
    write_text(values.output, page)
    print(f"wrote {values.output} ({len(page) / 2**20:.1f} MiB)")


def report_run(
    workdir: PathLike, *, dataset: str | None = None, max_pictures: int = 6, min_score: float = 0.3
) -> str:
    """The page of a run as HTML.

    Args:
      workdir: of a detector's or a segmenter's training, finished or not.
      dataset: its dataset directory; None: where the config says.
      max_pictures: photos to show detections on.
      min_score: of these detections.

    Raises:
      UserError: no run there.
    """
    log = RunLog(workdir)
    config_file = to_epath(workdir) / "config.json"
    config = read_json(config_file) if config_file.exists() else {}
    evaluations = read_evaluations(workdir)
    opened = _open_dataset(workdir, dataset, config)
    counts, pictures, fed = None, [], ""
    if opened is not None:
        counts = _train_counts(opened, config.get("data", {}).get("train_split"))
        if shown := over_time.chosen_steps(evaluations):
            pictures = _pictures(opened, shown, max_pictures)
        if max_pictures and config.get("task") == "detection":
            fed = _fed(workdir, str(opened.directory), max_pictures)
    return build_run_page(
        RunView(log, config, evaluations, opened, counts, pictures, min_score, fed)
    )


def _open_dataset(workdir: PathLike, directory: str | None, config: dict) -> Dataset | None:
    """The run's dataset with the classes of the run; None, and one line, where it is elsewhere."""
    place = directory or config.get("data", {}).get("dir")
    if not place:
        return None
    try:
        opened = Dataset.open(place)
        return with_model_classes(opened, read_model_classes(to_epath(workdir)))
    except UserError as error:
        if directory:
            raise
        print(f"note: no class names and pictures, since the dataset cannot be opened: {error}")
        return None


def _train_counts(dataset: Dataset, split: str | None) -> Int[np.ndarray, " K"] | None:
    """Training boxes of each class; None where the dataset has no such split."""
    if split not in dataset.splits:
        return None
    _, rows = rows_of(dataset.box_offsets, dataset.split(split))
    return np.bincount(dataset.box_classes[rows], minlength=dataset.num_classes)


def _pictures(dataset: Dataset, evaluations: list[Evaluation], number: int) -> list[Picture]:
    """Photos of the split that the last of them scored; none where the dataset has no such one."""
    split = evaluations[-1].name.removesuffix("_test_time")
    try:
        images = over_time.choose_images(dataset, dataset.split(split), number)
    except UserError as error:
        print(f"note: no pictures: {error}")
        return []
    pictures = [Picture(image, []) for image in images]
    read_photos(dataset, pictures)
    return pictures


def _fed(workdir: PathLike, dataset: str, number: int) -> str:
    """A picture, as a data URI, of what a detector's config makes of some photos; '' if it cannot.

    The batch is of `number` slots: of a pod's, with a thousand, memory would hold all.
    """
    from detection.settings import read_run
    from scripts.draw_batches import draw_batches

    config = of_workdir.get_config(str(workdir))
    config.data.dir, config.data.batch_size = dataset, number
    try:
        with tempfile.TemporaryDirectory() as folder:
            *_, overview = draw_batches(read_run(config), 0, 1, number, to_epath(folder))
            return "data:image/jpeg;base64," + base64.b64encode(overview.read_bytes()).decode()
    except UserError as error:
        print(f"note: no picture of what training is fed with: {error}")
        return ""


if __name__ == "__main__":
    define_flags()
    run_main(main)
