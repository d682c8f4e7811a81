"""What every command that works on a run starts with: its flags and its dataset."""

from absl import flags
from ml_collections import config_flags

from common.data.dataset import Dataset
from common.io.errors import UserError


def define_flags(workdir_required: bool = True) -> None:
    """--config and --workdir."""
    config_flags.DEFINE_config_file("config", None, "Python file with get_config(arg).")
    flags.DEFINE_string("workdir", None, "Directory of the run.")
    flags.mark_flags_as_required(["config", "workdir"] if workdir_required else ["config"])


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
