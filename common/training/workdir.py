"""The work directory of a run: its config, and one line of metrics per report.

config.json     what the run was started with; a second start must agree with it
classes.csv     label,name of the model's classes in the order of its outputs
hierarchy.json  tree of the labels
metrics.jsonl   {"step": 20, "loss": 1.25, ...}, ascending steps; evaluations have own lines
"""

import fnmatch
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from common.data.dataset import Dataset, read_classes
from common.data.dataset_writer import write_classes
from common.io.atomic import write_text
from common.io.errors import UserError
from common.io.paths import PathLike, to_epath

_MAX_NAMED = 5  # differing fields spelled out in an error


def prepare_workdir(
    directory: PathLike, config: Mapping[str, Any], may_differ: Sequence[str] = ()
) -> epath.Path:
    """Creates the work directory, or makes sure that an existing one is of the same config.

    Process 0 writes `config.json` (sorted, atomic); all processes check.

    Args:
      directory: local folder or `gs://` prefix.
      config: of this run, as nested dictionaries.
      may_differ: fields, or prefixes of fields, that may change between starts of one run, such as
        'num_epochs', 'log' or 'data.sources.*.dir'; `config.json` then takes the new values.

    Returns:
      the path of the work directory.

    Raises:
      UserError: the directory holds a run of another config (names the fields that differ), an
        unreadable `config.json`, or cannot be written.
    """
    workdir = to_epath(directory)
    path = workdir / "config.json"
    new = _plain(config)
    if path.exists():
        old = read_config(workdir)
        if old == new:
            return workdir
        _refuse_differences(workdir, _flatten(old), _flatten(new), may_differ)
    if jax.process_index() == 0:
        write_text(path, json.dumps(new, indent=2, sort_keys=True) + "\n")
    return workdir


def keep_classes(workdir: epath.Path, dataset: Dataset) -> None:
    """Writes the classes of the run, or makes sure that they are those of its first start.

    Raises:
      UserError: the work directory is of other classes than the dataset directory.
    """
    path = workdir / "classes.csv"
    if path.exists():
        labels, _ = read_classes(path)
        if labels != list(dataset.class_labels):
            raise UserError(
                f"{path}: found {len(labels)} classes, {', '.join(labels[:_MAX_NAMED])}, ...; "
                f"expected those of {dataset.directory}, in its order "
                f"({', '.join(dataset.class_labels[:_MAX_NAMED])}, ...)"
            )
    elif jax.process_index() == 0:
        write_classes(path, dataset.class_labels, dataset.class_names)
        write_text(workdir / "hierarchy.json", json.dumps(dataset.hierarchy, indent=1) + "\n")


def read_config(workdir: PathLike) -> dict[str, Any]:
    """The `config.json` of a work directory as plain nested dictionaries."""
    path = epath.Path(workdir) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file, expected the work directory of a run") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: found {type(config).__name__}, expected a JSON object")
    return config


class MetricsLog:
    """Appends lines to `metrics.jsonl`; a resumed run goes on where its checkpoint stands."""

    def __init__(self, workdir: PathLike, start_step: int = 0):
        """Drops lines of steps past `start_step`, and a last line cut short by a kill."""
        self._path = epath.Path(workdir) / "metrics.jsonl"
        if self._path.exists():
            text = self._path.read_text()
            kept = "".join(_lines_up_to(text, start_step))
            if kept != text:
                write_text(self._path, kept)
        self._file = self._path.open("a")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line, visible to readers at once."""
        self._file.write(json.dumps({"step": int(step), **metrics}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines_up_to(text: str, last_step: int):
    for line in text.splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # the line that a kill cut short
        if step <= last_step and line.endswith("\n"):
            yield line


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as JSON gives it back: tuples as lists, other objects by name."""
    return json.loads(json.dumps(config, default=str))


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        tree = {str(place): item for place, item in enumerate(tree)}
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat = {}
    for name, value in tree.items():
        flat.update(_flatten(value, f"{prefix}.{name}" if prefix else name))
    return flat


def _refuse_differences(
    workdir: epath.Path, old: dict[str, Any], new: dict[str, Any], may_differ: Sequence[str]
) -> None:
    def allowed(field: str) -> bool:
        return any(
            fnmatch.fnmatchcase(field, pattern)
            for prefix in may_differ
            for pattern in (prefix, f"{prefix}.*")
        )

    absent = object()

    def show(value: Any) -> str:
        return "nothing" if value is absent else json.dumps(value)

    differences = [
        f"config.{field}: work directory has {show(old.get(field, absent))}, "
        f"command has {show(new.get(field, absent))}"
        for field in sorted(old.keys() | new.keys())
        if old.get(field, absent) != new.get(field, absent) and not allowed(field)
    ]
    if not differences:
        return
    named = "; ".join(differences[:_MAX_NAMED])
    if len(differences) > _MAX_NAMED:
        named += f"; and {len(differences) - _MAX_NAMED} more fields"
    raise UserError(
        f"{workdir}: work directory of another config ({named}). "
        "Choose another --workdir, or the config of this one."
    )
