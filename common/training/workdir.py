"""The work directory of a run: its config, and one line of metrics per report.

config.json     what the run was started with; a second start must agree with it
classes.csv     label,name of the model's classes in the order of its outputs
hierarchy.json  tree of the labels
metrics.jsonl   {"step": 20, "loss": 1.25, ...}, ascending steps; evaluations have own lines, which
                say as "evaluation_of" what was measured
goodput.json    where the time of all starts went, see `common.training.goodput`
checkpoints/    see `common.training.checkpoint`; without one, nothing binds the next start
profile/        traces of steps, see `common.training.profiling`
logs/host-N/    output of each start, where scripts/launch_pod.sh started it

config.json and the classes of a run without a checkpoint are those of its last start.
"""

import contextlib
import fnmatch
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from common.data.dataset import Dataset
from common.data.model_classes import read_model_classes, with_model_classes, write_model_classes
from common.io.atomic import write_text
from common.io.errors import UserError
from common.io.json_file import read_object
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
      UserError: the directory holds checkpoints of another config (names the fields that differ),
        an unreadable `config.json`, or cannot be written.
    """
    workdir = to_epath(directory)
    path = workdir / "config.json"
    new = _plain(config)
    if path.exists():
        old = read_config(workdir)
        if old == new:
            return workdir
        if has_checkpoint(workdir):
            _refuse_differences(workdir, old, new, may_differ)
    if jax.process_index() == 0:
        write_text(path, json.dumps(new, indent=2, sort_keys=True) + "\n")
    return workdir


def has_checkpoint(workdir: epath.Path) -> bool:
    """Whether a training came so far that its state was saved."""
    folder = workdir / "checkpoints"
    return folder.exists() and any(path.name.isdecimal() for path in folder.iterdir())


def keep_classes(workdir: epath.Path, dataset: Dataset) -> Dataset:
    """The run's dataset with the classes of the run: those that its first checkpoint was made with.

    They are written into a work directory that has no checkpoint yet; later a dataset that lists
    them otherwise is renumbered by label (`with_model_classes`).

    Raises:
      UserError: the dataset has a class that the run lacks.
    """
    if has_checkpoint(workdir) and (workdir / "classes.csv").exists():
        try:
            return with_model_classes(dataset, read_model_classes(workdir))
        except UserError as error:
            raise UserError(
                f"{error}; other classes are another run: give another --workdir, with "
                f"--config.init_from={workdir} to start from this one"
            ) from error
    if jax.process_index() == 0:
        write_model_classes(workdir, dataset.class_labels, dataset.class_names, dataset.hierarchy)
    return dataset


def read_config(workdir: PathLike) -> dict[str, Any]:
    """The `config.json` of a work directory as plain nested dictionaries."""
    path = epath.Path(workdir) / "config.json"
    try:
        return read_object(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file, expected the work directory of a run") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read the config of the run ({error})") from error


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

    def write(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Appends one line, visible to readers at once.

        Raises:
          UserError: it cannot be written, such as on a full disk.
        """
        try:
            self._file.write(json.dumps({"step": int(step), **metrics}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path}: cannot write ({error.strerror})") from error

    def evaluation(self, step: int, what: str) -> dict[str, float] | None:
        """The figures of an evaluation of `what` that the log has, or None."""
        for line in reversed(self._path.read_text().splitlines()):
            values = json.loads(line)
            if values["step"] < step:
                return None
            prefix = "evaluation/"
            figures = {k[len(prefix) :]: v for k, v in values.items() if k.startswith(prefix)}
            # Lines of earlier versions do not say what they are of.
            if figures and values["step"] == step and values.get("evaluation_of", what) == what:
                return figures
        return None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line that `write` told of: others are flushed
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


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], may_differ: Sequence[str] = ()
) -> list[str]:
    """The fields in which two configs differ, with both values, as texts.

    Args:
      old: `config.json` of the work directory.
      new: config of the command.
      may_differ: as in `prepare_workdir`.
    """

    def allowed(field: str) -> bool:
        return any(
            fnmatch.fnmatchcase(field, pattern)
            for prefix in may_differ
            for pattern in (prefix, f"{prefix}.*")
        )

    absent = object()

    def show(value: Any) -> str:
        return "nothing" if value is absent else json.dumps(value)

    before, after = _flatten(_plain(old)), _flatten(_plain(new))
    return [
        f"config.{field}: work directory has {show(before.get(field, absent))}, "
        f"command has {show(after.get(field, absent))}"
        for field in sorted(before.keys() | after.keys())
        if before.get(field, absent) != after.get(field, absent) and not allowed(field)
    ]


def name_some(texts: Sequence[str]) -> str:
    """The first few differences, and how many more there are."""
    named = "; ".join(texts[:_MAX_NAMED])
    more = len(texts) - _MAX_NAMED
    return f"{named}; and {more} more fields" if more > 0 else named


def _refuse_differences(
    workdir: epath.Path, old: Mapping[str, Any], new: Mapping[str, Any], may_differ: Sequence[str]
) -> None:
    if found := differences(old, new, may_differ):
        raise UserError(
            f"{workdir}: work directory of another config ({name_some(found)}). "
            "Choose another --workdir, or the config of this one."
        )
