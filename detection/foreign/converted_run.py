"""A converted detector as the work directory of a run, with which every command works."""

from collections.abc import Sequence

import numpy as np

from common.data.dataset import flat_hierarchy
from common.data.model_classes import write_model_classes
from common.io.atomic import atomic_folder
from common.io.errors import UserError
from common.io.paths import PathLike, to_epath
from common.training.checkpoint import Checkpoints
from common.training.workdir import prepare_workdir
from detection.foreign.conversion import Converted, variables_of

STEP = 1  # of the only checkpoint; 0 would be no training at all


def write_workdir(
    output: PathLike, converted: Converted, labels: Sequence[str], source: str
) -> None:
    """Writes config, classes and a checkpoint; the folder appears when it is complete.

    Args:
      output: folder that is not there yet, local or gs://.
      converted: the detector.
      labels: of its classes, in the order of the outputs.
      source: name of the file that it comes from.

    Raises:
      UserError: the folder is there, or cannot be written.
    """
    if to_epath(output).exists():
        raise UserError(f"--output={output}: exists already, expected a new directory")
    with atomic_folder(output) as folder:
        prepare_workdir(folder, converted.settings.to_dict())
        write_model_classes(folder, labels, labels, flat_hierarchy(labels))
        writer = Checkpoints(folder / "checkpoints")
        state = {"step": np.int32(STEP), **variables_of(converted.weights)}
        extra = {"converted_from": source, "family": converted.foreign.family}
        writer.save(STEP, state, extra, wait=True)
        writer.close()
