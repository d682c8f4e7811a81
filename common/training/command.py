"""What every command that works on a run starts with: its devices, its dataset."""

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common.data.dataset import Dataset
from common.data.model_classes import photos_for_model, read_model_classes, with_model_classes
from common.io.errors import UserError
from common.io.paths import to_epath
from common.training import distributed, preemption
from common.training.workdir import differences, name_some, prepare_workdir, read_config
from common.training.workdir_lock import workdir_lock


class Settings(Protocol):
    """What all settings of runs can do."""

    def to_dict(self) -> dict[str, Any]: ...


RunSettings = TypeVar("RunSettings", bound=Settings)
# Fields that change what a trained model computes; others may be overridden without a word.
_OF_THE_MODEL = ("config.model.", "config.data.canvas", "config.data.pad_multiple")
_BEFORE_TRAINING = ("model.pretrained",)  # of which a trained model has nothing left


def start(**batch_sizes: int) -> tuple[Mesh, Callable[..., None]]:
    """Joins the other processes; returns the mesh and a `print` that only one of them does.

    From now on SIGTERM and SIGINT ask the command to stop where it can (`preemption`).

    Args:
      **batch_sizes: by table of the config, which must be multiples of the number of devices.

    Raises:
      UserError: one of them is not.
    """
    distributed.initialize()
    preemption.install(distributed.team(), socket.gethostname())
    mesh = distributed.make_mesh()
    say = print if distributed.is_main_process() else lambda *_, **__: None
    say(
        f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}, "
        f"{jax.process_count()} processes",
        flush=True,
    )
    for table, size in batch_sizes.items():
        if size % mesh.size:
            raise UserError(
                f"config.{table}.batch_size: found {size}, expected a multiple of the {mesh.size} "
                "devices"
            )
    return mesh, say


def open_dataset(directory: str) -> Dataset:
    """The dataset directory of `config.data.dir`.

    Raises:
      UserError: the field is empty, or the directory is none.
    """
    if not directory:
        raise UserError(
            "config.data.dir: empty, expected a dataset directory written by "
            "scripts.prepare_data (--config.data.dir=DIR)"
        )
    return Dataset.open(directory)


def check_weights(model_pretrained: str, init_from: str = "") -> None:
    """Refuses what a training could not start from, before anything is read or compiled.

    Args:
      model_pretrained: `config.model.pretrained`, '' for none.
      init_from: `config.init_from`, '' for none.

    Raises:
      UserError: no such file, or a folder where a file belongs.
    """
    if model_pretrained:
        path = to_epath(model_pretrained)
        if path.is_dir():
            raise UserError(
                f"config.model.pretrained: {path} is a folder, expected a file written by "
                "scripts.convert_weights (a trained detector is config.init_from)"
            )
        if not path.exists():
            raise UserError(f"config.model.pretrained: {path}: no such file")
    if init_from and not to_epath(init_from).exists():
        raise UserError(f"config.init_from: {init_from}: no such file or work directory")


@contextlib.contextmanager
def training_workdir(
    directory: str, config: Mapping[str, Any], may_differ: Sequence[str], say: Callable
) -> Iterator[epath.Path]:
    """The work directory of a training (`prepare_workdir`), which no other one may use meanwhile.

    Raises:
      UserError: of another config, or in use.
    """
    workdir = to_epath(directory)
    with contextlib.ExitStack() as stack:
        if distributed.is_main_process():
            try:
                workdir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{workdir}: cannot write ({error.strerror})") from error
            # Before anything is written: `config.json` may be that of a running training.
            stack.enter_context(workdir_lock(workdir, say=say))
        yield prepare_workdir(workdir, config, may_differ)


def read_trained(
    read: Callable[[ConfigDict], RunSettings],
    config: ConfigDict | None,
    workdir: str,
    say: Callable,
) -> RunSettings:
    """The settings of a trained run, and a note where they are not those of its training.

    Args:
      read: makes settings of a config.
      config: that of --config, or of the work directory; None where it has none.
      workdir: of the run.
      say: where notes go.

    Raises:
      UserError: there is no config, or a wrong one.
    """
    if config is None:
        raise UserError(
            f"{workdir}/config.json: no such file, expected the work directory of a run"
        )
    settings = read(config)
    if (epath.Path(workdir) / "config.json").exists():
        found = differences(read_config(workdir), settings.to_dict(), _BEFORE_TRAINING)
        if notes := [text for text in found if text.startswith(_OF_THE_MODEL)]:
            say(f"note: not as the model was trained: {name_some(notes)}", flush=True)
    return settings


def open_model_dataset(
    directory: str, workdir: str, *, has_classes: bool = True, photos_only: bool = False
) -> Dataset:
    """A dataset as a trained model sees it: its classes are the model's.

    Args:
      directory: `config.data.dir`.
      workdir: of the run.
      has_classes: False for a model without outputs for classes: any dataset as it is.
      photos_only: the annotations, of whatever classes, are left out.

    Raises:
      UserError: as `open_dataset`; the model's classes are not known, or the dataset has others.
    """
    dataset = open_dataset(directory)
    if not has_classes:
        return dataset
    classes = read_model_classes(workdir)
    return (photos_for_model if photos_only else with_model_classes)(dataset, classes)
