"""Searches the ensemble tree of detections tables that scores best on a split.

    python -m ensemble.search --config=configs/ensemble/auto.py --inputs=a.parquet,b.parquet,...
        --dataset=DIR --split=val_a --report_split=val_b --output=tree.json

Writes tree.json, which `ensemble.merge --config.tree=tree.json` applies, and tree.svg. The tables
must cover both splits; only `--split` steers the search. A tree may leave tables out, and ends as
the best table alone where no tree reaches it on the mean of the folds of `--split`.
`tree.search.json` beside the output holds the state: the same command goes on after a kill and ends
with the same tree.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import flags
from etils import epath
from ml_collections import config_flags

from common.data.dataset import Dataset
from common.io.atomic import write_text
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.paths import resolved
from common.io.progress import Progress
from common.io.settings import read_settings
from common.metrics.names import BOX_METRICS
from common.metrics.rules import metric_of
from ensemble import draw_tree
from ensemble.class_weights import model_weights
from ensemble.operators import make_operator
from ensemble.operators.groups import apply_operator
from ensemble.preparation import open_prepared
from ensemble.search_state import STATE_FORMAT, identity_of, load_state
from ensemble.settings import EnsembleSettings, SearchSettings
from ensemble.tree import binary_tree as trees
from ensemble.tree.evolution import MOVES, Stage, State, search
from ensemble.tree.scoring import Scorer, build_scorers


def search_tables(
    inputs: Sequence[str],
    config: ml_collections.ConfigDict,
    dataset: Dataset,
    split: str,
    report_split: str | None,
    output: epath.Path,
    *,
    metric: str = "",
    say: Callable[[str], None] = print,
) -> trees.Tree:
    """Searches, writes the tree and its picture, prints the comparison table.

    Args:
      inputs: tables, as `path` or `name=path`.
      config: such as configs/ensemble/auto.py; the rows are prepared as `ensemble.merge` does, the
        section `search` says what is tried.
      dataset: truth.
      split: what the tree is tuned on.
      report_split: what is reported beside; None for nothing.
      output: JSON file of the tree.
      metric: one of `common.metrics.names.BOX_METRICS` at the IoU of the config; "": that of the
        dataset.
      say: where progress goes.

    Raises:
      UserError: broken inputs or config, or a state of another search beside the output.
    """
    settings = read_settings(EnsembleSettings, config)
    options = settings.search
    if options is None:
        raise UserError("config.search: missing, expected configs/ensemble/auto.py or its like")
    state_path = output.with_name(f"{output.stem}.search.json")
    check_scored(settings, dataset)
    tables, preparation = open_prepared(inputs, settings, dataset)
    if len(tables.names) < 2:
        raise UserError(f"--inputs: {len(tables.names)} table, expected two or more to ensemble")
    splits = [split] if report_split is None else [split, report_split]
    metric = metric or metric_of(dataset)
    thresholds = options.metric.thresholds(metric)
    iou = ", ".join(f"{threshold:g}" for threshold in thresholds)
    say(f"metric: {metric}, AP at IoU {iou} (scripts.score --metric={metric} has the official one)")
    identity = identity_of(tables, preparation, options, dataset, splits, metric)
    state = load_state(state_path, identity)
    scorers = build_scorers(
        dataset,
        splits,
        tables,
        preparation,
        metric=metric,
        iou_thresholds=thresholds,
        group_of_weight=options.metric.group_of_weight,
        image_labels=options.metric.image_labels,
        folds=options.folds,
        threads=options.threads,
        cache_bytes=int(options.cache_gigabytes * 2**30 / len(splits)),
        say=say,
    )
    start = trees.Tree(
        root=trees.Leaf(tables.names[0]),
        models=tuple(tables.names),
        iou_threshold=options.iou_threshold,
        sigma=options.sigma,
        min_score=options.min_score,
    )
    singles = {
        model: [
            scorer.score(dataclasses.replace(start, root=trees.Leaf(model))).mean
            for scorer in scorers
        ]
        for model in tables.names
    }
    for model, scores in singles.items():
        say(f"{model}: {_scores(splits, scores)}")
    stages = [
        Stage(moves, getattr(options.trees, moves))
        for moves in MOVES
        if getattr(options.trees, moves)
    ]
    monitor = _Monitor(splits, scorers, start, stages, state, state_path, identity, options, say)
    final = search(
        start,
        {model: scores[0] for model, scores in singles.items()},
        stages,
        lambda tree: scorers[0].score(tree).mean,
        space=options.space,
        equal=options.equal,
        population=options.population,
        tournament=options.tournament,
        seed=options.seed,
        state=state,
        after_tree=monitor.after_tree,
    )
    monitor.save(final)
    if final.best is None:
        raise ValueError("a search ends with a tree")
    alone = max(singles, key=lambda model: singles[model][0])
    best = guarded(
        scorers[0],
        [
            dataclasses.replace(start, root=root)
            for root in dict.fromkeys(root for _, root in (final.best, *final.winners[::-1]))
        ],
        dataclasses.replace(start, root=trees.Leaf(alone)),
        say,
    )
    operator = make_operator(options.naive, model_weights(tables.names, settings.weights).tolist())
    rows = {f"single {model}": scores for model, scores in singles.items()}
    rows["naive ensemble"] = [
        scorer.score_operator(lambda rows: apply_operator(rows, operator)).mean
        for scorer in scorers
    ]
    for stage, (_, root) in zip(stages[:-1], final.winners[:-1], strict=True):
        tree = dataclasses.replace(start, root=root)
        rows[f"tree after stage {stage.moves}"] = [scorer.score(tree).mean for scorer in scorers]
    rows["tree"] = [scorer.score(best).mean for scorer in scorers]
    notes = {
        "splits": splits,
        "scores": rows,
        "nodes": {
            path: [scorer.score(dataclasses.replace(start, root=node)).mean for scorer in scorers]
            for node, path in trees.walk(best.root)
        },
        "trees": sum(stage.num_trees for stage in stages),
        "inputs": {table.name: str(table.reader.path) for table in tables.tables},
    }
    trees.save(output, best, notes)
    picture = output.with_suffix(".svg")
    write_text(picture, draw_tree.draw(best, notes))
    say(comparison(splits, rows))
    say(f"wrote {output} and {picture}")
    return best


def guarded(
    scorer: Scorer, candidates: Sequence[trees.Tree], single: trees.Tree, say: Callable[[str], None]
) -> trees.Tree:
    """The first candidate that reaches the best table alone on the mean of the folds.

    Args:
      scorer: of the tuned split.
      candidates: best first.
      single: the best table alone.
      say: where the figures go.
    """
    alone = float(np.mean(scorer.score_folds(single)))
    for tree in candidates:
        reached = float(np.mean(scorer.score_folds(tree)))
        say(f"mean of the folds: tree {reached:.4f}, best table alone {alone:.4f}")
        if reached >= alone:
            return tree
    return single


def check_scored(settings: EnsembleSettings, dataset: Dataset) -> None:
    """Refuses what `ensemble.merge` would do after the tree, which the search does not score."""
    for field, value, expected in (
        ("relations.file", settings.relations.file, ""),
        ("rescoring.groups", settings.rescoring.groups, ""),
        ("max_detections", settings.max_detections, 0),
        ("masks", settings.masks, False),
    ):
        if value != expected:
            raise UserError(
                f"config.{field}: found {value!r}, expected {expected!r}: a search scores all "
                "boxes that a tree makes (ensemble.merge can apply it afterwards)"
            )
    if settings.dataset and resolved(settings.dataset) != resolved(dataset.directory):
        raise UserError(f"config.dataset: found {settings.dataset!r}, expected that of --dataset")


class _Monitor:
    """Progress lines and the saved state."""

    def __init__(
        self,
        splits: Sequence[str],
        scorers: Sequence[Scorer],
        tree: trees.Tree,
        stages: Sequence[Stage],
        state: State | None,
        path: epath.Path,
        identity: Mapping[str, Any],
        options: SearchSettings,
        say: Callable[[str], None],
    ):
        self._splits, self._scorers, self._tree, self._stages = splits, scorers, tree, stages
        self._path, self._identity, self._save_seconds = path, identity, options.save_seconds
        self._before = state.seconds if state else 0.0
        self._start = self._saved = time.monotonic()
        self._progress = Progress(
            sum(stage.num_trees for stage in stages),
            what="search",
            unit="trees",
            say=say,
            every_seconds=options.log_seconds,
        )
        if state and state.best:
            say(f"going on after {_done(state, stages)} trees from {path}")

    def after_tree(self, state: State, improved: bool) -> None:
        now = time.monotonic()
        state.seconds = self._before + now - self._start
        if improved and state.best is not None:
            value, root = state.best
            tree = dataclasses.replace(self._tree, root=root)
            scores = [value] + [scorer.score(tree).mean for scorer in self._scorers[1:]]
            state.history.append({"tried": _done(state, self._stages), "scores": scores})
        best = zip(self._splits, state.history[-1]["scores"], strict=True)
        figures = {f"best {split}": score for split, score in best}
        self._progress.report(_done(state, self._stages), figures)
        if now - self._saved >= self._save_seconds:
            self.save(state)
            self._saved = time.monotonic()

    def save(self, state: State) -> None:
        content = {"format": STATE_FORMAT, "identity": self._identity, "state": state.to_json()}
        write_text(self._path, json.dumps(content))


def comparison(splits: Sequence[str], rows: Mapping[str, Sequence[float]]) -> str:
    """Table of mAP by ensemble and split."""
    width = max(len(name) for name in rows)
    singles = [name for name in rows if name.startswith("single ")]
    best = max(singles, key=lambda name: rows[name][0])
    lines = [" ".join([f"{'mAP':<{width}}", *(f"{split:>12}" for split in splits)])]
    lines[0] += "".join(f" {'vs naive':>9}" for _ in splits)
    for name, scores in rows.items():
        text = " ".join([f"{name:<{width}}", *(f"{score:12.4f}" for score in scores)])
        gains = zip(scores, rows["naive ensemble"], strict=True)
        text += "".join(f" {score - naive:+9.4f}" for score, naive in gains)
        lines.append(text + ("  best single" if name == best else ""))
    return "\n".join(lines)


def _done(state: State, stages: Sequence[Stage]) -> int:
    return state.tried + sum(stage.num_trees for stage in stages[: state.stage])


def _scores(splits: Sequence[str], scores: Sequence[float]) -> str:
    return " ".join(f"{split} {score:.4f}" for split, score in zip(splits, scores, strict=True))


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "configs/ensemble/auto.py[:joint]")
    flags.DEFINE_list("inputs", None, "Detections tables, path or name=path.", required=True)
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("split", None, "Split to tune on.", required=True)
    flags.DEFINE_string("report_split", None, "Split to report on beside.")
    flags.DEFINE_enum(
        "metric",
        None,
        BOX_METRICS,
        "By whose rules a tree is scored. Default: lvis for a dataset made of LVIS files, coco for "
        "one that is annotated exhaustively, else openimages.",
    )
    flags.DEFINE_string("output", None, "JSON file of the tree.", required=True)
    flags.mark_flag_as_required("config")


def main():
    output = epath.Path(flags.FLAGS.output)
    if output.suffix != ".json":
        raise UserError(f"--output={output}: expected a name that ends with .json")
    search_tables(
        flags.FLAGS.inputs,
        flags.FLAGS.config,
        Dataset.open(flags.FLAGS.dataset),
        flags.FLAGS.split,
        flags.FLAGS.report_split,
        output,
        metric=flags.FLAGS.metric or "",
        say=lambda text: print(text, flush=True),
    )


if __name__ == "__main__":
    define_flags()
    run_main(main)
