"""What a search tells of ensembles: their mAP on each split, in a table and beside the tree."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ensemble.inputs import Tables
from ensemble.operators.groups import apply_operator
from ensemble.operators.operator import Operator
from ensemble.tree import binary_tree as trees
from ensemble.tree.evolution import Stage
from ensemble.tree.scoring import Scorer

Scores = list[float]  # mAP on each split


@dataclasses.dataclass(frozen=True)
class SplitScorers:
    """Scores ensembles on the splits of a search.

    Attributes:
      splits: names, the tuned one first.
      scorers: of each.
      settings: models and thresholds of all trees; its root is not used.
    """

    splits: Sequence[str]
    scorers: Sequence[Scorer]
    settings: trees.Tree

    @property
    def tuned(self) -> Scorer:
        """Of the split that steers the search."""
        return self.scorers[0]

    def tree(self, root: trees.Leaf | trees.Node) -> trees.Tree:
        return dataclasses.replace(self.settings, root=root)

    def score(self, root: trees.Leaf | trees.Node) -> Scores:
        return [scorer.score(self.tree(root)).mean for scorer in self.scorers]

    def score_singles(self) -> dict[str, Scores]:
        """Of each table alone."""
        return {model: self.score(trees.Leaf(model)) for model in self.settings.models}

    def score_operator(self, operator: Operator) -> Scores:
        return [
            scorer.score_operator(lambda rows: apply_operator(rows, operator)).mean
            for scorer in self.scorers
        ]

    def text(self, scores: Scores) -> str:
        pairs = zip(self.splits, scores, strict=True)
        return " ".join(f"{split} {score:.4f}" for split, score in pairs)


def comparison_rows(
    scorers: SplitScorers,
    singles: Mapping[str, Scores],
    naive: Operator,
    winners: Mapping[str, trees.Leaf | trees.Node],
    best: trees.Tree,
) -> dict[str, Scores]:
    """Scores by ensemble: the tables alone, the naive ensemble, winners of stages, and the tree.

    Args:
      scorers: on each split.
      singles: of `SplitScorers.score_singles`.
      naive: operator of the ensemble to compare with.
      winners: roots by stage, of all stages but the last.
      best: the tree that the search ends with.
    """
    rows = {f"single {model}": scores for model, scores in singles.items()}
    rows["naive ensemble"] = scorers.score_operator(naive)
    for stage, root in winners.items():
        rows[f"tree after stage {stage}"] = scorers.score(root)
    rows["tree"] = scorers.score(best.root)
    return rows


def make_notes(
    scorers: SplitScorers,
    rows: Mapping[str, Scores],
    best: trees.Tree,
    stages: Sequence[Stage],
    tables: Tables,
) -> dict[str, Any]:
    """What the file of the tree says beside it."""
    return {
        "splits": scorers.splits,
        "scores": rows,
        "nodes": {path: scorers.score(node) for node, path in trees.walk(best.root)},
        "trees": sum(stage.num_trees for stage in stages),
        "inputs": {table.name: str(table.reader.path) for table in tables.tables},
    }


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
