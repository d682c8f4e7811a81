"""Writes the detections of a trained detector on a split as a detections table.

    python -m detection.export --config=... --workdir=WORK --split=test --output=x.parquet

With several hosts the output is a folder of shards, one a host. Parent classes are added by
scripts.expand_detections: ensembles work on the classes themselves.

`--config.test_time.scales=600,800,1000` looks at each photo at several scales, and mirrored
(`detection.test_time`); with `--config.test_time.merge=tables` the
output is a folder of one table a view.
"""

from pathlib import Path

from absl import flags

from common.cli import run_main
from common.training import distributed
from detection import setup
from detection.evaluate import restore_variables
from detection.test_time import detect_split


def define_flags() -> None:
    flags.DEFINE_string("split", None, "Split to detect in; default: config.data.eval_split.")
    flags.DEFINE_string("output", None, "Parquet file to write (a folder with many hosts).")
    flags.DEFINE_integer("step", None, "Checkpoint to use; default: the newest.")


def main(_):
    config = flags.FLAGS.config
    distributed.initialize()
    mesh = distributed.make_mesh()
    dataset = setup.open_dataset(config)
    model = setup.build_model(config, dataset.num_classes)
    variables, step = restore_variables(config, model, flags.FLAGS.workdir, mesh, flags.FLAGS.step)
    split = flags.FLAGS.split or config.data.eval_split
    output = Path(flags.FLAGS.output)
    say = print if distributed.is_main_process() else lambda *_, **__: None
    detect_split(config, model, variables, dataset, split, mesh, output, step=step, say=say)
    say(f"wrote {output}: {len(dataset.split(split))} images, step {step}", flush=True)


if __name__ == "__main__":
    setup.define_flags()
    define_flags()
    flags.mark_flag_as_required("output")
    run_main(main)
