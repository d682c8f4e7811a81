"""Flags of every command that works on a run; apart, so that they are defined without JAX."""

from absl import flags
from ml_collections import ConfigDict, config_flags

from common.io.command_line import load_config


def define_flags(*, config_required: bool = True, workdir_required: bool = True) -> None:
    """--config and --workdir.

    Args:
      config_required: False: the run in --workdir has one (`common.io.command_line`).
      workdir_required: False: the command can do without.
    """
    text = "Python file with get_config(arg): FILE.py[:ARG]." + (
        "" if config_required else " Default: the config of the run in --workdir."
    )
    config_flags.DEFINE_config_file("config", None, text)
    flags.DEFINE_string("workdir", None, "Directory of the run.")
    for name, required in (("config", config_required), ("workdir", workdir_required)):
        if required:
            flags.mark_flag_as_required(name)


def training_config() -> ConfigDict:
    """The config of the command line, whose learning-rate drops follow the length of the run.

    The drops of a config file belong to its own number of epochs. Where the command line changes
    that alone, they move in proportion; `--config.optimizer.decay_epochs` sets them otherwise.
    """
    config, flag = flags.FLAGS.config, flags.FLAGS["config"]
    changed = config_flags.get_override_values(flag)
    if "optimizer.num_epochs" in changed and "optimizer.decay_epochs" not in changed:
        optimizer = config.optimizer
        before = load_config(config_flags.get_config_filename(flag)).optimizer.num_epochs
        scale = optimizer.num_epochs / before
        drops = tuple(round(scale * epoch, 4) for epoch in optimizer.decay_epochs)
        optimizer.decay_epochs = drops
    return config


def define_watch_flags() -> None:
    """--watch and when to look."""
    flags.DEFINE_bool("watch", False, "Score each new checkpoint of a training until its last.")
    flags.DEFINE_float("timeout", 0.0, "With --watch: seconds without a new one; 0: for ever.")
    flags.DEFINE_float("poll_seconds", 10.0, "With --watch: seconds between two looks.")
