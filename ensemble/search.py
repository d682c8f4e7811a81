"""Searches the ensemble tree of detections tables that scores best on a split.

    python -m ensemble.search --config=configs/ensemble/auto.py --inputs=a.parquet,b.parquet,...
        --dataset=DIR --split=val_a --report_split=val_b --output=tree.json

Writes tree.json, which `ensemble.merge --config.tree=tree.json` applies, and tree.svg. The tables
must cover both splits; only `--split` steers the search. A tree may leave tables out, and ends as
the best table alone where no tree reaches it on the mean of the folds of `--split`.
`tree.search.json` beside the output holds the state: the same command goes on after a kill and ends
with the same tree.
"""

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
from ensemble.inputs import Tables
from ensemble.operators import make_operator
from ensemble.preparation import Preparation, open_prepared
from ensemble.search_scores import SplitScorers, comparison, comparison_rows, make_notes
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
    options = check_scored(settings, dataset)
    tables, preparation = open_prepared(inputs, settings, dataset)
    if len(tables.names) < 2:
        raise UserError(f"--inputs: {len(tables.names)} table, expected two or more to ensemble")
    splits = [split] if report_split is None else [split, report_split]
    metric = metric or metric_of(dataset)
    iou = ", ".join(f"{threshold:g}" for threshold in options.metric.thresholds(metric))
    say(f"metric: {metric}, AP at IoU {iou} (scripts.score --metric={metric} has the official one)")
    state_path = output.with_name(f"{output.stem}.search.json")
    identity = identity_of(tables, preparation, options, dataset, splits, metric)
    state = load_state(state_path, identity)
    scorers = _open_scorers(dataset, splits, tables, preparation, metric, options, say)
    singles = scorers.score_singles()
    for model, scores in singles.items():
        say(f"{model}: {scorers.text(scores)}")
    counts = {moves: getattr(options.trees, moves) for moves in MOVES}
    stages = [Stage(moves, count) for moves, count in counts.items() if count]
    monitor = _Monitor(scorers, stages, state, state_path, identity, options, say)
    final = search(
        scorers.settings,
        {model: scores[0] for model, scores in singles.items()},
        stages,
        lambda tree: scorers.tuned.score(tree).mean,
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
    found = dict.fromkeys(root for _, root in (final.best, *final.winners[::-1]))
    alone = max(singles, key=lambda model: singles[model][0])
    candidates = [scorers.tree(root) for root in found]
    best = guarded(scorers.tuned, candidates, scorers.tree(trees.Leaf(alone)), say)
    naive = make_operator(options.naive, model_weights(tables.names, settings.weights).tolist())
    winners = {
        stage.moves: root for stage, (_, root) in zip(stages[:-1], final.winners[:-1], strict=True)
    }
    rows = comparison_rows(scorers, singles, naive, winners, best)
    notes = make_notes(scorers, rows, best, stages, tables)
    trees.save(output, best, notes)
    picture = output.with_suffix(".svg")
    write_text(picture, draw_tree.draw(best, notes))
    say(comparison(splits, rows))
    say(f"wrote {output} and {picture}")
    return best


def _open_scorers(
    dataset: Dataset,
    splits: Sequence[str],
    tables: Tables,
    preparation: Preparation,
    metric: str,
    options: SearchSettings,
    say: Callable[[str], None],
) -> SplitScorers:
    """Reads the tables and prepares what `config.search` says about scoring."""
    scorers = build_scorers(
        dataset,
        splits,
        tables,
        preparation,
        metric=metric,
        iou_thresholds=options.metric.thresholds(metric),
        group_of_weight=options.metric.group_of_weight,
        image_labels=options.metric.image_labels,
        folds=options.folds,
        threads=options.threads,
        cache_bytes=int(options.cache_gigabytes * 2**30 / len(splits)),
        say=say,
    )
    settings = trees.Tree(
        root=trees.Leaf(tables.names[0]),
        models=tuple(tables.names),
        iou_threshold=options.iou_threshold,
        sigma=options.sigma,
        min_score=options.min_score,
    )
    return SplitScorers(splits, scorers, settings)


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


def check_scored(settings: EnsembleSettings, dataset: Dataset) -> SearchSettings:
    """What is searched; refuses what `ensemble.merge` would do after the tree, which is not scored.

    Raises:
      UserError: such a field, or a config without the section `search`.
    """
    if settings.search is None:
        raise UserError("config.search: missing, expected configs/ensemble/auto.py or its like")
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
    return settings.search


class _Monitor:
    """Progress lines and the saved state."""

    def __init__(
        self,
        scorers: SplitScorers,
        stages: Sequence[Stage],
        state: State | None,
        path: epath.Path,
        identity: Mapping[str, Any],
        options: SearchSettings,
        say: Callable[[str], None],
    ):
        self._scorers, self._stages = scorers, stages
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
            others = self._scorers.scorers[1:]
            tree = self._scorers.tree(root)
            scores = [value] + [scorer.score(tree).mean for scorer in others]
            state.history.append({"tried": _done(state, self._stages), "scores": scores})
        best = zip(self._scorers.splits, state.history[-1]["scores"], strict=True)
        figures = {f"best {split}": score for split, score in best}
        self._progress.report(_done(state, self._stages), figures)
        if now - self._saved >= self._save_seconds:
            self.save(state)
            self._saved = time.monotonic()

    def save(self, state: State) -> None:
        content = {"format": STATE_FORMAT, "identity": self._identity, "state": state.to_json()}
        write_text(self._path, json.dumps(content))


def _done(state: State, stages: Sequence[Stage]) -> int:
    return state.tried + sum(stage.num_trees for stage in stages[: state.stage])


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
