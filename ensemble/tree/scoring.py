"""mAP of many candidate ensembles of the same tables, exactly as the metric has it at some IoUs.

The tables are read and prepared once. The images are cut into shards of bounded size
(`ensemble.tree.shards`), which threads score one after another: what a candidate needs beside the
tables' rows is bounded by the shards that are worked on. Folds of a split are runs of images in the
order of their ids; no shard is of two, so that a candidate has a score on each fold too.

Shape legend: K classes, n rows, m merged rows, F folds.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cachetools
import numpy as np
from jaxtyping import Float, Int

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.io.parallel import map_ordered, prefetch
from common.io.progress import Progress
from common.metrics import openimages
from common.metrics.rules import make_rule
from ensemble.chunks import aligned_chunks
from ensemble.inputs import Tables
from ensemble.operators.groups import Rows, rank_rows
from ensemble.preparation import Preparation
from ensemble.tree import binary_tree as trees
from ensemble.tree.join import NodeRows
from ensemble.tree.shards import Shard

SHARD_ROWS = 1 << 19


class Score(NamedTuple):
    """mAP, and AP of every class (NaN where a class has nothing to find)."""

    mean: float
    aps: Float[np.ndarray, " K"]


class Scorer:
    """Scores trees on one split; joined subtrees are kept and used again.

    Use `build_scorers`. `num_joins` counts the nodes that were computed.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        shard_folds: Sequence[int],
        counts: Float[np.ndarray, "F K"],
        models: Sequence[str],
        group_of_weight: float,
        *,
        threads: int,
        cache_bytes: int,
    ):
        self._shards, self._shard_folds = shards, shard_folds
        self._fold_counts, self._counts = counts, counts.sum(axis=0)
        self._group_of_weight, self._threads = group_of_weight, threads
        self.models = tuple(models)
        size = cache_bytes // len(shards)
        self._caches: list[cachetools.LRUCache[tuple, NodeRows]] = [
            cachetools.LRUCache(size, lambda rows: rows.nbytes) for _ in shards
        ]
        self.num_joins = 0

    @property
    def num_rows(self) -> int:
        """Judged detections of all models."""
        return sum(len(rows.scores) for shard in self._shards for rows in shard.leaves)

    def score(self, tree: trees.Tree) -> Score:
        """mAP of what `tree.apply` would make of the tables."""

        def evaluate(index: int) -> list[openimages.Entries]:
            return self._shards[index].entries(self._rows(index, tree, tree.root, keep=False))

        return self._score(evaluate)

    def score_folds(self, tree: trees.Tree) -> Float[np.ndarray, " F"]:
        """mAP of a tree on each fold that has something to find."""
        parts = [
            self._shards[index].entries(self._rows(index, tree, tree.root))
            for index in range(len(self._shards))
        ]
        scores = []
        for fold, counts in enumerate(self._fold_counts):
            own = [p for p, of in zip(parts, self._shard_folds, strict=True) if of == fold]
            if (counts > 0).any():
                scores.append(self._score_entries(own, counts).mean)
        return np.array(scores)

    def score_operator(self, apply: Callable[[Rows], tuple[Rows, Int[np.ndarray, " m"]]]) -> Score:
        """mAP of a function of the rows of all models, such as a flat NMS."""

        def evaluate(index: int) -> list[openimages.Entries]:
            leaves = self._shards[index].leaves
            sizes = [len(leaf.scores) for leaf in leaves]
            rows, source = apply(
                Rows(
                    group=np.concatenate([leaf.group for leaf in leaves]).astype(np.int64),
                    scores=np.concatenate([leaf.scores for leaf in leaves]),
                    boxes=np.concatenate([leaf.columns.T for leaf in leaves]),
                    model=np.repeat(np.arange(len(leaves), dtype=np.int32), sizes),
                )
            )
            order = rank_rows(rows.group, rows.scores)
            return self._shards[index].entries(
                NodeRows(
                    group=rows.group[order],
                    scores=rows.scores[order],
                    columns=np.ascontiguousarray(rows.boxes[order].T),
                    source=np.concatenate([leaf.source for leaf in leaves])[source[order]],
                    moved=np.ones(len(order), bool),
                )
            )

        return self._score(evaluate)

    def _score(self, evaluate: Callable[[int], list[openimages.Entries]]) -> Score:
        parts = list(map_ordered(evaluate, range(len(self._shards)), threads=self._threads))
        return self._score_entries(parts, self._counts)

    def _score_entries(
        self, parts: Sequence[list[openimages.Entries]], counts: Float[np.ndarray, " K"]
    ) -> Score:
        """Of the entries of shards, each at all IoU thresholds."""
        aps = np.mean(
            [
                openimages.average_precisions(list(part), counts, self._group_of_weight)
                for part in zip(*parts, strict=True)
            ],
            axis=0,
        )
        return Score(float(np.mean(aps[counts > 0])), aps)

    def _rows(
        self, index: int, tree: trees.Tree, node: trees.Leaf | trees.Node, keep: bool = True
    ) -> NodeRows:
        if isinstance(node, trees.Leaf):
            return self._shards[index].leaves[self.models.index(node.model)]
        cache, key = self._caches[index], (tree.iou_threshold, tree.sigma, tree.min_score, node)
        if (rows := cache.get(key)) is None:
            left, right = (self._rows(index, tree, child) for child in (node.left, node.right))
            rows = trees.join_children(tree, node.operators, left, right)
            self.num_joins += index == 0
            if keep:
                with contextlib.suppress(ValueError):  # larger than the whole cache
                    cache[key] = rows
        return rows


def build_scorers(
    dataset: Dataset,
    splits: Sequence[str],
    tables: Tables,
    preparation: Preparation,
    *,
    metric: str = "",
    iou_thresholds: Sequence[float] = (0.5,),
    group_of_weight: float = 1.0,
    image_labels: bool = True,
    folds: int = 1,
    threads: int = 2,
    cache_bytes: int = 1 << 31,
    shard_rows: int | None = None,
    say: Callable[[str], None] = print,
) -> list[Scorer]:
    """Reads the tables once and prepares scoring on each split.

    Args:
      dataset: holds the truth; the tables must be opened with `labels=dataset.class_labels`.
      splits: of the dataset, without common images.
      tables: cover all images of the splits; others are left out.
      preparation: of the tables' rows; with expansion "after", what a candidate makes of them is
        copied to parent classes before it is scored, as `ensemble.merge` does.
      metric: whose rules say which detections count, see `common.metrics.rules.make_rule`.
      iou_thresholds: AP is the mean over these.
      group_of_weight: of openimages.
      image_labels: of openimages.
      folds: of the images of each split, for `Scorer.score_folds`.
      threads: shards to score side by side.
      cache_bytes: for joined subtrees, of each split.
      shard_rows: rows of all tables in a shard, about; SHARD_ROWS unless given.
      say: where notes go.

    Raises:
      UserError: a split that the tables do not cover, without truth, or that shares images with
        another one; broken rows.
    """
    if list(tables.labels) != list(dataset.class_labels):
        raise ValueError("open the tables with labels=dataset.class_labels")
    indices = dataset.find_images(tables.image_ids)
    owner = np.full(len(indices), -1)  # shard of each image
    place = np.zeros(len(indices), np.int64)  # number of the image within its shard
    rule = make_rule(dataset, metric, image_labels=image_labels, group_of_weight=group_of_weight)
    shard_images = max((shard_rows or SHARD_ROWS) * len(indices) // tables.num_rows, 1)
    shards: list[Shard] = []
    scorers = []
    for split in splits:
        wanted = dataset.split(split)
        inside = np.flatnonzero(np.isin(indices, wanted))
        _check_cover(dataset, split, wanted, indices[inside], owner[inside])
        parts_of_folds = np.array_split(inside, min(folds, len(inside)))
        counts = np.stack([rule.counts(indices[part]) for part in parts_of_folds])
        if not counts.any():
            raise UserError(f"{dataset.directory}: split {split!r} has no ground-truth boxes")
        parts, shard_folds = [], []
        for fold, images in enumerate(parts_of_folds):
            # As many shards for each thread.
            number = -(-len(images) // shard_images // threads) * threads
            cut = [part for part in np.array_split(images, number) if len(part)]
            parts += cut
            shard_folds += [fold] * len(cut)
        for part in parts:
            owner[part], place[part] = len(shards), np.arange(len(part))
            truth = rule.truth(indices[part])
            shards.append(
                Shard(truth, preparation, dataset.num_classes, iou_thresholds, rule.group_of_weight)
            )
        scorers.append(
            Scorer(
                shards[-len(parts) :],
                shard_folds,
                counts,
                tables.names,
                rule.group_of_weight,
                threads=threads,
                cache_bytes=cache_bytes,
            )
        )
    _read_rows(shards, owner, place, tables, preparation, say)
    for split, scorer in zip(splits, scorers, strict=True):
        say(f"{split}: {scorer.num_rows} detections are of classes judged in their image")
    return scorers


def _read_rows(
    shards: Sequence[Shard],
    owner: Int[np.ndarray, " images"],
    place: Int[np.ndarray, " images"],
    tables: Tables,
    preparation: Preparation,
    say: Callable[[str], None],
) -> None:
    """Gives every shard the rows of its images, and closes it when the last one was read."""
    last = [int(np.flatnonzero(owner == number)[-1]) for number in range(len(shards))]
    progress = Progress(len(tables.image_ids), what="reading", say=say)
    waiting = set(range(len(shards)))
    for chunk in prefetch(aligned_chunks(tables)):
        rows = preparation.apply(chunk)
        owners = owner[rows.images]
        for number in np.unique(owner[chunk.first : chunk.stop]):
            if number < 0:
                continue
            own = np.flatnonzero(owners == number)
            shards[number].add(
                rows.models[own],
                place[rows.images[own]],
                rows.labels[own],
                rows.scores[own],
                rows.boxes[own],
            )
        for number in [number for number in waiting if last[number] < chunk.stop]:
            shards[number].close(len(tables.names))
            waiting.remove(number)
        progress.report(chunk.stop)


def _check_cover(dataset, split, wanted, covered, owner) -> None:
    missing = np.setdiff1d(wanted, covered)
    if len(missing):
        raise UserError(
            f"--inputs: the tables cover {len(covered)} of the {len(wanted)} images of split "
            f"{split!r}, {dataset.image_id(missing[0])!r} is missing"
        )
    shared = covered[owner >= 0]
    if len(shared):
        raise UserError(
            f"{dataset.directory}: split {split!r} shares {len(shared)} images with the split to "
            f"tune on ({dataset.image_id(shared[0])!r}), expected separate ones: over-fitting "
            "would not show"
        )
