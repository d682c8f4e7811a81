"""OpenImages mAP of many candidate ensembles of the same tables, exactly as the metric has it.

What does not change from candidate to candidate is done once: reading and preparing the tables,
dropping detections that the metric does not judge (an image and class is a group of its own for
every operator, so they touch nothing else), and the overlaps of every input detection with the
truth. A candidate's row that kept its box looks its match up; only fused boxes are compared anew.
Ranking, matching and AP are those of `common.metrics.openimages`.

The images are cut into shards of bounded size, which threads score one after another: what a
candidate needs beside the tables' rows is bounded by the shards that are worked on.

Shape legend: I images of a shard, K classes, n rows, c copies of rows, G groups (image and class)
whose rows can count, E judged groups.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import cachetools
import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.io.parallel import map_ordered, prefetch
from common.io.progress import Progress
from common.metrics import matching, openimages
from common.metrics.rules import make_rule
from common.tables.ranges import expand_ranges
from ensemble.chunks import aligned_chunks
from ensemble.inputs import Tables
from ensemble.operators.groups import Rows, rank_rows
from ensemble.preparation import Preparation
from ensemble.tree import binary_tree as trees
from ensemble.tree.join import NodeRows, leaf_rows

SHARD_ROWS = 1 << 19
_NONE, _NO_AREA = -1, -2
# Of every group: its first copy and the number of copies; of every copy: its judged group.
_Copies = tuple[np.ndarray, np.ndarray, np.ndarray]


class Score(NamedTuple):
    """mAP, and AP of every class (NaN where a class has nothing to find)."""

    mean: float
    aps: Float[np.ndarray, " K"]


class Shard:
    """Truth of some images, the detections of all models there, and their overlaps with it."""

    def __init__(
        self,
        truth: openimages.Truth,
        preparation: Preparation,
        num_classes: int,
        options: Mapping[str, float],
    ):
        self._options = options
        self._num_classes = num_classes
        judged, counting = truth.evaluated, truth.evaluated
        if preparation.expansion == "after" and preparation.parents is not None:
            # A merged detection is judged in its class and in the parents of that.
            parents = preparation.parents.astype(np.float32)
            counting = judged | (judged.astype(np.float32) @ parents.T > 0)
        # Groups are numbered densely, in order of image and class.
        self._number = _numbered(counting)
        judged_number = _numbered(judged)
        self._num_judged = int(judged.sum())
        self._classes = (np.flatnonzero(judged) % num_classes).astype(np.int16)
        self._copies: _Copies | None = None
        images, labels = np.nonzero(counting)
        if (expanded := preparation.expand_merged(labels)) is not None:
            rows, copies = expanded
            targets = judged_number[images[rows] * num_classes + copies]
            rows, targets = rows[targets >= 0], targets[targets >= 0]
            counts = np.bincount(rows, minlength=len(labels))
            self._copies = np.cumsum(counts) - counts, counts, targets
        numbers = judged_number[truth.keys]
        single = ~truth.group_of
        self._single = truth.boxes[single], numbers[single]
        self._group_of = truth.boxes[~single], numbers[~single]
        self._parts: list[tuple[np.ndarray, ...]] = []
        self.leaves: list[NodeRows] = []

    def add(
        self,
        models: Int[np.ndarray, " n"],
        images: Int[np.ndarray, " n"],
        labels: Int[np.ndarray, " n"],
        scores: Float[np.ndarray, " n"],
        boxes: Float[np.ndarray, "n 4"],
    ) -> None:
        """Takes prepared rows; `images` count within the shard. Rows that never count are left."""
        group = self._number[images.astype(np.int64) * self._num_classes + labels]
        kept = group >= 0
        self._parts.append(tuple(array[kept] for array in (models, group, scores, boxes)))

    def close(self, num_models: int) -> None:
        """Sorts what was added and computes the overlaps with the truth."""
        models, group, scores, boxes = (
            np.concatenate(arrays) for arrays in zip(*self._parts, strict=True)
        )
        self._parts.clear()
        first, matches, copies = 0, [], []
        for model in range(num_models):
            own = np.flatnonzero(models == model)
            # Numbers of the sorted rows, so that a leaf's lookups are contiguous.
            source = np.arange(first, first + len(own), dtype=np.int32)
            rows = leaf_rows(group[own], scores[own], boxes[own], source)._replace(source=source)
            self.leaves.append(rows)
            first += len(own)
            if self._copies is None:
                matches.append(self._match(rows.group, rows.columns))
            else:
                row, _, group_of_copy = _judged_copies(self._copies, rows.group)
                matches.append(self._match(group_of_copy, rows.columns[:, row]))
                copies.append(np.bincount(row, minlength=len(own)))
        self._matches = np.concatenate(matches, axis=1)
        if copies:  # column of `_matches` with the first copy of each row
            self._first_copy = np.cumsum(np.concatenate([[0], *copies]))[:-1].astype(np.int32)

    def _copied_to_parents(self, judged_copies: _Copies, rows: NodeRows) -> NodeRows:
        """Judged copies of a candidate's rows; `source` is then the column of `_matches`."""
        row, number, group = _judged_copies(judged_copies, rows.group)
        order = rank_rows(group, rows.scores[row])
        row, number, group = row[order], number[order], group[order]
        return NodeRows(
            group=group,
            scores=rows.scores[row],
            columns=rows.columns[:, row],
            source=self._first_copy[rows.source[row]] + number,
            moved=rows.moved[row],
        )

    def _match(
        self, group: Int[np.ndarray, " n"], columns: Float[np.ndarray, "4 n"]
    ) -> Int[np.ndarray, "2 n"]:
        """Single box that a detection may take and group-of box that it lies in, _NONE without."""
        x0, y0, x1, y1 = columns
        matches = np.full((2, len(group)), _NO_AREA, np.int32)
        solid = np.flatnonzero((x0 < x1) & (y0 < y1))
        boxes, group = columns.T[solid].astype(np.float64), group[solid]
        for row, (truth, numbers), union in (
            (matches[0], self._single, True),
            (matches[1], self._group_of, False),
        ):
            overlap, best = matching.best_overlaps(
                boxes, group, truth, numbers, self._num_judged, union=union
            )
            row[solid] = np.where(overlap >= self._options["iou_threshold"], best, _NONE)
        return matches

    def entries(self, rows: NodeRows) -> openimages.Entries:
        """Outcomes of a candidate's rows, as the metric would have them."""
        if self._copies is not None:
            rows = self._copied_to_parents(self._copies, rows)
        single, inside = self._matches[:, rows.source]
        fused = np.flatnonzero(rows.moved)
        if len(fused):
            columns = rows.columns[:, fused]
            single[fused], inside[fused] = self._match(rows.group[fused], columns)
        group, scores = rows.group, rows.scores
        counted = single != _NO_AREA
        if len(group) > matching.MAX_PER_CLASS:
            number = np.cumsum(counted)
            starts = np.flatnonzero(np.diff(group, prepend=-1))
            before = np.repeat(number[starts] - counted[starts], np.diff(starts, append=len(group)))
            counted &= number - before <= matching.MAX_PER_CLASS
        if not counted.all():
            group, scores, single, inside = (a[counted] for a in (group, scores, single, inside))

        kinds = np.full(len(group), matching.FALSE, np.int8)
        # Rows fall in score within a group: written in reverse, the best claim on a box stays.
        claims = np.flatnonzero(single >= 0)[::-1]
        taker = np.full(len(self._single[1]), -1)
        taker[single[claims]] = claims
        kinds[taker[taker >= 0]] = matching.TRUE
        absorbed = (kinds == matching.FALSE) & (inside >= 0)
        claims = np.flatnonzero(absorbed)[::-1]
        group_scores = np.zeros(len(self._group_of[1]), np.float32)
        group_scores[inside[claims]] = scores[claims]
        hit = (group_scores > 0) & (self._options["group_of_weight"] > 0)

        kept = ~absorbed
        group = np.concatenate([group[kept], self._group_of[1][hit]])
        scores = np.concatenate([scores[kept], group_scores[hit]])
        kinds = np.concatenate([kinds[kept], np.full(hit.sum(), matching.GROUP, np.int8)])
        order = np.argsort(group, kind="stable")
        return openimages.Entries(self._classes[group[order]], scores[order], kinds[order])


class Scorer:
    """Scores trees on one split; joined subtrees are kept and used again.

    Use `build_scorers`. `num_joins` counts the nodes that were computed.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        counts: Float[np.ndarray, " K"],
        models: Sequence[str],
        group_of_weight: float,
        *,
        threads: int,
        cache_bytes: int,
    ):
        self._shards, self._counts = shards, counts
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

        def evaluate(index: int) -> openimages.Entries:
            return self._shards[index].entries(self._rows(index, tree, tree.root, keep=False))

        return self._score(evaluate)

    def score_operator(self, apply: Callable[[Rows], tuple[Rows, Int[np.ndarray, " m"]]]) -> Score:
        """mAP of a function of the rows of all models, such as a flat NMS."""

        def evaluate(index: int) -> openimages.Entries:
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

    def _score(self, evaluate: Callable[[int], openimages.Entries]) -> Score:
        parts = list(map_ordered(evaluate, range(len(self._shards)), threads=self._threads))
        aps = openimages.average_precisions(parts, self._counts, self._group_of_weight)
        return Score(float(np.mean(aps[self._counts > 0])), aps)

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


def _judged_copies(
    copies: _Copies, group: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " c"], Int[np.ndarray, " c"], Int[np.ndarray, " c"]]:
    """Row of each judged copy, its number among the row's copies, and its judged group."""
    starts, counts, targets = copies
    row, copy = expand_ranges(starts[group], counts[group])
    return row, copy - starts[group[row]], targets[copy]


def _numbered(chosen: Bool[np.ndarray, "I K"]) -> Int32[np.ndarray, " I*K"]:
    """Number of each chosen pair of image and class in their order, -1 for the others."""
    flat = chosen.ravel()
    return np.where(flat, np.cumsum(flat) - 1, -1).astype(np.int32)


def build_scorers(
    dataset: Dataset,
    splits: Sequence[str],
    tables: Tables,
    preparation: Preparation,
    *,
    metric: str = "",
    iou_threshold: float = 0.5,
    group_of_weight: float = 1.0,
    image_labels: bool = True,
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
      iou_threshold: of the metric.
      group_of_weight: of openimages.
      image_labels: of openimages.
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
    options = {"iou_threshold": iou_threshold, "group_of_weight": rule.group_of_weight}
    shard_images = max((shard_rows or SHARD_ROWS) * len(indices) // tables.num_rows, 1)
    shards: list[Shard] = []
    scorers = []
    for split in splits:
        wanted = dataset.split(split)
        inside = np.flatnonzero(np.isin(indices, wanted))
        _check_cover(dataset, split, wanted, indices[inside], owner[inside])
        counts = rule.counts(indices[inside])
        if not counts.any():
            raise UserError(f"{dataset.directory}: split {split!r} has no ground-truth boxes")
        # As many shards for each thread.
        number = -(-len(inside) // shard_images // threads) * threads
        parts = [part for part in np.array_split(inside, number) if len(part)]
        for part in parts:
            owner[part], place[part] = len(shards), np.arange(len(part))
            truth = rule.truth(indices[part])
            shards.append(Shard(truth, preparation, dataset.num_classes, options))
        scorers.append(
            Scorer(
                shards[-len(parts) :],
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
