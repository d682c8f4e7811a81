"""Prepares an expert: picks its classes and images, writes its dataset and its config.

    python -m scripts.select_experts --dataset=DIR --metrics=metrics.json --num_classes=10 \\
        --workdir=RUN --detections=validation.parquet --confusion_split=validation \\
        --base_config=configs/detection/r50.py --output=EXPERT
    python -m detection.train --config=EXPERT/config.py --config.init_from=RUN --workdir=EXPERT_RUN

C_pos are the classes of lowest AP (or those of --classes). C_neg are classes that a detector takes
for them, by up to three views: siblings in the hierarchy, the confusion matrix of a detections
table, and the cosine of the angle between the classifier's weight vectors. A view is used when its
input is given, unless --views leaves it out.

The output is a dataset directory with the classes C_pos only: the objects of C_neg are background,
those of ancestors and descendants of C_pos, which may be of C_pos, are ignored.
It also holds config.py, which trains on images of C_pos (drawn by class) and background images
mixed 1:3, and expert.json, which tells why each class and how many images were taken.
`ensemble.merge --config.experts=NAME=EXPERT/classes.csv` then lets the model speak for its classes.
"""

from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from common.data.dataset import Dataset, check_output
from common.data.plans.class_index import images_by_class
from common.data.sources import single_source
from common.data.subset import write_subset
from common.io.commands import run_main
from common.io.errors import UserError
from common.metrics.confusion import confusion_matrix
from detection.experts import selection
from ensemble.class_weights import read_class_aps

VIEWS = ("hierarchy", "confusion", "weights")


def define_flags() -> None:
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("split", "train", "Split to take training images from.")
    flags.DEFINE_list("eval_splits", ["validation"], "Splits to keep whole, to score the expert.")
    flags.DEFINE_string("metrics", None, "JSON with AP per class: scripts.score --json.")
    flags.DEFINE_integer("num_classes", 10, "How many classes of lowest AP.", lower_bound=1)
    flags.DEFINE_list("classes", [], "Labels of C_pos, instead of --metrics.")
    flags.DEFINE_multi_enum("views", list(VIEWS), list(VIEWS), "Views to use, repeatable.")
    flags.DEFINE_string("detections", None, "Detections table for the confusion view.")
    flags.DEFINE_string("confusion_split", "validation", "Split that the table is about.")
    flags.DEFINE_float("min_score", 0.1, "Detections below do not count as confusions.")
    flags.DEFINE_float("min_confusion", 0.1, "Least share of confused detections of a pair.")
    flags.DEFINE_string(
        "workdir", None, "Run (or .safetensors file) whose classifier the weights view looks at."
    )
    flags.DEFINE_integer("step", None, "Checkpoint of --workdir; default: the newest.")
    flags.DEFINE_string(
        "classifier", None, "End of the path of the class weights, if not the usual."
    )
    flags.DEFINE_float("min_cosine", 0.25, "Pairs with a larger cosine are confusable.")
    flags.DEFINE_bool(
        "require_verified",
        False,
        "Only take background images in which the confusable classes of C_pos were verified to be "
        "absent, not only those in which nothing speaks for their presence.",
    )
    flags.DEFINE_float("positive_share", 0.25, "Share of images with C_pos in a batch.")
    flags.DEFINE_string(
        "base_config", "configs/detection/r50.py", "Config that the expert's is made of, [:ARG]."
    )
    flags.DEFINE_string("output", None, "Dataset directory to write.", required=True)
    flags.DEFINE_bool("overwrite", False, "Replace an existing dataset directory.")


def main():
    args = flags.FLAGS
    output = Path(args.output).absolute()
    check_output(output, args.overwrite)
    module, base_arg = base_config_module(args.base_config)
    dataset = Dataset.open(args.dataset)
    images = np.asarray(dataset.split(args.split), np.int64)
    splits = {name: dataset.split(name) for name in args.eval_splits}
    if args.split in splits:
        raise UserError(f"--eval_splits: {args.split} is the training split")
    with_box = np.zeros(dataset.num_classes, np.int64)
    boxed, by_class = images_by_class(single_source(dataset, images))
    with_box[boxed] = np.diff(by_class.offsets)

    # ---------------------------------------------------------------- C_pos
    aps = read_class_aps(args.metrics) if args.metrics else {}
    positive = positive_classes(dataset, args, aps, with_box)
    print(f"C_pos: {len(positive)} of {dataset.num_classes} classes", flush=True)

    # ---------------------------------------------------------------- C_neg
    confusable, found_by = {}, {}
    for view, (strength, least) in similarities(dataset, args, positive).items():
        # Classes without training images give no background images.
        pairs = selection.negative_classes(dataset, positive, (strength > least) & (with_box > 0))
        confusable[view] = pairs
        for c in np.flatnonzero(pairs.any(axis=0)):
            found_by.setdefault(int(c), {})[view] = round(float(strength[pairs[:, c], c].max()), 4)
        images_of_view = int(with_box[pairs.any(axis=0)].sum())
        print(
            f"view {view:<10} {pairs.any(axis=0).sum():4d} classes in C_neg, "
            f"{images_of_view} images (an image once per class)",
            flush=True,
        )
    if not confusable:
        raise UserError(
            "no view has its input: give --workdir (weights), --detections (confusion), or a "
            "dataset with a hierarchy, and do not leave the view out of --views"
        )
    pairs = np.logical_or.reduce(list(confusable.values()))

    # ---------------------------------------------------------------- images
    chosen = selection.select_images(
        dataset, images, positive, pairs, require_verified=args.require_verified
    )
    ratio = len(chosen.negative) / max(len(chosen.positive), 1)
    print(f"images of C_pos {len(chosen.positive)}, background images {len(chosen.negative)}")
    print(f"pos:neg = 1:{ratio:.2f} (the sampler mixes 1:{1 / args.positive_share - 1:g})")
    for reason, count in chosen.dropped.items():
        print(f"  not used, {reason}: {count} images")
    if not len(chosen.negative):
        raise UserError(
            "no background images: lower --min_cosine or --min_confusion, or use more views"
        )

    # ---------------------------------------------------------------- output
    report = {
        "positive": [_describe(dataset, c, with_box, aps) for c in positive],
        "negative": [
            {**_describe(dataset, c, with_box, aps), "views": found_by[c]}
            for c in sorted(found_by, key=lambda c: (-with_box[c], c))
        ],
        "positive_images": len(chosen.positive),
        "negative_images": len(chosen.negative),
        "images_not_used": chosen.dropped,
        "flags": {name: args[name].value for name in _RECORDED},
    }
    fields = {
        "name": output.name,
        "data.dir": str(output),
        "data.train_split": args.split,
        **({"data.eval_split": args.eval_splits[0]} if args.eval_splits else {}),
        "data.sources": (),
        "data.label_steps.share": 0.0,
        "data.pools": "",
        "data.sampler": "expert",
        "data.positive_share": args.positive_share,
        "model.weak.kind": "none",
        "model.drop_background_rois": True,
    }
    doc = f"Expert for {len(positive)} classes, written by scripts.select_experts."
    config = selection.config_text(module, base_arg, fields, doc)

    def finish(writer) -> None:
        writer.write_json("expert.json", report)
        (writer.temporary / "config.py").write_text(config, encoding="utf-8")

    train = np.sort(np.concatenate([chosen.positive, chosen.negative]))
    splits = {args.split: train, f"{args.split}_positive": np.sort(chosen.positive), **splits}
    write_subset(
        dataset,
        output,
        output.name,
        positive,
        splits,
        ignored=selection.relatives(dataset, positive),
        overwrite=args.overwrite,
        finish=finish,
    )
    print_classes(report)
    print(f"wrote {output}; train it:")
    start = ""  # from the model that is looked at, where the output is of its architecture
    if args.workdir and Path(args.workdir).is_dir():
        start = f" --config.init_from={args.workdir}"
    print(f"python -m detection.train --config={output / 'config.py'}{start} --workdir=DIR")


_RECORDED = (
    "dataset", "split", "metrics", "views", "detections", "confusion_split", "min_score",
    "min_confusion", "workdir", "step", "min_cosine", "require_verified",
)  # fmt: skip


def base_config_module(text: str) -> tuple[str, str | None]:
    """Module name and argument of configs/detection/NAME.py[:ARG]."""
    path, _, arg = text.partition(":")
    parts = Path(path).with_suffix("").parts
    root = Path(__file__).parents[1]
    if len(parts) < 2 or not root.joinpath(*parts).with_suffix(".py").is_file():
        raise UserError(f"--base_config={text}: no such file, expected configs/detection/NAME.py")
    return ".".join(parts), arg or None


def positive_classes(dataset: Dataset, args: Any, aps, with_box) -> np.ndarray:
    """Indices of C_pos, ascending."""
    if args.classes:
        index = {label: i for i, label in enumerate(dataset.class_labels)}
        for label in args.classes:
            if label not in index:
                raise UserError(f"--classes: {label!r} is no class of {dataset.directory}")
            if not with_box[index[label]]:
                raise UserError(f"--classes: {label!r} has no box in split {args.split!r}")
        return np.unique([index[label] for label in args.classes])
    if not args.metrics:
        raise UserError("expected --metrics=FILE (classes of lowest AP) or --classes=LABELS")
    if not aps.keys() & set(dataset.class_labels):
        raise UserError(
            f"{args.metrics}: AP of classes such as {next(iter(aps))!r}, none is in "
            f"{dataset.directory}"
        )
    return selection.lowest_classes(aps, dataset.class_labels, with_box, args.num_classes)


def similarities(dataset: Dataset, args: Any, positive) -> dict[str, tuple[np.ndarray, float]]:
    """(P, K) similarity of each view that has its input, and the threshold to exceed."""
    views = {}
    if "hierarchy" in args.views:
        views["hierarchy"] = (selection.sibling_classes(dataset, positive), 0.5)
    if "confusion" in args.views and args.detections:
        counts = confusion_matrix(
            dataset,
            args.confusion_split,
            args.detections,
            min_score=args.min_score,
            allow_partial=True,
        )
        views["confusion"] = (selection.confused_classes(counts, positive), args.min_confusion)
    if "weights" in args.views and args.workdir:
        weights = selection.read_classifier(
            args.workdir,
            dataset.class_labels,
            step=args.step,
            name=args.classifier or selection.CLASSIFIER,
        )
        views["weights"] = (selection.cosine_similarity(weights, positive), args.min_cosine)
    return views


def _describe(dataset: Dataset, index: int, with_box, aps) -> dict[str, Any]:
    label = dataset.class_labels[index]
    return {
        "label": label,
        "name": dataset.class_names[index],
        "ap": aps.get(label),
        "images": int(with_box[index]),
    }


def print_classes(report: dict[str, Any]) -> None:
    """The first classes of both kinds."""
    for title, key in (("C_pos", "positive"), ("C_neg", "negative")):
        print(f"{title}: {len(report[key])} classes")
        for row in report[key][:20]:
            ap = "   -  " if row["ap"] is None else f"{row['ap']:6.4f}"
            views = " ".join(f"{k} {v:.2f}" for k, v in row.get("views", {}).items())
            print(f"  {row['name'][:30]:<30} AP {ap}  {row['images']:7d} images  {views}")
        if len(report[key]) > 20:
            print(f"  and {len(report[key]) - 20} more, see expert.json")


if __name__ == "__main__":
    define_flags()
    run_main(main)
