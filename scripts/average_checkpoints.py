"""Averages the parameters of several checkpoints of one run (paper section 6).

    python -m scripts.average_checkpoints --workdir=RUN --epochs=9-13 --output=RUN_AVERAGED
    python -m scripts.average_checkpoints --workdir=RUN --steps=9000,10000,11000 --output=DIR
    python -m scripts.average_checkpoints --workdir=RUN --epochs=9-13 --output=RUN_AVERAGED \\
        --recompute_batch_stats=1000 --config=configs/detection/r50.py --config.data.dir=DIR

The output is a work directory with one checkpoint that `evaluate` and `export` read: the plain mean
of params and batch_stats. The batch-norm statistics of averaged weights are not exactly the average
of the statistics (with frozen norms they are): `--recompute_batch_stats=N` measures them anew on N
training batches, of the size in the config and on all devices of this machine.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from common.io.atomic import atomic_folder
from common.io.commands import run_main
from common.io.errors import UserError
from common.training import command, distributed
from common.training.checkpoint import Checkpoints
from common.training.checkpoint_items import describe, flatten, to_nested_dict
from common.training.step import variable_shapes


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Work directory of the run.", required=True)
    flags.DEFINE_string("output", None, "Work directory to make.", required=True)
    flags.DEFINE_string("steps", None, "Checkpoints by step: 9000,10000,11000.")
    flags.DEFINE_string("epochs", None, "Checkpoints by epoch end: 9-13 or 9,11,13.")
    flags.DEFINE_integer(
        "recompute_batch_stats",
        0,
        "Training batches to measure the batch norms on; 0: average.",
        lower_bound=0,
    )
    config_flags.DEFINE_config_file("config", None, "To recompute batch norms; default: the run's.")


def main() -> None:
    workdir, output = epath.Path(flags.FLAGS.workdir), epath.Path(flags.FLAGS.output)
    if (flags.FLAGS.steps is None) == (flags.FLAGS.epochs is None):
        raise UserError("flags: expected exactly one of --steps and --epochs")
    if output.exists():
        raise UserError(f"--output={output}: exists already, expected a new directory")
    checkpoints = Checkpoints(workdir / "checkpoints")
    if flags.FLAGS.steps is not None:
        steps = parse_numbers("--steps", flags.FLAGS.steps)
    else:
        steps = steps_of_epochs(checkpoints, parse_numbers("--epochs", flags.FLAGS.epochs))

    num_batches, config = flags.FLAGS.recompute_batch_stats, flags.FLAGS.config
    if num_batches and config is None:
        raise UserError(f"--recompute_batch_stats: no {workdir}/config.json, expected --config")
    average = average_checkpoints(checkpoints, steps)
    extra = checkpoints.read_extra(steps[-1]) | {"averaged_steps": steps}
    if num_batches:
        average = with_recomputed_statistics(average, config, str(workdir), num_batches)
        extra["recomputed_on_batches"] = num_batches
    with atomic_folder(output) as folder:
        for name in ("config.json", "classes.csv", "hierarchy.json"):
            if (workdir / name).exists():
                (workdir / name).copy(folder / name)
        writer = Checkpoints(folder / "checkpoints")
        writer.save(steps[-1], {"step": np.int32(steps[-1]), **average}, extra, wait=True)
        writer.close()
    print(f"wrote {output}: mean of {len(steps)} checkpoints, as step {steps[-1]}")


def average_checkpoints(checkpoints: Checkpoints, steps: Sequence[int]) -> dict[str, Any]:
    """Mean of params and batch_stats, in float64, holding one checkpoint at a time.

    Returns:
      {'params': ..., 'batch_stats': ...} in the dtypes of the checkpoints (whole numbers are
      rounded).

    Raises:
      UserError: a step is missing, or checkpoints are of different models.
    """
    _refuse_missing(checkpoints, steps, {step: f"step {step}" for step in steps})
    total = shapes = None
    for step in steps:
        print(f"reading {checkpoints.directory / str(step)}", flush=True)
        variables, _ = checkpoints.restore_params(step, shapes)
        if total is None:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
            total = jax.tree.map(lambda x: np.zeros(x.shape, np.float64), variables)
        jax.tree.map(lambda t, x: np.add(t, x.astype(np.float64), out=t), total, variables)
        del variables

    def mean(sum_: np.ndarray, like: jax.ShapeDtypeStruct) -> np.ndarray:
        value = sum_ / len(steps)
        return (np.rint(value) if np.issubdtype(like.dtype, np.integer) else value).astype(
            like.dtype
        )

    return jax.tree.map(mean, total, shapes)


def with_recomputed_statistics(
    variables: dict[str, Any], config: ConfigDict, workdir: str, num_batches: int
) -> dict[str, Any]:
    """The same parameters with batch-norm statistics measured on training batches.

    Raises:
      UserError: the config is of another model, or one of `recompute_batch_stats`.
    """
    # TensorFlow, which feeds the batches, takes seconds to import: the plain mean goes without.
    from detection.batch_fields import init_shapes
    from detection.batch_statistics import recompute_batch_stats
    from detection.models.faster_rcnn import build
    from detection.settings import read_run

    settings = read_run(config)
    dataset = command.open_model_dataset(
        settings.data.directory, workdir, has_classes=not settings.model.refines
    )
    model = build(settings.model, dataset.num_classes, distributed.DATA_AXIS)
    _refuse_other_model(variable_shapes(model, init_shapes(settings.data)), variables)
    batch_stats = recompute_batch_stats(
        settings, model, variables, dataset, distributed.make_mesh(), num_batches
    )
    return {**variables, "batch_stats": batch_stats}


def _refuse_other_model(expected: dict[str, Any], found: dict[str, Any]) -> None:
    expected, found = flatten(to_nested_dict(expected)), flatten(found)
    for name in sorted(expected.keys() | found.keys()):
        ours, theirs = describe(expected.get(name)), describe(found.get(name))
        if ours != theirs:
            raise UserError(
                f"--config: another model than that of the checkpoints ({name}: checkpoint has "
                f"{theirs}, config has {ours})"
            )


def parse_numbers(flag: str, text: str) -> list[int]:
    """'9-11,13' -> [9, 10, 11, 13]; ascending, at least one, none twice.

    Raises:
      UserError: anything else.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise UserError(f"{flag}={text}: found {part!r}, expected numbers such as 9,10 or 9-13")
        first, last = int(match[1]), int(match[2] or match[1])
        numbers += range(first, last + 1)
    if not numbers or numbers != sorted(set(numbers)):
        raise UserError(f"{flag}={text}: expected ascending numbers, none twice")
    return numbers


def steps_of_epochs(checkpoints: Checkpoints, epochs: Sequence[int]) -> list[int]:
    """Steps of the checkpoints at the ends of epochs (counted from 1).

    Raises:
      UserError: the run recorded no `steps_per_epoch`, or kept no checkpoint of an epoch.
    """
    extra = checkpoints.read_extra()
    if "steps_per_epoch" not in extra:
        raise UserError(
            f"{checkpoints.directory}: checkpoints record no steps_per_epoch, use --steps"
        )
    steps = [epoch * int(extra["steps_per_epoch"]) for epoch in epochs]
    names = {s: f"epoch {e} (step {s})" for e, s in zip(epochs, steps, strict=True)}
    _refuse_missing(checkpoints, steps, names)
    return steps


def _refuse_missing(checkpoints: Checkpoints, steps: Sequence[int], names: dict[int, str]) -> None:
    known = checkpoints.all_steps()
    missing = [names[step] for step in steps if step not in known]
    if missing:
        raise UserError(
            f"{checkpoints.directory}: no checkpoint of {', '.join(missing)}; "
            f"found steps {', '.join(map(str, known)) or 'none'}"
        )


if __name__ == "__main__":
    define_flags()
    run_main(main)
