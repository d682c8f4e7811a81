"""Searches the ensemble tree of detections tables that scores best on a split.

    python -m ensemble.search --config=configs/ensemble/auto.py --inputs=a.parquet,b.parquet,...
        --dataset=DIR --split=val_a --report_split=val_b --output=tree.json

Writes tree.json, which `ensemble.merge --config.tree=tree.json` applies, and tree.svg. The tables
must cover both splits; only `--split` steers the search. `tree.search.json` beside the output holds
the state: the same command goes on after a kill and ends with the same tree.
"""

import dataclasses
import hashlib
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
from common.io.paths import read_text, resolved
from ensemble import draw_tree
from ensemble.inputs import Tables
from ensemble.operators import make_operator
from ensemble.operators.groups import apply_operator
from ensemble.preparation import Preparation, open_prepared
from ensemble.tree import binary_tree as trees
from ensemble.tree.evolution import MOVES, Space, Stage, State, search
from ensemble.tree.join import ELEMENTS, NMS_TYPES
from ensemble.tree.scoring import Scorer, build_scorers

STATE_FORMAT = 1


def search_tables(
    inputs: Sequence[str],
    config: ml_collections.ConfigDict,
    dataset: Dataset,
    split: str,
    report_split: str | None,
    output: epath.Path,
    *,
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
      say: where progress goes.

    Raises:
      UserError: broken inputs or config, or a state of another search beside the output.
    """
    options = config.search
    stages, space, equal = parse_options(options)
    state_path = output.with_name(f"{output.stem}.search.json")
    check_scored(config, dataset)
    tables, preparation = open_prepared(inputs, config, dataset)
    if len(tables.names) < 2:
        raise UserError(f"--inputs: {len(tables.names)} table, expected two or more to ensemble")
    splits = [split] if report_split is None else [split, report_split]
    identity = _identity(tables, preparation, options, dataset, splits)
    state = load_state(state_path, identity)
    scorers = build_scorers(
        dataset,
        splits,
        tables,
        preparation,
        **options.metric,
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
    singles = {
        model: [
            scorer.score(dataclasses.replace(settings, root=trees.Leaf(model))).mean
            for scorer in scorers
        ]
        for model in tables.names
    }
    for model, scores in singles.items():
        say(f"{model}: {_scores(splits, scores)}")
    monitor = _Monitor(splits, scorers, settings, stages, state, state_path, identity, options, say)
    final = search(
        settings,
        {model: scores[0] for model, scores in singles.items()},
        stages,
        lambda tree: scorers[0].score(tree).mean,
        space=space,
        equal=equal,
        population=options.population,
        tournament=options.tournament,
        seed=options.seed,
        state=state,
        after_tree=monitor.after_tree,
    )
    monitor.save(final)

    best = dataclasses.replace(settings, root=final.best[1])
    operator = make_operator(options.naive, num_models=len(tables.names))
    rows = {f"single {model}": scores for model, scores in singles.items()}
    rows["naive ensemble"] = [
        scorer.score_operator(lambda rows: apply_operator(rows, operator)).mean
        for scorer in scorers
    ]
    for stage, (_, root) in zip(stages[:-1], final.winners[:-1], strict=True):
        tree = dataclasses.replace(settings, root=root)
        rows[f"tree after stage {stage.moves}"] = [scorer.score(tree).mean for scorer in scorers]
    rows["tree"] = [scorer.score(best).mean for scorer in scorers]
    notes = {
        "splits": splits,
        "scores": rows,
        "nodes": {
            path: [
                scorer.score(dataclasses.replace(settings, root=node)).mean for scorer in scorers
            ]
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


def check_scored(config: ml_collections.ConfigDict, dataset: Dataset) -> None:
    """Refuses what `ensemble.merge` would do after the tree, which the search does not score."""
    for field, found, expected in (
        ("relations.file", config.relations.file, ""),
        ("rescoring.groups", config.rescoring.groups, ""),
        ("max_detections", config.max_detections, 0),
        ("masks", config.masks, False),
    ):
        if found != expected:
            raise UserError(
                f"config.{field}: found {found!r}, expected {expected!r}: a search scores all "
                "boxes that a tree makes (ensemble.merge can apply it afterwards)"
            )
    if config.dataset and resolved(config.dataset) != resolved(dataset.directory):
        raise UserError(f"config.dataset: found {config.dataset!r}, expected that of --dataset")


def parse_options(options: Mapping[str, Any]) -> tuple[list[Stage], Space, trees.Operators]:
    """Stages, space and equal operators of the config.

    Raises:
      UserError: a value that makes no sense.
    """
    stages = [Stage(moves, options.trees[moves]) for moves in MOVES if options.trees[moves] > 0]
    if not stages:
        raise UserError("config.search.trees: all zero, expected trees in a stage at least")
    space = Space(
        weights=tuple(options.space.weights),
        votes=tuple(options.space.votes),
        boxes=tuple(options.space.boxes),
        nms=tuple(options.space.nms),
        elements=tuple(options.space.elements),
    )
    equal = trees.Operators(**options.equal)
    for name, values, low, high in (
        ("space.weights", space.weights, 1e-3, 1.0),
        ("space.votes", (*space.votes, equal.vote), 0.0, 10.0),
        ("space.boxes", (*space.boxes, equal.box), 0.0, 1.0),
    ):
        for value in values:
            if not low <= value <= high:
                raise UserError(f"config.search.{name}: {value!r}, expected {low:g} to {high:g}")
    for name, values, known in (
        ("space.nms", (*space.nms, equal.nms), NMS_TYPES),
        ("space.elements", space.elements, ELEMENTS),
    ):
        for value in values:
            if value not in known:
                raise UserError(f"config.search.{name}: {value!r}, expected of {', '.join(known)}")
    for name in ("population", "tournament", "threads"):
        if options[name] < 1:
            raise UserError(f"config.search.{name}: {options[name]}, expected 1 or more")
    return stages, space, equal


class _Monitor:
    """Progress lines and the saved state."""

    def __init__(
        self, splits, scorers: list[Scorer], settings, stages, state, path, identity, options, say
    ):
        self._splits, self._scorers, self._settings = splits, scorers, settings
        self._stages, self._path, self._identity = stages, path, identity
        self._options, self._say = options, say
        self._before = state.seconds if state else 0.0
        self._start = self._saved = self._logged = time.monotonic()
        self._count = 0
        if state and state.best:
            say(f"going on after {_done(state, stages)} trees from {path}")

    def after_tree(self, state: State, improved: bool) -> None:
        now = time.monotonic()
        self._count += 1
        state.seconds = self._before + now - self._start
        if improved:
            tree = dataclasses.replace(self._settings, root=state.best[1])
            scores = [state.best[0]] + [scorer.score(tree).mean for scorer in self._scorers[1:]]
            state.history.append({"tried": _done(state, self._stages), "scores": scores})
        if now - self._logged >= self._options.log_seconds:
            self._logged = now
            self._say(self._line(state, now))
        if now - self._saved >= self._options.save_seconds:
            self.save(state)
            self._saved = time.monotonic()

    def _line(self, state: State, now: float) -> str:
        stage = self._stages[state.stage]
        rate = self._count / (now - self._start)
        left = sum(stage.num_trees for stage in self._stages) - _done(state, self._stages)
        minutes, seconds = divmod(round(left / rate), 60)
        return (
            f"stage {stage.moves}: tree {state.tried}/{stage.num_trees}  "
            f"{3600 * rate:.0f} trees/hour  best {_scores(self._splits, self.best_scores(state))}  "
            f"left {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        )

    def best_scores(self, state: State) -> list[float]:
        return state.history[-1]["scores"]

    def save(self, state: State) -> None:
        content = {"format": STATE_FORMAT, "identity": self._identity, "state": state.to_json()}
        write_text(self._path, json.dumps(content))


def load_state(path: epath.Path, identity: Mapping[str, Any]) -> State | None:
    """State of an interrupted (or finished) search, None where there is none.

    Raises:
      UserError: a broken file, or of a search with other inputs or settings.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(read_text(path))
        known, version = content["identity"], content["format"]
        state = State.from_json(content["state"], str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no readable state ({error}); remove it to start anew") from error
    for name, value in {**identity, "format": STATE_FORMAT}.items():
        found = version if name == "format" else known.get(name)
        if found != value:
            raise UserError(
                f"{path}: belongs to a search with other {name} ({str(found)[:60]}, now "
                f"{str(value)[:60]}); remove it or give another --output"
            )
    return state


def _identity(
    tables: Tables, preparation: Preparation, options, dataset: Dataset, splits: list[str]
) -> dict[str, Any]:
    """What decides about the result: a state with another identity is refused."""
    searched = options.to_dict()
    for name in ("threads", "cache_gigabytes", "save_seconds", "log_seconds", "naive"):
        del searched[name]
    images = hashlib.sha256("\n".join(tables.image_ids).encode()).hexdigest()[:16]
    return {
        "inputs": [[table.name, table.reader.num_rows] for table in tables.tables],
        "images": images,
        "dataset": [dataset.meta["name"], dataset.num_images, len(dataset.boxes)],
        "splits": splits[:1],
        "preparation": _digest(tables, preparation),
        "settings": json.loads(json.dumps(searched)),
    }


def _digest(tables: Tables, preparation: Preparation) -> str:
    """Hash of all that decides which rows enter the trees, with which scores."""
    content = hashlib.sha256(f"{preparation.expansion} {preparation.min_score}".encode())
    for array in (preparation.kept, preparation.weights, *(t.label_codes for t in tables.tables)):
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()[:16]


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
        say=lambda text: print(text, flush=True),
    )


if __name__ == "__main__":
    define_flags()
    run_main(main)
