"""What every command that works on a run starts with: its flags, its devices, its dataset."""

from collections.abc import Callable

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.training import distributed


def define_flags(workdir_required: bool = True) -> None:
    """--config and --workdir."""
    config_flags.DEFINE_config_file("config", None, "Python file with get_config(arg).")
    flags.DEFINE_string("workdir", None, "Directory of the run.")
    flags.mark_flags_as_required(["config", "workdir"] if workdir_required else ["config"])


def start(**batch_sizes: int) -> tuple[Mesh, Callable[..., None]]:
    """Joins the other processes; returns the mesh and a `print` that only one of them does.

    Args:
      **batch_sizes: by table of the config, which must be multiples of the number of devices.

    Raises:
      UserError: one of them is not.
    """
    distributed.initialize()
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
