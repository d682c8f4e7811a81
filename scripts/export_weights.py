"""Writes the weights of a checkpoint, with the labels of its classes, as one file.

    python -m scripts.export_weights --workdir=RUN --output=detector.safetensors
    python -m scripts.export_weights --workdir=RUN --step=90000 --output=gs://bucket/x.safetensors

The file is what `detection.train --config.init_from=FILE` starts from, and what
`detection.load(FILE)` and `detection.predict --workdir=FILE` run: it has the config, too. Without
the optimiser's state it is half as large as the checkpoint.
"""

import dataclasses

from absl import flags

from common.io.commands import run_main
from common.io.errors import UserError
from common.nn.weights.fine_tuning import save_trained_model
from common.training.workdir import read_config
from detection.fine_tuning import trained_in


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Work directory of the run.", required=True)
    flags.DEFINE_string("output", None, "File to write, .safetensors.", required=True)
    flags.DEFINE_integer("step", None, "Checkpoint; the newest if not given.")


def main() -> None:
    output = flags.FLAGS.output
    if not output.endswith(".safetensors"):
        raise UserError(f"--output={output}: expected a name that ends with .safetensors")
    workdir = flags.FLAGS.workdir
    model = trained_in(workdir, flags.FLAGS.step)
    model = dataclasses.replace(model, config=read_config(workdir))
    save_trained_model(output, model)
    size = sum(value.size for value in model.weights.values())
    print(f"wrote {size:,} values and {len(model.labels)} classes to {output}")


if __name__ == "__main__":
    define_flags()
    run_main(main)
