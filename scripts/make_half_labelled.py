"""Takes the boxes of some training photos away: they keep image-level labels.

    python -m scripts.make_half_labelled --dataset=DIR --output=HALF [--share=0.5] [--seed=0]
        [--split=train] [--[no]absent]

writes DIR again with two more splits: `boxes`, photos whose boxes are used, and `labels`, photos of
which only image-level labels are, in a run with

    config.data.sources = (dict(split="boxes"), dict(split="labels", annotations="labels"))

Each class that a photo has a box of becomes a label "present" beside the labels that it has; of a
set that is annotated exhaustively, such as COCO, each other class becomes "absent". Photos
that have labels and no boxes are in `labels` anyway; with --share=1 these are all of it. The same
directory, share and seed give the same splits. scripts.bench.ablate_detection compares what a
detector learns of such a set with and without its image-level labels, and with all boxes.
"""

from absl import flags

from common.data.dataset import Dataset
from common.data.half_labelled import divide, write_half_labelled
from common.io.commands import run_main


def define_flags() -> None:
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("output", None, "Dataset directory to write.", required=True)
    flags.DEFINE_string("split", "train", "Training photos.")
    flags.DEFINE_float(
        "share", 0.5, "Of the photos with boxes, that keep them.", lower_bound=0.0, upper_bound=1.0
    )
    flags.DEFINE_integer("seed", 0, "Another one keeps other photos.", lower_bound=0)
    flags.DEFINE_bool(
        "absent",
        None,
        "Classes without a box are labelled absent. Default: if the dataset says that it is "
        "exhaustive.",
    )


def main() -> None:
    args = flags.FLAGS
    dataset = Dataset.open(args.dataset)
    halves = divide(dataset, args.split, args.share, args.seed)
    absent = bool(dataset.meta.get("exhaustive")) if args.absent is None else args.absent
    write_half_labelled(dataset, args.output, args.split, halves, absent=absent)
    print(f"{args.output}: {len(halves.boxes)} photos with boxes, {len(halves.labels)} with labels")


if __name__ == "__main__":
    define_flags()
    run_main(main)
