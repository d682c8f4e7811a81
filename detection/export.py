"""Writes the detections of a trained detector on a split as a detections table.

    python -m detection.export --config=... --workdir=WORK --split=test --output=x.parquet

With several hosts the output is a folder of shards, one a host. Parent classes are added by
scripts.expand_detections: ensembles work on the classes themselves.

A config that refines boxes (configs/detection/r50_refine.py) takes the boxes of a table instead of
a split, and writes the same rows with better boxes:

    python -m detection.export --config=... --workdir=WORK --proposals=x.parquet --output=y.parquet

`--config.test_time.scales=600,800,1000` looks at each photo at several scales, and mirrored
(`detection.tta.test_time`); with `--config.test_time.merge=tables` the
output is a folder of one table a view.
"""

from pathlib import Path

from absl import flags

from common.io.commands import run_main
from common.io.errors import UserError
from common.training import command, distributed
from detection import setup
from detection.evaluate import restore_variables
from detection.refine import refine_table
from detection.tta.test_time import detect_split


def define_flags() -> None:
    flags.DEFINE_string("split", None, "Split to detect in; default: config.data.eval_split.")
    flags.DEFINE_string("proposals", None, "Detections table whose boxes are to be refined.")
    flags.DEFINE_string("output", None, "Parquet file to write (a folder with many hosts).")
    flags.DEFINE_integer("step", None, "Checkpoint to use; default: the newest.")


def main():
    config, table = flags.FLAGS.config, flags.FLAGS.proposals
    if setup.refines(config) and not table:
        raise UserError(f"--proposals: missing, {config.name} refines the boxes of a table")
    if table and not setup.refines(config):
        raise UserError(
            f"--proposals: {config.name} finds boxes by itself, expected a config with "
            "model.box_head.kind 'regressor'"
        )
    if table and flags.FLAGS.split:
        raise UserError("--split: found with --proposals, which says itself what images it covers")
    distributed.initialize()
    mesh = distributed.make_mesh()
    dataset = command.open_dataset(config)
    model = setup.build_model(config, dataset.num_classes)
    variables, step = restore_variables(config, model, flags.FLAGS.workdir, mesh, flags.FLAGS.step)
    output = Path(flags.FLAGS.output)
    say = print if distributed.is_main_process() else lambda *_, **__: None
    common = (config, model, variables, dataset)
    if table:
        refine_table(*common, Path(table), mesh, output, step=step, say=say)
        say(f"wrote {output}: the rows of {table}, step {step}", flush=True)
        return
    split = flags.FLAGS.split or config.data.eval_split
    detect_split(*common, split, mesh, output, step=step, say=say)
    say(f"wrote {output}: {len(dataset.split(split))} images, step {step}", flush=True)


if __name__ == "__main__":
    command.define_flags()
    define_flags()
    flags.mark_flag_as_required("output")
    run_main(main)
