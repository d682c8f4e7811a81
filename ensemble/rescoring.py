"""The re-scoring (RS) ensemble of LVIS: scores of rare and common classes are raised.

The metric keeps the 300 best detections of an image over all classes, so rare classes, whose scores
are low, lose theirs to frequent ones. AP itself is a matter of each class alone. So the factors act
before that cut and only there: they are divided by the largest, which changes no ranking.

    python -m ensemble.rescoring --detections=merged_uncut.parquet --dataset=DIR --split=val_a \\
        --groups=lvis_v0.5_train.json --metric=lvis --output=rs.json

searches the factors on a validation split (merge it with --config.max_detections=0, so that the
rows that a cut would take away are there) and prints the flags for ensemble.merge.

Shape legend: n rows, K classes.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Float, Float32, Int, Int8

from common.data.dataset import Dataset
from common.io.atomic import write_json
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.json_file import read_json
from common.io.json_stream import stream_lists
from common.io.paths import PathLike, local_copy
from common.metrics import coco, lvis, openimages
from common.tables import Detections, read_detections
from common.tables.table import rank_in_image

RARE, COMMON, FREQUENT = range(3)
GROUPS = ("rare", "common", "frequent")
MODES = ("multiplier", "exponent")
# Training images of a rare and of a common class, at most (LVIS v0.5 and v1).
_RARE_IMAGES, _COMMON_IMAGES = 10, 100


@dataclasses.dataclass(frozen=True)
class Rescoring:
    """Groups of the classes and what is done to their scores.

    Attributes:
      groups: (K,) RARE, COMMON or FREQUENT.
      mode: "multiplier": s * alpha; "exponent": s ** (1 / beta).
      values: alpha or beta of rare, common and frequent classes, positive.
    """

    groups: Int8[np.ndarray, " K"]
    mode: str
    values: tuple[float, float, float]

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(
                f"config.rescoring.mode: found {self.mode!r}, expected one of {', '.join(MODES)}"
            )
        for name, value in zip(GROUPS, self.values, strict=True):
            if not 0 < value < np.inf:
                raise UserError(f"config.rescoring.{name}: found {value}, expected more than 0")

    def apply(
        self, classes: Int[np.ndarray, " n"], scores: Float32[np.ndarray, " n"]
    ) -> Float32[np.ndarray, " n"]:
        """New scores; the ranking within each class stays."""
        values = np.array(self.values)
        if self.mode == "multiplier":
            factors = (values / values.max()).astype(np.float32)
            return scores * factors[self.groups[classes]]
        return scores ** (1 / values).astype(np.float32)[self.groups[classes]]


def read_groups(path: str | os.PathLike, labels: Sequence[str]) -> Int8[np.ndarray, " K"]:
    """Frequency group of each class; classes that the source does not know count as frequent.

    Args:
      path: LVIS annotation file (`categories` with `name` and `frequency` r, c or f), a JSON object
        {label: "r" | "c" | "f"}, or a dataset directory. One that does not know its frequencies (as
        those of `scripts.prepare_data lvis` do) has the images of its split "train" (of all, when
        it has none) that show a class counted: up to 10 rare, up to 100 common.
      labels: of the classes.

    Raises:
      UserError: an unreadable file, a wrong frequency, or no class in common.
    """
    if Path(path).is_dir():
        dataset = Dataset.open(path)
        frequency = dataset.meta.get("frequency")
        if frequency:
            known = _from_letters(dict(zip(dataset.class_labels, frequency, strict=True)), path)
        else:
            known = _counted_groups(dataset)
    else:
        known = _listed_groups(path)
    if not known.keys() & set(labels):
        theirs = next(iter(known), "nothing")
        raise UserError(
            f"{path}: knows none of the {len(labels)} classes (such as {labels[0]!r} here, "
            f"{theirs!r} there), expected frequencies of these classes"
        )
    return np.array([known.get(label, FREQUENT) for label in labels], np.int8)


def _counted_groups(dataset: Dataset) -> dict[str, int]:
    images = np.arange(dataset.num_images)
    if "train" in dataset.splits:
        images = dataset.split("train")
    chosen = np.zeros(dataset.num_images, bool)
    chosen[images] = True
    owner = np.repeat(np.arange(dataset.num_images), np.diff(dataset.box_offsets))
    pairs = np.unique(owner * dataset.num_classes + np.asarray(dataset.box_classes))
    pairs = pairs[chosen[pairs // dataset.num_classes]]
    counts = np.bincount(pairs % dataset.num_classes, minlength=dataset.num_classes)
    groups = np.digitize(counts, [_RARE_IMAGES, _COMMON_IMAGES], right=True)
    return dict(zip(dataset.class_labels, groups.tolist(), strict=True))


def _listed_groups(path: PathLike) -> dict[str, int]:
    with local_copy(path) as local:
        categories = [c for _, c in stream_lists(local, ("categories",), optional=("categories",))]
        if categories:
            named = [c for c in categories if isinstance(c, dict)]
            return _from_letters({str(c.get("name")): c.get("frequency") for c in named}, path)
        return _from_letters(read_json(local), path)


def _from_letters(frequencies: Mapping[str, Any], path: str | os.PathLike) -> dict[str, int]:
    letters = {"r": RARE, "c": COMMON, "f": FREQUENT}
    if not isinstance(frequencies, Mapping):
        raise UserError(f"{path}: expected an object of label: frequency")
    for label, letter in frequencies.items():
        if not isinstance(letter, str) or letter not in letters:
            raise UserError(
                f"{path}: class {label!r} has frequency {letter!r:.80}, expected r, c or f"
            )
    return {label: letters[letter] for label, letter in frequencies.items()}


def best_rows(
    images: Int[np.ndarray, " n"], scores: Float[np.ndarray, " n"], limit: int
) -> Int[np.ndarray, " m"]:
    """Rows by image, then falling score (ties in given order); of each image the first `limit`.

    A limit of 0 keeps all.
    """
    order = np.lexsort((-scores, images))
    return order[rank_in_image(images[order]) < limit] if limit else order


def search(
    detections: Detections,
    groups: Int8[np.ndarray, " K"],
    evaluate: Callable[[Detections], float],
    *,
    mode: str = "multiplier",
    values: Sequence[float] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    max_detections: int = 300,
    say: Callable = print,
) -> list[dict[str, Any]]:
    """Tries all pairs frequent = 1 <= common <= rare out of `values`, best first.

    Args:
      detections: uncut rows of a validation split; labels as in `groups`.
      groups: of the classes.
      evaluate: figure of re-scored and cut detections that shall be large.
      mode: of `Rescoring`.
      values: to choose from; 1 is always among them.
      max_detections: of an image, that the metric looks at.
      say: where progress lines go.

    Returns:
      {"rare", "common", "frequent", "value"} of all pairs; of equal ones the mildest first.
    """
    choices = sorted({1.0, *map(float, values)})
    pairs = list(itertools.combinations_with_replacement(choices, 2))
    tried = []
    for number, (common, rare) in enumerate(pairs, start=1):
        rescoring = Rescoring(groups, mode, (rare, common, 1.0))
        scores = rescoring.apply(detections.label_index, detections.scores)
        rows = best_rows(detections.image_index, scores, max_detections)
        cut = dataclasses.replace(detections.take(rows), scores=scores[rows])
        value = float(evaluate(cut))
        tried.append(dict(rare=rare, common=common, frequent=1.0, value=value))
        say(f"{number}/{len(pairs)}  rare {rare:g}  common {common:g}  {value:.5f}", flush=True)
    return sorted(tried, key=lambda trial: -trial["value"])


def evaluator(
    metric: str, dataset: Dataset, split: str, allow_partial: bool = False
) -> Callable[[Detections], float]:
    """Headline figure of detections by a metric's name."""

    def quiet(*_, **__):
        """Notes on coverage, the same for every candidate."""

    options: dict[str, Any] = dict(allow_partial=allow_partial, say=quiet)
    if metric == "openimages":
        name = openimages.MEAN_AP.format(0.5)
        return lambda d: openimages.evaluate_openimages(dataset, split, d, **options)[name]
    if metric == "coco":
        return lambda d: coco.evaluate_coco(dataset, split, d, **options)["AP"]
    if metric == "lvis":
        return lambda d: lvis.evaluate_lvis(dataset, split, d, **options)["AP"]
    raise UserError(f"--metric={metric}: expected one of openimages, coco, lvis")


def define_flags() -> None:
    flags.DEFINE_string("detections", None, "Merged table with all its rows.", required=True)
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("split", "validation", "Split to search on.")
    flags.DEFINE_string("groups", None, "LVIS JSON, {label: r|c|f} JSON or dataset directory.")
    flags.DEFINE_string("metric", "lvis", "openimages, coco or lvis.")
    flags.DEFINE_enum("mode", "multiplier", MODES, "What the values are.")
    flags.DEFINE_list("values", ["1", "1.5", "2", "3", "4", "6"], "Values to choose from.")
    flags.DEFINE_integer("max_detections", 300, "Rows of an image that count.")
    flags.DEFINE_bool("allow_partial", False, "Although images of the split are missing.")
    flags.DEFINE_string("output", None, "JSON file for all that was tried.")


def main():
    options = flags.FLAGS
    try:
        values = [float(text) for text in options.values]
    except ValueError as error:
        raise UserError(f"--values={','.join(options.values)}: expected numbers") from error
    dataset = Dataset.open(options.dataset)
    groups_file = options.groups or options.dataset
    groups = read_groups(groups_file, dataset.class_labels)
    counts = np.bincount(groups, minlength=3)
    print(", ".join(f"{count} {name}" for name, count in zip(GROUPS, counts, strict=True)))
    evaluate = evaluator(options.metric, dataset, options.split, options.allow_partial)
    detections = read_detections(options.detections, dataset.class_labels)
    tried = search(
        detections, groups, evaluate,
        mode=options.mode, values=values, max_detections=options.max_detections,
    )  # fmt: skip
    plain = next(t for t in tried if t["rare"] == t["common"] == 1.0)
    best = tried[0]
    print(f"{options.metric} on {options.split}: {plain['value']:.5f} -> {best['value']:.5f} with")
    print(
        f"--config.rescoring.groups={groups_file} --config.rescoring.mode={options.mode} "
        + " ".join(f"--config.rescoring.{name}={best[name]:g}" for name in GROUPS)
    )
    if options.output:
        write_json(options.output, {"mode": options.mode, "tried": tried})
        print(f"wrote {options.output}")


if __name__ == "__main__":
    define_flags()
    run_main(main)
