"""The paper's order of gains on your own tables: single, naive, re-weighted, adj-NMS, voting, auto.

    python -m scripts.bench.ablate_ensemble --inputs=a.parquet,b.parquet,c.parquet,d.parquet \\
        --dataset=DIR --tune=val_a --report=val_b --workdir=WORK

Copies the tables to parent classes, then merges them with `ensemble.merge` and searches a tree with
`ensemble.search`. Weights of classes and the tree come from the split `--tune` alone; the other one
is only scored (paper: tables 3 and 4, section 4.2). Official OpenImages metric; WORK keeps tables.
"""

import json
from pathlib import Path

from absl import flags

from common.data.dataset import Dataset
from common.io.atomic import write_text
from common.io.commands import run_main
from common.metrics.openimages import MEAN_AP, evaluate_openimages
from configs.ensemble import adj_nms, auto, naive, reweighted, voting
from ensemble.inputs import parse_inputs
from ensemble.merge import merge_tables
from ensemble.search import search_tables
from scripts.expand_detections import expand_table


def define_flags() -> None:
    flags.DEFINE_list("inputs", None, "Unexpanded tables, as path or name=path.", required=True)
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("tune", None, "Split for weights and search.", required=True)
    flags.DEFINE_string("report", None, "Split that is only scored.", required=True)
    flags.DEFINE_string("workdir", None, "Folder for tables, weights and the tree.", required=True)
    flags.DEFINE_integer("trees", 2000, "Trees that the search scores.", lower_bound=10)


def merge_configs(metrics: str) -> dict:
    """Name of a step -> config of `ensemble.merge`, in the paper's order."""
    configs = {"naive ensemble": naive.get_config()}
    for name, module in (
        ("+ re-weighting", reweighted),
        ("+ adj-NMS", adj_nms),
        ("+ voting", voting),
    ):
        configs[name] = module.get_config()
        configs[name].weights.metrics = metrics
    return configs


def main():
    dataset = Dataset.open(flags.FLAGS.dataset)
    splits = (flags.FLAGS.tune, flags.FLAGS.report)
    work = Path(flags.FLAGS.workdir)
    work.mkdir(parents=True, exist_ok=True)
    paths, names = parse_inputs(flags.FLAGS.inputs)
    rows: dict[str, list[float]] = {}

    def score(table: Path) -> list[dict[str, float]]:
        # Each table covers both splits; the note that it covers more than one would be said often.
        return [evaluate_openimages(dataset, split, table, say=lambda _: None) for split in splits]

    def means(table: Path) -> list[float]:
        return [figures[MEAN_AP.format(0.5)] for figures in score(table)]

    inputs, metrics = [], []
    for name, path in zip(names, paths, strict=True):
        table = work / f"{name}.parquet"
        expand_table(path, dataset, table)
        of_splits = score(table)
        write_text(work / f"{name}.json", json.dumps(of_splits[0]))
        inputs.append(f"{name}={table}")
        metrics.append(str(work / f"{name}.json"))
        rows[f"single {name}"] = [figures[MEAN_AP.format(0.5)] for figures in of_splits]
    for number, (step, config) in enumerate(merge_configs(",".join(metrics)).items()):
        table = work / f"merged{number}.parquet"
        merge_tables(inputs, config, table)
        rows[step] = means(table)

    config = auto.get_config()
    share = flags.FLAGS.trees / sum(config.search.trees.values())
    for stage, count in config.search.trees.items():
        config.search.trees[stage] = round(count * share)
    search_tables(inputs, config, dataset, *splits, work / "tree.json")
    config.tree = str(work / "tree.json")
    merge_tables(inputs, config, work / "auto.parquet")
    rows["auto ensemble"] = means(work / "auto.parquet")

    width = max(map(len, rows))
    print(f"\n{'mAP@0.5':{width}}  {splits[0]:>10} {splits[1]:>10}")
    for name, values in rows.items():
        print(f"{name:{width}}  " + " ".join(f"{100 * value:10.2f}" for value in values))


if __name__ == "__main__":
    define_flags()
    run_main(main)
