"""Learns what the scores of each table are worth, and how the tables are best merged.

    python -m ensemble.calibrate --inputs=a=a.parquet,b=b.parquet,c=c.parquet --dataset=DIR \\
        --split=val_a --output=cal.json
    python -m ensemble.merge --config=configs/ensemble/calibrated.py \\
        --config.calibration=cal.json --inputs=a=a.parquet,b=b.parquet,c=c.parquet \\
        --output=m.parquet

A score of 0.5 may be right nine times of ten from one detector and one time of ten from another.
Here the precision at each score is measured on a split with ground truth, by table and class, and a
curve through it chosen by cross-validation (`ensemble.calibration.fit`); a second opinion is
learned, by which tables confirm or contradict each other (`opinion`); and of many recipes of
merging, each table alone among them, the one is taken that is best on images it was not fitted to
(`recipes`).

Writes cal.json and cal.html, a page with the reliability of each table before and after. No other
split is looked at.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from common.data.dataset import Dataset
from common.io.atomic import write_text
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.parallel import map_ordered, prefetch
from common.io.progress import Progress
from common.io.settings import read_settings
from common.metrics.names import METRICS, Metric
from common.metrics.rules import make_rule, metric_of
from ensemble.calibration import calibration as calibrations
from ensemble.calibration import page
from ensemble.calibration.calibration import Calibration
from ensemble.calibration.counting import (
    Counter,
    Counts,
    JudgedChunk,
    folds_of,
    judge_chunk,
    judged_chunks,
)
from ensemble.calibration.fit import Fitted, fit_table
from ensemble.calibration.held_out import (
    MASK_ROWS,
    ROWS,
    HeldOut,
    Sample,
    held_out_scores,
    sampled_images,
)
from ensemble.calibration.mask_overlaps import MaskOverlaps
from ensemble.calibration.recipes import Choice, choose, class_ranks, describe
from ensemble.inputs import Tables
from ensemble.merge import make_plan
from ensemble.preparation import open_prepared
from ensemble.results_files import as_tables
from ensemble.settings import EnsembleSettings

_THREADS = 2


def calibrate_tables(
    inputs: Sequence[str],
    config: ConfigDict,
    dataset: Dataset,
    split: str,
    output: epath.Path,
    *,
    metric: str = "",
    num_folds: int = 5,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Calibration:
    """Calibrates tables, writes the file and its page.

    Args:
      inputs: tables, as `path` or `name=path`.
      config: how rows are prepared (class maps, experts, coverage, expansion) and what is done to
        merged ones, as `ensemble.merge` has it.
      dataset: truth.
      split: what is learned from.
      output: JSON file.
      metric: one of `METRICS`; "": that of the dataset.
      num_folds: of the split.
      seed: of the folds.
      say: where progress goes.

    Raises:
      UserError: broken inputs or config, or a split that the tables do not cover.
    """
    # The curves are what is made here; the operators come from the recipes.
    config = ConfigDict(
        {**config.to_dict(), "calibration": "", "tree": "", "operator": {"name": "nms"}}
    )
    chosen: Metric = metric or metric_of(dataset)  # type: ignore[assignment]
    masks = chosen.endswith("_masks")
    config.masks = masks
    settings = read_settings(EnsembleSettings, config)
    tables, preparation = open_prepared(inputs, settings, dataset)
    unweighted = preparation.unweighted()
    rule = make_rule(dataset, chosen.removesuffix("_masks"))
    folds = folds_of(dataset, split, tables, num_folds, seed)
    say(f"{len(tables.names)} tables, {(folds >= 0).sum()} images of {split}, metric {chosen}")
    counter = Counter(len(tables.names), len(tables.labels), num_folds)
    sample = Sample(sampled_images(tables, folds, MASK_ROWS if masks else ROWS, seed))
    overlaps = MaskOverlaps(dataset) if masks else None

    def judge(chunk) -> JudgedChunk:
        return judge_chunk(tables, unweighted, rule, folds, chunk, overlaps)

    chunks = prefetch(judged_chunks(tables, folds, rows=settings.chunk_rows, masks=masks))
    progress = Progress(len(tables.image_ids), what="counting", unit="images", say=say)
    for part in map_ordered(judge, chunks, threads=_THREADS, ahead=_THREADS):
        counter.add(part)
        sample.add(part)
        progress.report(part.chunk.stop)
    counts = counter.counts()
    fitted = [fit_table(table) for table in counts]
    for line in summary(tables.names, fitted, counts):
        say(line)
    indices = dataset.find_images(tables.image_ids)
    truth = np.stack([rule.counts(indices[folds == fold]) for fold in range(num_folds)])
    rows = sample.rows()
    precisions, opinions, opinion = held_out_scores(rows, fitted, say)
    images = np.flatnonzero(sample.images)
    held = HeldOut(
        dataset=dataset,
        split=split,
        metric=chosen,
        plan=make_plan(settings, tables, preparation.of_prepared()),
        tables=tables,
        rows=rows,
        images=images,
        image_folds=folds[images],
        precisions=precisions,
        opinions=opinions,
        ranks=np.stack([class_ranks(counts, truth, fold) for fold in range(num_folds)]),
    )
    say(f"recipes, {chosen} of {len(images)} images whose scores come from other folds:")
    choice = choose(tables.names, held.score, held.score, num_folds, say)
    say(verdict(choice))
    calibration = Calibration(
        names=tuple(tables.names),
        labels=tuple(tables.labels),
        curves=[table.whole for table in fitted],
        ranks=class_ranks(counts, truth, None),
        opinion=opinion if choice.opinion or choice.best.recipe.opinion else None,
        recipe=choice.best.recipe,
    )
    notes = _notes(tables, fitted, choice, split, chosen, len(images))
    calibrations.save(output, calibration, chosen, notes)
    picture = output.with_suffix(".html")
    write_text(picture, page.build_page(tables.names, counts, fitted, choice, notes))
    say(f"wrote {output} and {picture}")
    return calibration


def summary(names: Sequence[str], fitted: Sequence[Fitted], counts: Sequence[Counts]) -> list[str]:
    """A line for each table: form, shifts, calibration error before and after."""
    width = max(map(len, names))
    lines = [f"{'':{width}}  detections  right  form         prior of classes  ECE before  after"]
    for name, table, count in zip(names, fitted, counts, strict=True):
        rows, hits = count.rows.sum(), count.hits.sum()
        prior = "no shifts" if table.prior == np.inf else f"{table.prior:g}"
        form = table.whole.curve.form
        lines.append(
            f"{name:{width}}  {rows:10.0f}  {hits / max(rows, 1):5.3f}  {form:11}  "
            f"{prior:>16}  {table.error_before:10.4f}  {table.error_after:5.4f}"
        )
    return lines


def verdict(choice: Choice) -> str:
    """What is taken, beside the best table alone."""
    best, single = choice.best, choice.single
    text = (
        f"best table alone: {describe(single.recipe)} {single.score:.4f} "
        f"(folds one by one {choice.folds[1]:.4f})"
    )
    if best == single:
        return f"{text}; no recipe is better"
    gain = best.score - single.score
    return (
        f"{text}\ntaken: {describe(best.recipe)} {best.score:.4f} ({gain:+.4f}; folds one by one "
        f"{choice.folds[0]:.4f})"
    )


def _notes(
    tables: Tables,
    fitted: Sequence[Fitted],
    choice: Choice,
    split: str,
    metric: str,
    num_images: int,
) -> dict[str, Any]:
    return {
        "split": split,
        "metric": metric,
        "images": num_images,
        "tables": {
            name: {
                "losses": table.losses,
                "prior": None if table.prior == np.inf else table.prior,
                "error_before": table.error_before,
                "error_after": table.error_after,
            }
            for name, table in zip(tables.names, fitted, strict=True)
        },
        "tried": [[describe(tried.recipe), tried.score] for tried in choice.tried],
        "best": [choice.best.score, choice.folds[0]],
        "single": [choice.single.score, choice.folds[1]],
    }


def define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", "configs/ensemble/calibrated.py", "How rows are prepared, as in ensemble.merge."
    )
    flags.DEFINE_list(
        "inputs",
        None,
        "Detections tables or COCO results (.json), path or name=path.",
        required=True,
    )
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("split", None, "Split to learn from.", required=True)
    flags.DEFINE_enum(
        "metric",
        None,
        METRICS,
        "By whose rules a detection is right. Default: lvis for a dataset made of LVIS files, coco "
        "for one that is annotated exhaustively, else openimages.",
    )
    flags.DEFINE_integer("folds", 5, "Parts of the split.", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "Of the folds.", lower_bound=0)
    flags.DEFINE_string("output", None, "JSON file of the calibration.", required=True)


def main():
    output = epath.Path(flags.FLAGS.output)
    if output.suffix != ".json":
        raise UserError(f"--output={output}: expected a name that ends with .json")
    metric = flags.FLAGS.metric or ""
    masks = metric.endswith("_masks")
    with as_tables(flags.FLAGS.inputs, flags.FLAGS.dataset, masks=masks) as inputs:
        calibrate_tables(
            inputs,
            flags.FLAGS.config,
            Dataset.open(flags.FLAGS.dataset),
            flags.FLAGS.split,
            output,
            metric=metric,
            num_folds=flags.FLAGS.folds,
            seed=flags.FLAGS.seed,
            say=lambda text: print(text, flush=True),
        )


if __name__ == "__main__":
    define_flags()
    run_main(main)
