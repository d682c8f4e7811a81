"""Learns from a dataset which classes are seen together and inside one another.

    python -m scripts.mine_relations --dataset=DIR --split=train --output=relations.npz \\
        --picture=relations.svg

The output is what `ensemble.merge --config.relations.file=relations.npz` re-scores detections with:
counts, so that all thresholds are chosen there. The picture shows P(row | column) of the most
frequent classes; pairs above --tau_p have a frame.
"""

import numpy as np
from absl import flags

from common.data.dataset import DEPICTION, GROUP_OF, Dataset
from common.io.atomic import write_text
from common.io.commands import run_main
from common.report.plots import draw_matrix
from ensemble.relations.mining import mine_relations
from ensemble.relations.rules import RelationSettings

_IGNORED = {"group_of": GROUP_OF, "depiction": DEPICTION}


def define_flags() -> None:
    default = RelationSettings()
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("split", "train", "Split to learn from.")
    flags.DEFINE_string("output", None, "NPZ file to write.", required=True)
    flags.DEFINE_string("picture", None, "SVG file: co-occurrence of the most frequent classes.")
    flags.DEFINE_integer("picture_classes", 40, "Classes in the picture.", lower_bound=2)
    flags.DEFINE_float(
        "inside",
        default.inside,
        "Share of a box that must be covered to lie inside another.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    flags.DEFINE_multi_enum("ignore", [], list(_IGNORED), "Boxes to leave out.")
    flags.DEFINE_enum(
        "unverified",
        "auto",
        ["auto", "excluded", "absent"],
        "Images in which a class was not verified: not counted for it, or counted as without it; "
        "auto: absent if the dataset says that it is exhaustive.",
    )
    flags.DEFINE_integer("show", 10, "Pairs to print of each kind.")
    flags.DEFINE_float("tau_p", default.tau_p, "Least P(i|j) of a pair to frame and count.")
    flags.DEFINE_float("tau_q", default.tau_q, "Least share inside of a pair to count.")
    flags.DEFINE_integer("min_images", default.min_images, "Least images behind a P.")
    flags.DEFINE_integer("min_boxes", default.min_boxes, "Least boxes behind a share inside.")


def main():
    args = flags.FLAGS
    dataset = Dataset.open(args.dataset)
    exhaustive = {"auto": None, "excluded": False, "absent": True}[args.unverified]
    relations = mine_relations(
        dataset,
        args.split,
        inside=args.inside,
        ignore_flags=sum(_IGNORED[name] for name in set(args.ignore)),
        exhaustive=exhaustive,
    )
    relations.write(args.output)
    probability = relations.cooccurrence("j", args.min_images)
    containment = relations.containment(args.min_boxes)
    names = dataset.class_names
    for text, matrix, least, of, unit in (
        ("{} in images with {}", probability, args.tau_p, relations.images_known, "images"),
        ("{} inside {}", containment, args.tau_q, relations.boxes_known, "boxes"),
    ):
        count = int((matrix >= max(least, 1e-9)).sum())
        print(f"{count} pairs with at least {least:g}: " + text.format("one class", "another"))
        for place in _strongest(matrix, of, args.show):
            pair = text.format(*(names[index] for index in place))
            print(f"  {matrix[place]:.3f} of {of[place]} {unit}: {pair}")
    print(f"wrote {args.output}")
    if args.picture:
        frequent = np.argsort(-relations.images_present, kind="stable")[: args.picture_classes]
        shown = probability[np.ix_(frequent, frequent)]
        known = relations.images_known[np.ix_(frequent, frequent)] >= args.min_images
        known &= relations.images_absent[frequent, None] >= args.min_images
        labels = [f"{names[i]} ({relations.images_present[i]:,})" for i in frequent]
        title = "How often the row's class is in images with the column's class"
        frame = known & (shown >= args.tau_p)
        write_text(args.picture, draw_matrix(shown, labels, title, known=known, frame=frame))
        print(f"wrote {args.picture}")


def _strongest(matrix: np.ndarray, of: np.ndarray, count: int) -> list[tuple[int, int]]:
    """Places of the largest values, those with most support first among equals."""
    order = np.lexsort((-of.ravel(), -matrix.ravel()))[:count]
    places = [divmod(int(place), len(matrix)) for place in order]
    return [place for place in places if matrix[place] > 0]


if __name__ == "__main__":
    define_flags()
    run_main(main)
