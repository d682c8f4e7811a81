"""Opens trained detectors: work directories of runs, and files of scripts.export_weights.

    import detection

    detector = detection.load("run")
    result = detector("photo.jpg")

What a detector can do is in `detection.detector`.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common.data.dataset import flat_hierarchy
from common.data.model_classes import ModelClasses, read_model_classes
from common.io.command_line import load_config
from common.io.errors import UserError
from common.io.paths import PathLike
from common.nn.weights.fine_tuning import TrainedModel, read_trained_model
from common.training import command, distributed
from common.training.compile_cache import use_compile_cache
from common.training.distributed import DATA_AXIS
from common.training.restore import restore_variables
from common.training.step import variable_shapes
from configs import of_workdir
from detection.batch_fields import init_shapes
from detection.detector import Detector
from detection.models.box_refiner import BoxRefiner
from detection.models.faster_rcnn import FasterRCNN, build
from detection.settings import RunSettings, read_run


def load(
    path: PathLike,
    *,
    config: ConfigDict | str | None = None,
    step: int | None = None,
    batch_size: int = 0,
    say: Callable = print,
) -> Detector:
    """A trained detector on the devices of this process.

    Compiled programs are kept for the next start (`common.training.compile_cache`).

    Args:
      path: work directory of a run, local or gs://, or a file of scripts.export_weights.
      config: of the run where the path has none, or with other fields: a ConfigDict, or
        FILE.py[:ARG] as --config takes it.
      step: checkpoint of the work directory; None: the newest.
      batch_size: see `Detector`.
      say: called with lines such as those about compiling.

    Raises:
      UserError: no detector there, or one of another config.
    """
    use_compile_cache()
    if isinstance(config, str):
        config = load_config(config)
    mesh = distributed.make_mesh(jax.local_devices())
    return open_detector(path, config, step, mesh, batch_size=batch_size, say=say)


def open_detector(
    path: PathLike,
    config: ConfigDict | None,
    step: int | None,
    mesh: Mesh,
    *,
    batch_size: int = 0,
    say: Callable = print,
) -> Detector:
    """As `load`, on a mesh; the other processes of the run, if there are any, call it, too."""
    path = os.fspath(path)
    if path.endswith(".safetensors"):
        trained = read_trained_model(path)
        settings = _file_settings(path, config, trained.config)
        hierarchy = dict(trained.hierarchy or flat_hierarchy(trained.labels))
        names = trained.names or trained.labels
        classes = ModelClasses(path, trained.labels, names, hierarchy)
        model = _build(settings, classes, path)
        shapes = variable_shapes(model, init_shapes(settings.data))
        variables = distributed.replicate(_values(trained, shapes), mesh)
    else:
        settings = _run_settings(path, config, say)
        classes = read_model_classes(path)
        model = _build(settings, classes, path)
        shapes = variable_shapes(model, init_shapes(settings.data))
        variables, step = restore_variables(path, shapes, mesh, step)
    variables, local_mesh = distributed.own_part(variables, mesh)
    return Detector(
        settings, classes, model, variables, local_mesh, step=step, batch_size=batch_size, say=say
    )


def _file_settings(path: str, config: ConfigDict | None, own: Any) -> RunSettings:
    """Of a weights file: `config`, or else the one that it holds."""
    if config is None and own is None:
        raise UserError(
            f"{path}: holds no config (a file of an earlier version), expected one beside it: "
            "detection.load(FILE, config=...), --config=FILE.py"
        )
    return read_run(of_workdir.completed(own) if config is None else config)


def _run_settings(workdir: str, config: ConfigDict | None, say: Callable) -> RunSettings:
    """Of a work directory: `config`, or else its own."""
    if config is None and (epath.Path(workdir) / "config.json").exists():
        config = of_workdir.get_config(workdir)
    return command.read_trained(read_run, config, workdir, say)


def _build(settings: RunSettings, classes: ModelClasses, path: str) -> FasterRCNN:
    if settings.test_time.is_on and settings.test_time.merge == "tables":
        raise UserError("config.test_time.merge: found 'tables', expected 'union' or 'mean'")
    model = build(settings.model, classes.count, DATA_AXIS)
    if isinstance(model, BoxRefiner):
        raise UserError(f"{path}: refines the boxes of a table, expected a run of a detector")
    return model


def _values(trained: TrainedModel, shapes: dict) -> dict:
    """The variables of a weights file.

    Raises:
      UserError: they are not those of the model.
    """
    wanted = traverse_util.flatten_dict(shapes, sep="/")
    values = {}
    for name, shape in wanted.items():
        found = trained.weights.get(name)
        if found is None or found.shape != shape.shape:
            what = "nothing" if found is None else found.shape
            raise UserError(f"{trained.source}: {name}: found {what}, expected {shape.shape}")
        values[name] = found.astype(shape.dtype)
    if unused := sorted(set(trained.weights) - set(wanted)):
        raise UserError(f"{trained.source}: {unused[0]}: found, the config has no such array")
    return {"batch_stats": {}} | traverse_util.unflatten_dict(values, sep="/")
