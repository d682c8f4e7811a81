"""Results in COCO's form in the place of tables: `--inputs=a=a.json` and `--output=m.json`.

Ids of images and categories, and sizes of photos, are those of a dataset directory made of COCO or
LVIS files. A results file covers all images of the dataset; boxes that reach beyond their photo are
cut at its edge.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.tables import DetectionsReader
from common.tables.exchange import ids
from common.tables.exchange.results_json import read_results, write_results
from common.tables.exchange.rows import Outgoing
from common.tables.exchange.spool import Importer
from ensemble.inputs import parse_inputs

_ENDINGS = (".json", ".json.gz")


@contextlib.contextmanager
def as_tables(
    inputs: Sequence[str], dataset: str, *, masks: bool = False, say: Callable[[str], None] = print
) -> Iterator[list[str]]:
    """The same inputs, with a table for each file of results while the block lasts.

    Args:
      inputs: as `path` or `name=path`.
      dataset: directory; needed for results alone.
      masks: whether the masks of results are kept.
      say: where progress goes.

    Raises:
      UserError: results without a dataset, or that do not fit it.
    """
    if not any(text.endswith(_ENDINGS) for text in inputs):
        yield list(inputs)
        return
    paths, _ = parse_inputs(inputs)
    opened = _open_dataset(dataset, next(text for text in inputs if text.endswith(_ENDINGS)))
    everything = range(opened.num_images)
    images = ids.images_of_dataset(opened, everything)
    categories = ids.categories_of_dataset(opened)
    with tempfile.TemporaryDirectory(prefix="results-") as folder:
        tables = []
        for number, (text, path) in enumerate(zip(inputs, paths, strict=True)):
            if not text.endswith(_ENDINGS):
                tables.append(text)
                continue
            name = text[: -len(str(path))].rstrip("=") or path.name.split(".")[0]
            importer = Importer(
                Path(path),
                [opened.image_id(index) for index in everything],
                str(opened.directory),
                opened.class_labels,
                masks=masks,
                clip=True,
            )
            if not Path(path).is_file():
                raise UserError(f"{path}: no such file")
            rows = read_results(Path(path), images, categories, masks=masks)
            table = Path(folder) / f"{number}.parquet"
            metadata = {"model": name, "dataset": opened.meta["name"]}
            count, _ = importer.write(rows, table, metadata)
            say(f"{path}: {count} detections as {name}")
            tables.append(f"{name}={table}")
        yield tables


@contextlib.contextmanager
def as_results(output: str, dataset: str) -> Iterator[str]:
    """A table to write that becomes results when the block ends well; other outputs as they are.

    Raises:
      UserError: results without a dataset, or one that calls its images by file names.
    """
    if not output.endswith(_ENDINGS):
        yield output
        return
    opened = _open_dataset(dataset, output)
    if opened.meta.get("image_id", "id") == "file_stem":
        raise UserError(
            f"--output={output}: {opened.directory} calls its images by file names; write a table "
            "and give the numbers to python -m scripts.submit --annotations=FILE.json"
        )
    with tempfile.TemporaryDirectory(prefix="results-") as folder:
        table = Path(folder) / "merged.parquet"
        yield str(table)
        reader = DetectionsReader(table)
        write_results(
            Outgoing(reader=reader, masks=reader.has_masks),
            output,
            ids.images_of_dataset(opened, opened.find_images(reader.image_ids).tolist()),
            ids.categories_of_dataset(opened),
            geometry="masks" if reader.has_masks else "boxes",
        )


def _open_dataset(dataset: str, path: str) -> Dataset:
    if not dataset:
        raise UserError(
            f"{path}: results need a dataset directory for their ids: --config.dataset=DIR, "
            "made by python -m scripts.prepare_data coco"
        )
    return Dataset.open(dataset)
