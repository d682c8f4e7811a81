"""What a search has saved beside its output, and which search it belongs to."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.io.json_file import read_json
from common.io.paths import PathLike, to_epath
from ensemble.inputs import Tables
from ensemble.preparation import Preparation
from ensemble.settings import SearchSettings
from ensemble.tree.evolution import State

STATE_FORMAT = 2


def load_state(path: epath.Path, identity: Mapping[str, Any]) -> State | None:
    """State of an interrupted (or finished) search, None where there is none.

    Raises:
      UserError: a broken file, or of a search with other inputs or settings.
    """
    if not path.exists():
        return None
    try:
        content = read_json(path)
        known, version = content["identity"], content["format"]
        state = State.from_json(content["state"], str(path))
    except UserError as error:
        raise UserError(f"{error}; remove it to start anew") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no readable state ({error}); remove it to start anew") from error
    for name, value in {**identity, "format": STATE_FORMAT}.items():
        saved = version if name == "format" else known.get(name)
        if saved != value:
            raise UserError(
                f"{path}: belongs to a search with other {name} ({str(saved)[:60]}, now "
                f"{str(value)[:60]}); remove it or give another --output"
            )
    return state


def identity_of(
    tables: Tables,
    preparation: Preparation,
    options: SearchSettings,
    dataset: Dataset,
    splits: list[str],
    metric: str,
) -> dict[str, Any]:
    """What decides about the result: a state with another identity is refused."""
    searched = dataclasses.asdict(options)
    for name in ("folds", "threads", "cache_gigabytes", "save_seconds", "log_seconds", "naive"):
        del searched[name]
    images = hashlib.sha256("\n".join(tables.image_ids).encode()).hexdigest()[:16]
    return {
        "inputs": [
            [table.name, table.reader.num_rows, _content(table.reader.path)]
            for table in tables.tables
        ],
        "images": images,
        "dataset": [dataset.meta["name"], dataset.num_images, len(dataset.boxes), _truth(dataset)],
        "splits": splits[:1],
        "metric": metric,
        "preparation": _digest(tables, preparation),
        "settings": json.loads(json.dumps(searched)),
    }


def _content(path: PathLike) -> str:
    """Hash of the bytes of a table, a file or a folder of shards."""
    table = to_epath(path)
    content = hashlib.blake2b(digest_size=8)
    for file in sorted(table.glob("*.parquet")) if table.is_dir() else [table]:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                content.update(block)
    return content.hexdigest()


def _truth(dataset: Dataset) -> str:
    """Hash of the boxes and of the labels verified at image level."""
    content = hashlib.blake2b(digest_size=8)
    for array in (
        dataset.boxes, dataset.box_offsets, dataset.box_classes, dataset.box_flags,
        dataset.label_offsets, dataset.label_classes, dataset.label_confidences,
    ):  # fmt: skip
        content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()


def _digest(tables: Tables, preparation: Preparation) -> str:
    """Hash of all that decides which rows enter the trees, with which scores."""
    content = hashlib.sha256(f"{preparation.expansion} {preparation.min_score}".encode())
    for array in (preparation.kept, preparation.weights, *(t.label_codes for t in tables.tables)):
        content.update(np.ascontiguousarray(array).tobytes())
    if preparation.calibration is not None:
        for curve, shifts in preparation.calibration.curves:
            for array in (curve.scores, curve.precisions, shifts):
                content.update(array.tobytes())
    return content.hexdigest()[:16]
