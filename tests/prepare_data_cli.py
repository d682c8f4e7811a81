"""Runs scripts.prepare_data inside the test process."""

import json
from pathlib import Path

from absl import flags
from absl.testing import flagsaver
from PIL import Image

from common.data.dataset import Dataset
from scripts import prepare_data

HEADER = "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf"


def prepare(format_name: str, **values) -> Dataset:
    """Converts and opens the result; flags as keywords, UserErrors pass through."""
    if "source" not in flags.FLAGS:
        prepare_data.define_flags()
        # Required flags would fail on an empty command line.
        flags.FLAGS(["test", "--source=-", "--output=-"])
    values = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
    with flagsaver.flagsaver(**values):
        prepare_data.main(format_name)
    return Dataset.open(values["output"])


def reasons(dataset: Dataset) -> dict[str, int]:
    """Reason -> count, from report.json."""
    report = json.loads((dataset.directory / "report.json").read_text())
    return {entry["reason"]: entry["count"] for entry in report}


def write_photo(path: Path, height: int, width: int, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (80, 120, 40)).save(path, **options)


def openimages_source(
    folder: Path,
    rows: list[str],
    *,
    split: str = "train",
    labels: list[str] | None = None,
    header: str = HEADER,
    classes: str = "/m/a,Mouse\n/m/b,Mouse\n/m/c,Cat\n",
) -> Path:
    """A folder with Challenge 2019 files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "challenge-2019-classes-description-500.csv").write_text(classes)
    name = f"challenge-2019-{split}-detection-bbox.csv"
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    if labels is not None:
        name = f"challenge-2019-{split}-detection-human-imagelabels.csv"
        (folder / name).write_text("\n".join(["ImageID,LabelName,Confidence", *labels]) + "\n")
    return folder
