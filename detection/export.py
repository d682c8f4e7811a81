"""Writes the detections of a trained detector on a split as a detections table.

    python -m detection.export --workdir=WORK --split=test --output=x.parquet

The config is that of the run; `--config.FIELD=VALUE` overrides it (such as data.dir, the photos),
--config=FILE replaces it. Labels are those of the run's classes.
With several hosts the output is a folder of shards, one a host. Parent classes are added by
scripts.expand_detections: ensembles work on the classes themselves.

A config that refines boxes (configs/detection/r50_refine.py) takes the boxes of a table instead of
a split, and writes the same rows with better boxes:

    python -m detection.export --workdir=WORK --proposals=x.parquet --output=y.parquet

A detector with a mask head takes such a table, too, and writes the same rows with masks, whatever
found their boxes (`detection.outline`), also of several views.

With `--mined` a model with a weak head writes the boxes that it mines for the classes that are
known to be on each photo (docs/guides/weak.md).

`--config.test_time.scales=600,800,1000` looks at each photo at several scales, and mirrored
(`detection.tta.test_time`); with `--config.test_time.merge=tables` the
output is a folder of one table a view.
"""

import functools
from typing import Any

from absl import flags

from common.io import run_flags
from common.io.commands import run_main
from common.io.errors import UserError
from common.metrics.readiness import evaluation_split
from common.tables.hierarchy import ancestor_lists
from common.training import command
from common.training.distributed import DATA_AXIS
from common.training.restore import restore_variables
from common.training.step import variable_shapes
from common.training.watchdog import StallWatchdog
from detection.batch_fields import init_shapes
from detection.inference import predict_split
from detection.models.box_refiner import BoxRefiner
from detection.models.faster_rcnn import build
from detection.outline import outline_table
from detection.refine import refine_table
from detection.settings import RunSettings, read_run
from detection.tta.test_time import detect_split


def define_flags() -> None:
    flags.DEFINE_string("split", None, "Split to detect in; default: config.data.eval_split.")
    flags.DEFINE_string(
        "proposals", None, "Detections table whose boxes are to be refined or outlined."
    )
    flags.DEFINE_bool("mined", False, "Boxes that a weak head mines for the labels of the photos.")
    flags.DEFINE_string("output", None, "Parquet file to write (a folder with many hosts).")
    flags.DEFINE_integer("step", None, "Checkpoint to use; default: the newest.")
    flags.DEFINE_bool(
        "other_classes", False, "The dataset has classes that the model lacks: take its photos."
    )


def main() -> None:
    mesh, say = command.start()
    workdir, table, split = flags.FLAGS.workdir, flags.FLAGS.proposals, flags.FLAGS.split
    settings = command.read_trained(read_run, flags.FLAGS.config, workdir, say)
    check_flags(settings, table, split, flags.FLAGS.mined)
    dataset = command.open_model_dataset(
        settings.data.directory,
        workdir,
        has_classes=not settings.model.refines,
        photos_only=flags.FLAGS.other_classes,
    )
    if not table:
        split = evaluation_split(dataset, split or settings.data.eval_split, say)
    ancestors = None
    if flags.FLAGS.mined:
        ancestors = ancestor_lists(dataset.hierarchy, dataset.class_labels)
    model = build(settings.model, dataset.num_classes, DATA_AXIS, ancestors=ancestors)
    shapes = variable_shapes(model, init_shapes(settings.data))
    output = flags.FLAGS.output
    write: Any  # takes the kind of model that its branch is for
    if isinstance(model, BoxRefiner):
        write, what, written = refine_table, table, f"the rows of {table}"
    elif table:
        write, what, written = outline_table, table, f"the rows of {table} with masks"
    elif flags.FLAGS.mined:
        write, what = functools.partial(predict_split, mined=True), split
        written = f"mined boxes of {len(dataset.split(split))} images"
    else:
        write, what, written = detect_split, split, f"{len(dataset.split(split))} images"
    with StallWatchdog.of(settings.log):
        variables, step = restore_variables(workdir, shapes, mesh, flags.FLAGS.step)
        common = (settings, model, variables, dataset, what, mesh, output)
        write(*common, step=step, say=say)
    say(f"wrote {output}: {written}, step {step}", flush=True)


def check_flags(
    settings: RunSettings, table: str | None, split: str | None, mined: bool = False
) -> None:
    """Refiners need a table, detectors with a mask head may have one; others may mine.

    Raises:
      UserError: otherwise, or a split beside the table.
    """
    if mined and (table or not settings.model.weak.is_on):
        raise UserError(
            f"--mined: {settings.name} mines no boxes, expected a config with model.weak.kind "
            "'wsddn', and no --proposals"
        )
    if settings.model.refines and not table:
        raise UserError(f"--proposals: missing, {settings.name} refines the boxes of a table")
    if table and not (settings.model.refines or settings.model.has_masks):
        raise UserError(
            f"--proposals: {settings.name} finds boxes by itself, expected a config with "
            "model.box_head.kind 'regressor' or with a mask head"
        )
    if table and settings.test_time.is_on and settings.test_time.merge == "tables":
        raise UserError("config.test_time.merge: found 'tables' with --proposals, expected 'mean'")
    if table and split:
        raise UserError("--split: found with --proposals, which says itself what images it covers")


if __name__ == "__main__":
    run_flags.define_flags(config_required=False)
    define_flags()
    flags.mark_flag_as_required("output")
    run_main(main)
