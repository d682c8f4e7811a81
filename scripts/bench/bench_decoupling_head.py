"""What the Decoupling Head adds to the training step and to inference of R50-FPN, on the CPU.

    python -m scripts.bench.bench_decoupling_head

Settings as in scripts.bench.bench_train_step: batch 2 at 512x512, float32, 501-way heads, 512 RoIs
an image. Both detectors run in one process and take turns. Prints the medians and their ratio.
"""

import numpy as np
from absl import flags

from common.io.commands import run_main
from scripts.bench.bench_train_step import TASKS, example, our_calls
from scripts.bench.timing import time_in_turns

HEADS = ("two_fc", "decoupling")


def define_flags() -> None:
    flags.DEFINE_integer("rounds", 7, "Turns of each head.")
    flags.DEFINE_integer("size", 512, "Side of the images, pixels.")
    flags.DEFINE_integer("batch", 2, "Images per step.")
    flags.DEFINE_integer("classes", 500, "Classes without background.")


def main() -> None:
    values = flags.FLAGS
    data = example(values.batch, values.size, values.classes)
    calls = [our_calls(data, values.classes, head) for head in HEADS]
    for task in TASKS:
        for call in calls:  # compiles, and fills caches
            call[task]()
            call[task]()
        plain, decoupled = time_in_turns([call[task] for call in calls], values.rounds)
        print(
            f"{task}: sibling head {np.median(plain):.3f} s, Decoupling Head "
            f"{np.median(decoupled):.3f} s, ratio {np.median(decoupled / plain):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    define_flags()
    run_main(main)
