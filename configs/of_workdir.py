"""The config of a run, as its work directory keeps it; ARG is the work directory.

    python -m detection.evaluate --workdir=WORK

takes this one by itself, with WORK as argument, unless --config names another. Fields that the
run's version of the code did not have get their values from the base of today.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from common.io.errors import UserError
from common.io.json_file import read_object

_BASES = {
    "detection": "configs.detection.base",
    "segmentation": "configs.segmentation.base",
    "classification": "configs.pretrain.resnet50",
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: work directory of the run."""
    path = f"{arg}/config.json"
    try:
        return completed(read_object(path))
    except OSError as error:
        raise UserError(f"{path}: cannot read the config of the run ({error})") from error


def completed(config: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The config of a run as JSON keeps it, with what today's base has beside it."""
    if config.get("task") in _BASES:
        base = importlib.import_module(_BASES[config["task"]]).get_config().to_dict()
        config = _completed(config, base)
    return ml_collections.ConfigDict({name: _with_tuples(value) for name, value in config.items()})


def _completed(config, base):
    """`config` with those fields of `base` that it lacks, in all sections that both have."""
    if not (isinstance(config, dict) and isinstance(base, dict)):
        return config
    own = {name: _completed(value, base.get(name)) for name, value in config.items()}
    return {**base, **own}


def _with_tuples(value):
    """JSON has lists where configs have tuples."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
