"""How often each class comes in the batches of a config: what its sampler realises.

    python -m scripts.class_histogram --config=configs/detection/pod512_elaborate.py \\
        --config.data.dir=DIR --output=histogram.svg

Counts a number of steps (--steps; by default an epoch, at most 1,000) without reading photos: for
each class the slots drawn for it, the photos and boxes of it that they show, and in how many
batches none was drawn for it, beside its photos and boxes in the training set. The table goes to
the screen (the rarest and the most frequent classes that have photos) and whole to --csv; the
picture shows each class's share of the boxes in the training set and in the batches.
"""

import csv
import io

import numpy as np
from absl import flags

from common.data.plans.class_index import annotated_classes, annotated_images
from common.data.plans.plan import ClassHistogram, TrainPlan, class_histogram, train_plan
from common.io import run_flags
from common.io.atomic import write_text
from common.io.commands import run_main
from common.io.errors import UserError
from common.report.plots import COLOURS, svg_text
from common.training.command import open_dataset
from detection.settings import read_run

MAX_STEPS = 1000  # counted unless asked for
COLUMNS = ("label", "name", "set_images", "set_boxes", "drawn", "images", "boxes", "absent")


def training_set(plan: TrainPlan, chunk: int = 1 << 16) -> ClassHistogram:
    """The photos and boxes of each class in the training photos of all sources; drawn is 0."""
    count = plan.sources[0].num_classes
    found = ClassHistogram(*(np.zeros(count, np.int64) for _ in range(4)))
    for source in plan.sources:
        for _, _, classes in annotated_images(source, chunk=chunk):
            found.images[:] += np.bincount(classes, minlength=count)
    for source in plan.box_sources:
        for first in range(0, len(source.images), chunk):
            _, classes = annotated_classes(source, source.images[first : first + chunk])
            found.boxes[:] += np.bincount(classes, minlength=count)
    return found


def rows(
    labels: list[str], names: list[str], there: ClassHistogram, found: ClassHistogram
) -> list[tuple]:
    """Those of COLUMNS, the class of fewest photos in the set first."""
    order = np.lexsort((there.boxes, there.images)).tolist()
    columns = (there.images, there.boxes, found.drawn, found.images, found.boxes, found.absent)
    return [(labels[i], names[i], *(int(column[i]) for column in columns)) for i in order]


def picture(table: list[tuple], title: str) -> str:
    """Share of each class of the boxes, in the training set and in the batches, as SVG."""
    from matplotlib.figure import Figure

    counts = np.array([row[2:] for row in table], np.float64)
    figure = Figure((8, 3.6), layout="constrained")
    axes = figure.subplots()
    for column, name, colour in ((1, "training set", COLOURS[0]), (4, "batches", COLOURS[1])):
        share = counts[:, column] / max(counts[:, column].sum(), 1)
        axes.plot(np.where(share > 0, share, np.nan), ".", ms=3, color=colour, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("classes, from the fewest to the most photos")
    axes.set_ylabel("share of the boxes")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    return svg_text(figure)


def text(table: list[tuple], ends: int) -> str:
    """The table for the screen: of the classes with photos `ends` rows from each end."""
    table = [row for row in table if row[2]]
    shown = table if len(table) <= 2 * ends else [*table[:ends], None, *table[-ends:]]
    heads = ("class", *COLUMNS[2:])
    lines = [f"{heads[0]:28}" + "".join(f"{head:>12}" for head in heads[1:])]
    for row in shown:
        cells = "..." if row is None else "".join(f"{value:12,}" for value in row[2:])
        lines.append(cells if row is None else f"{row[1][:27]:28}{cells}")
    return "\n".join(lines)


def define_flags() -> None:
    run_flags.define_flags(config_required=False, workdir_required=False)
    flags.DEFINE_integer(
        "steps", 0, f"Steps counted; 0: an epoch, at most {MAX_STEPS}.", lower_bound=0
    )
    flags.DEFINE_integer("start_step", 0, "The first of them.", lower_bound=0)
    flags.DEFINE_integer("rows", 10, "Rarest and most frequent classes on the screen.", 1)
    flags.DEFINE_string("csv", "", "File to write the whole table to.")
    flags.DEFINE_string("output", "", "SVG file to write the picture to.")


def main() -> None:
    values = flags.FLAGS
    if values.config is None:
        raise UserError("--config: missing, expected the config of a detector (or --workdir)")
    settings = read_run(values.config)
    dataset = open_dataset(settings.data.directory)
    plan = train_plan(dataset, settings.data, settings.seed)
    steps = values.steps or min(plan.steps_per_epoch, MAX_STEPS)
    found = class_histogram(plan, range(values.start_step, values.start_step + steps))
    table = rows(dataset.class_labels, dataset.class_names, training_set(plan), found)
    title = f"{settings.name}: {settings.data.sampler}, {steps} batches of {plan.batch_size}"
    print(f"{title}\n{text(table, values.rows)}")
    drawable = np.array([row[2] > 0 for row in table])
    absent = np.array([row[-1] for row in table])[drawable]
    drawn = "drawn for" if found.drawn.any() else "on a photo"
    print(
        f"{np.count_nonzero(drawable)} of {len(table)} classes have photos; "
        f"{np.count_nonzero(absent == 0)} of them were {drawn} in every batch, "
        f"{np.count_nonzero(absent == steps)} in none"
    )
    if values.csv:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([COLUMNS, *table])
        write_text(values.csv, buffer.getvalue())
        print(f"wrote {values.csv}")
    if values.output:
        write_text(values.output, picture(table, title))
        print(f"wrote {values.output}")


if __name__ == "__main__":
    define_flags()
    run_main(main)
