"""Ways to merge your own tables, side by side: singles, the paper's steps, calibrated ones, trees.

    python -m scripts.bench.ablate_ensemble --inputs=a=a.parquet,b=b.json,c=c.parquet \\
        --dataset=DIR --tune=val_a --report=val_b --workdir=WORK [--metric=coco] \\
        [--mappings=c=openimages_to_coco]

Merges with `ensemble.merge`, after `ensemble.calibrate` and `ensemble.search` on the split `--tune`
alone; the other one is only scored (paper: tables 3 and 4, section 4.2). Tables may be results in
COCO's form. For openimages tables are copied to parent classes first. Tables of another vocabulary
(`--mappings`) join the ensembles as experts: some steps are repeated without them, and the figure
of their classes is printed for all. WORK keeps tables.

At the end: the error of calibration before and after, and what cannot be beaten, the best table of
each class and the best ranking of the recipe's boxes, both chosen by the truth of `--report`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from common.data.dataset import Dataset
from common.io.atomic import write_text
from common.io.commands import run_main
from common.metrics import official
from common.metrics.names import BOX_METRICS, Metric
from common.tables import read_detections
from configs.ensemble import adj_nms, auto, calibrated, naive, reweighted, voting
from ensemble.calibrate import calibrate_tables
from ensemble.calibration.oracle import best_ranking
from ensemble.calibration.recipes import ALONE
from ensemble.class_weights import parse_pairs
from ensemble.inputs import parse_inputs
from ensemble.merge import merge_tables
from ensemble.results_files import as_tables
from ensemble.search import search_tables
from scripts.expand_detections import expand_table


def define_flags() -> None:
    flags.DEFINE_list("inputs", None, "Unexpanded tables, as path or name=path.", required=True)
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("tune", None, "Split for weights, calibration and search.", required=True)
    flags.DEFINE_string("report", None, "Split that is only scored.", required=True)
    flags.DEFINE_string("workdir", None, "Folder for tables, weights and the tree.", required=True)
    flags.DEFINE_string("mappings", "", "name=MAP pairs of tables of another vocabulary.")
    flags.DEFINE_enum("metric", "openimages", BOX_METRICS, "What is reported.")
    flags.DEFINE_integer("trees", 2000, "Trees that the searches score.", lower_bound=10)


class Bench:
    """Figures of ways to merge on both splits."""

    def __init__(self, dataset: Dataset, metric: Metric, splits: Sequence[str], work: Path):
        self.dataset, self.metric, self.splits, self.work = dataset, metric, splits, work
        self.rows: dict[str, list[dict[str, float]]] = {}

    def score(self, step: str, table: Path) -> list[dict[str, float]]:
        """Figures of a table on each split, all of them; the headline is kept for the report."""
        # Each table covers both splits; the note that it covers more would be said often.
        figures = [
            official.evaluate(self.metric, self.dataset, split, table, say=lambda _: None)
            for split in self.splits
        ]
        self.rows[step] = figures
        return figures

    def merge(self, step: str, inputs: Sequence[str], config: ConfigDict) -> Path:
        table = self.work / f"merged{len(self.rows)}.parquet"
        merge_tables(inputs, config, table, say=lambda *_, **__: None)
        self.score(step, table)
        return table

    def means(self, classes: Sequence[str]) -> dict[str, list[float]]:
        """Mean AP of some classes by step and split."""
        return {
            step: [mean_ap(figures, classes) for figures in of_splits]
            for step, of_splits in self.rows.items()
        }

    def report(self) -> str:
        names = list(official.headline(self.metric, next(iter(self.rows.values()))[0]))
        heads = [f"{split} {name}" for split in self.splits for name in names]
        width = max(map(len, self.rows))
        lines = [f"{'':{width}}  " + "  ".join(heads)]
        for step, of_splits in self.rows.items():
            values = [v for f in of_splits for v in official.headline(self.metric, f).values()]
            cells = (f"{100 * v:{len(h)}.2f}" for v, h in zip(values, heads, strict=True))
            lines.append(f"{step:{width}}  " + "  ".join(cells))
        return "\n".join(lines)


def class_aps(figures: Mapping[str, float]) -> dict[str, float]:
    """AP by label."""
    marks = ("PerformanceByCategory/AP@0.5IOU/", "PerformanceByCategory/AP/")
    found = {}
    for name, value in figures.items():
        for mark in marks:
            if mark in name:
                found[name.split(mark, 1)[1]] = value
    return found


def found_labels(table: Path) -> list[str]:
    """Labels that a table has detections of."""
    found = read_detections(table)
    return [found.labels[code] for code in np.unique(found.label_index)]


def mean_ap(figures: Mapping[str, float], classes: Sequence[str]) -> float:
    aps = class_aps(figures)
    return float(np.mean([aps[label] for label in classes if label in aps]))


def flat_configs(metrics: str) -> dict[str, ConfigDict]:
    """Name of a step -> config of `ensemble.merge`, the paper's in its order first."""
    configs = {"naive ensemble": naive.get_config()}
    for name, module in (
        ("+ re-weighting", reweighted),
        ("+ adj-NMS", adj_nms),
        ("+ voting", voting),
    ):
        configs[name] = module.get_config()
        configs[name].weights.metrics = metrics
    configs["wbf + re-weighting"] = naive.get_config("wbf")
    configs["wbf + re-weighting"].weights.metrics = metrics
    return configs


def calibrated_configs(calibration: str) -> dict[str, ConfigDict]:
    configs: dict[str, ConfigDict] = {}
    for what, opinion in (("curves", False), ("opinion", True)):
        configs |= {
            f"{what}: naive": naive.get_config(),
            f"{what}: adj-NMS": adj_nms.get_config(),
            f"{what}: voting": voting.get_config(),
            f"{what}: wbf": naive.get_config("wbf"),
        }
        for name, config in configs.items():
            if name.startswith(what):
                config.opinion = opinion
    configs["recipe"] = calibrated.get_config()
    for config in configs.values():
        config.calibration = calibration
    return configs


def search(bench: Bench, step: str, inputs: Sequence[str], calibration: str) -> None:
    """Searches a tree, of calibrated scores where a calibration is named."""
    config = auto.get_config()
    config.calibration = calibration
    share = flags.FLAGS.trees / sum(config.search.trees.values())
    for stage, count in config.search.trees.items():
        config.search.trees[stage] = round(count * share)
    tree = bench.work / f"{step.replace(' ', '_').replace(':', '')}.json"
    first, second = bench.splits
    search_tables(inputs, config, bench.dataset, first, second, tree, metric=bench.metric)
    config.tree = str(tree)
    config.max_detections = 300
    config.dataset = str(bench.dataset.directory)
    bench.merge(step, inputs, config)


def run(bench: Bench, inputs: Sequence[str], suffix: str, only: Sequence[str] = ()) -> Path:
    """Flat ensembles of these tables, all or `only` some; returns the table of the last."""
    directory = str(bench.dataset.directory)
    names = parse_inputs(inputs)[1]
    metrics = ",".join(f"{name}={bench.work / name}.json" for name in names)
    calibration = bench.work / f"calibration{suffix.replace(' ', '_')}.json"
    config = calibrated.get_config()
    config.dataset = directory
    calibrate_tables(
        inputs, config, bench.dataset, bench.splits[0], calibration, metric=bench.metric
    )
    recipe = Path()
    steps = {**flat_configs(metrics), **calibrated_configs(str(calibration))}
    for step, config in steps.items():
        if only and step not in only:
            continue
        config.dataset = directory
        recipe = bench.merge(step + suffix, inputs, config)
    return recipe


def main():
    dataset = Dataset.open(flags.FLAGS.dataset)
    metric: Metric = flags.FLAGS.metric
    work = Path(flags.FLAGS.workdir)
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(dataset, metric, (flags.FLAGS.tune, flags.FLAGS.report), work)
    mappings = parse_pairs(flags.FLAGS.mappings, "--mappings")
    with as_tables(flags.FLAGS.inputs, flags.FLAGS.dataset) as given:
        inputs = []
        for name, path in zip(*reversed(parse_inputs(given)), strict=True):
            table = work / f"{name}.parquet"
            renamed = work / f"renamed_{name}.parquet" if metric == "openimages" else table
            config = naive.get_config()
            config.operator = ALONE
            config.max_detections = 0
            config.dataset = flags.FLAGS.dataset
            config.mappings = f"{name}={mappings[name]}" if name in mappings else ""
            merge_tables([f"{name}={path}"], config, renamed, say=lambda *_, **__: None)
            if metric == "openimages":
                expand_table(renamed, dataset, table)
            write_text(work / f"{name}.json", json.dumps(bench.score(f"single {name}", table)[0]))
            inputs.append(f"{name}={table}")
    singles = list(bench.rows)
    own = [text for text in inputs if text.partition("=")[0] not in mappings]
    experts = {label for name in mappings for label in found_labels(work / f"{name}.parquet")}
    recipe = run(bench, inputs, "")
    if mappings:
        run(bench, own, " without experts", only=("naive ensemble", "opinion: wbf", "recipe"))
    search(bench, "tree", inputs, "")
    search(bench, "tree of calibrated", inputs, str(work / "calibration.json"))
    print("\n" + bench.report())

    notes = json.loads((work / "calibration.json").read_text())["notes"]
    for name, table in notes["tables"].items():
        print(f"ECE {name}: {table['error_before']:.4f} -> {table['error_after']:.4f}")
    best = [class_aps(bench.rows[step][1]) for step in singles]
    chosen = np.mean([max(aps.get(label, 0.0) for aps in best) for label in best[0]])
    print(f"best table of each class, by the truth of {bench.splits[1]}: {100 * chosen:.2f}")
    ranked = best_ranking(recipe, dataset, bench.splits[1], metric)
    print(f"best ranking of the recipe's boxes: {100 * ranked:.2f}")
    if mappings:
        print(f"{len(experts)} classes of the experts, mean AP:")
        for step, values in bench.means(sorted(experts)).items():
            print(f"  {step}: " + " ".join(f"{100 * value:.2f}" for value in values))


if __name__ == "__main__":
    define_flags()
    run_main(main)
