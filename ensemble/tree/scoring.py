"""OpenImages mAP of many candidate ensembles of the same tables, exactly as the metric has it.

What does not change from candidate to candidate is done once: reading the tables, dropping
detections of classes that the metric does not judge in their image (an image and class is a group
of its own for every operator, so they touch nothing else), and the overlaps of every input
detection with the truth. A candidate's row that kept its box looks its match up; only fused boxes
are compared anew. Ranking, matching and AP are those of `common.metrics.openimages`.

The images are cut into shards that threads work on side by side.

Shape legend: I images of a shard, K classes, n rows, E judged (image, class) groups of a shard,
s single and g group-of boxes of the truth.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.metrics import matching, openimages
from common.tables.hierarchy import ancestors
from ensemble.inputs import Tables, aligned_chunks
from ensemble.operators.groups import Rows, rank_rows
from ensemble.tree import binary_tree as trees
from ensemble.tree.join import NodeRows, leaf_rows

_NONE, _NO_AREA = -1, -2


class Score(NamedTuple):
    """mAP, and AP of every class (NaN where a class has nothing to find)."""

    mean: float
    aps: Float[np.ndarray, " K"]


class Shard:
    """Truth of some images, the detections of all models there, and their overlaps with it."""

    def __init__(self, truth: openimages.Truth, num_classes: int, options: Mapping[str, float]):
        self._options = options
        evaluated = truth.evaluated.ravel()
        # Judged groups are numbered densely, in order of image and class.
        keys = np.flatnonzero(evaluated)
        self._number = np.where(evaluated, np.cumsum(evaluated) - 1, -1).astype(np.int32)
        self._num_groups = len(keys)
        self._classes = (keys % num_classes).astype(np.int16)
        self._num_classes = num_classes
        single = ~truth.group_of
        numbers = self._number[truth.keys]
        self._single = truth.boxes[single], numbers[single]
        self._group_of = truth.boxes[~single], numbers[~single]
        self._parts: dict[str, list[tuple[np.ndarray, ...]]] = collections.defaultdict(list)
        self.leaves: dict[str, NodeRows] = {}

    def add(self, model: str, images: np.ndarray, labels: np.ndarray, *arrays: np.ndarray) -> None:
        """Takes rows (image of the shard, class, score, box) of a model; keeps the judged ones."""
        group = self._number[images.astype(np.int64) * self._num_classes + labels]
        judged = group >= 0
        self._parts[model].append((group[judged], *(array[judged] for array in arrays)))

    def close(self, models: Sequence[str]) -> None:
        """Sorts what was added and computes the overlaps with the truth."""
        first = 0
        matches = []
        for model in models:
            group, scores, boxes = (
                np.concatenate(arrays) for arrays in zip(*self._parts.pop(model), strict=True)
            )
            rows = leaf_rows(group, scores, boxes, np.arange(len(group), dtype=np.int32))
            # Numbers of the sorted rows, so that a leaf's lookups are contiguous.
            source = np.arange(first, first + len(group), dtype=np.int32)
            self.leaves[model] = rows._replace(source=source)
            matches.append(self._match(rows.group, rows.columns))
            first += len(group)
        self._matches = np.concatenate(matches, axis=1)

    def _match(
        self, group: Int[np.ndarray, " n"], columns: Float[np.ndarray, "4 n"]
    ) -> Int[np.ndarray, "2 n"]:
        """Single box that a detection may take and group-of box that it lies in, _NONE without."""
        x0, y0, x1, y1 = columns
        found = np.full((2, len(group)), _NO_AREA, np.int32)
        solid = np.flatnonzero((x0 < x1) & (y0 < y1))
        boxes, group = columns.T[solid].astype(np.float64), group[solid]
        for row, (truth, numbers), union in (
            (found[0], self._single, True),
            (found[1], self._group_of, False),
        ):
            overlap, best = matching.best_overlaps(
                boxes, group, truth, numbers, self._num_groups, union=union
            )
            row[solid] = np.where(overlap >= self._options["iou_threshold"], best, _NONE)
        return found

    def entries(self, rows: NodeRows) -> openimages.Entries:
        """Outcomes of a candidate's rows, as `openimages.match_chunk` would have them."""
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
        cache_bytes: int,
    ):
        self._shards, self._counts = shards, counts
        self._group_of_weight = group_of_weight
        self.models = tuple(models)
        self._caches = [_Cache(cache_bytes // len(shards)) for _ in shards]
        self._pool = ThreadPoolExecutor(len(shards)) if len(shards) > 1 else None
        self.num_joins = 0

    @property
    def num_rows(self) -> int:
        """Judged detections of all models."""
        return sum(len(rows.scores) for shard in self._shards for rows in shard.leaves.values())

    def score(self, tree: trees.Tree) -> Score:
        """mAP of what `tree.apply` would make of the tables."""

        def evaluate(index: int) -> openimages.Entries:
            return self._shards[index].entries(self._rows(index, tree, tree.root, keep=False))

        return self._score(evaluate)

    def score_operator(self, apply: Callable[[Rows], tuple[Rows, Int[np.ndarray, " m"]]]) -> Score:
        """mAP of a function of the rows of all models, such as a flat NMS."""

        def evaluate(index: int) -> openimages.Entries:
            leaves = [self._shards[index].leaves[model] for model in self.models]
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
        indices = range(len(self._shards))
        parts = list(self._pool.map(evaluate, indices) if self._pool else map(evaluate, indices))
        aps = openimages.average_precisions(parts, self._counts, self._group_of_weight)
        return Score(float(np.mean(aps[self._counts > 0])), aps)

    def _rows(
        self, index: int, tree: trees.Tree, node: trees.Leaf | trees.Node, keep: bool = True
    ) -> NodeRows:
        if isinstance(node, trees.Leaf):
            return self._shards[index].leaves[node.model]
        cache, key = self._caches[index], (tree.iou_threshold, tree.sigma, tree.min_score, node)
        if (rows := cache.get(key)) is None:
            left, right = (self._rows(index, tree, child) for child in (node.left, node.right))
            rows = trees.join_children(tree, node.operators, left, right)
            self.num_joins += index == 0
            if keep:
                cache.put(key, rows)
        return rows


class _Cache:
    """Rows of subtrees, the least recently used thrown out beyond a number of bytes."""

    def __init__(self, limit: int):
        self._limit, self._size = limit, 0
        self._rows: collections.OrderedDict[tuple, NodeRows] = collections.OrderedDict()

    def get(self, key: tuple) -> NodeRows | None:
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def put(self, key: tuple, rows: NodeRows) -> None:
        self._rows[key] = rows
        self._size += rows.nbytes
        while self._size > self._limit:
            self._size -= self._rows.popitem(last=False)[1].nbytes


def build_scorers(
    dataset: Dataset,
    splits: Sequence[str],
    tables: Tables,
    *,
    iou_threshold: float = 0.5,
    group_of_weight: float = 1.0,
    image_labels: bool = True,
    num_shards: int = 2,
    cache_bytes: int = 1 << 31,
    say: Callable[[str], None] = print,
) -> list[Scorer]:
    """Reads the tables once and prepares scoring on each split.

    Args:
      dataset: holds the truth; the tables must be opened with `labels=dataset.class_labels`.
      splits: of the dataset, without common images.
      tables: cover all images of the splits; others are left out.
      iou_threshold: of the metric.
      group_of_weight: of the metric.
      image_labels: of the metric.
      num_shards: threads to score with.
      cache_bytes: for joined subtrees, of each split.
      say: where notes go.

    Raises:
      UserError: a split that the tables do not cover, without truth, or that shares images with
        another one; broken rows.
    """
    if list(tables.labels) != list(dataset.class_labels):
        raise ValueError("open the tables with labels=dataset.class_labels")
    indices = dataset.find_images(tables.image_ids)
    owner = np.full(len(indices), -1)
    options = {"iou_threshold": iou_threshold, "group_of_weight": group_of_weight}
    parents = ancestors(dataset.hierarchy, dataset.class_labels)
    shards: list[Shard] = []
    place = np.zeros(len(indices), np.int64)  # image within its shard
    scorers = []
    for split in splits:
        wanted = dataset.split(split)
        inside = np.flatnonzero(np.isin(indices, wanted))
        _check_cover(dataset, split, wanted, indices[inside], owner[inside])
        counts = openimages.count_truth(dataset, indices[inside], parents, group_of_weight)
        if not counts.any():
            raise UserError(f"{dataset.directory}: split {split!r} has no ground-truth boxes")
        parts = [part for part in np.array_split(inside, num_shards) if len(part)]
        for part in parts:
            owner[part], place[part] = len(shards), np.arange(len(part))
            truth = openimages.gather_truth(dataset, indices[part], parents, image_labels)
            shards.append(Shard(truth, dataset.num_classes, options))
        scorers.append(
            Scorer(shards[-len(parts) :], counts, tables.names, group_of_weight, cache_bytes)
        )
    read = 0
    for chunk in aligned_chunks(tables):
        owners = owner[chunk.images]
        for number, shard in enumerate(shards):
            for model, name in enumerate(tables.names):
                rows = np.flatnonzero((owners == number) & (chunk.models == model))
                shard.add(
                    name,
                    place[chunk.images[rows]],
                    chunk.labels[rows],
                    chunk.scores[rows],
                    chunk.boxes[rows],
                )
        read += len(chunk)
        say(f"read {read} of {tables.num_rows} detections")
    for shard in shards:
        shard.close(tables.names)
    for split, scorer in zip(splits, scorers, strict=True):
        say(f"{split}: {scorer.num_rows} detections are of classes judged in their image")
    return scorers


def _check_cover(dataset, split, wanted, found, owner) -> None:
    missing = np.setdiff1d(wanted, found)
    if len(missing):
        raise UserError(
            f"--inputs: the tables cover {len(found)} of the {len(wanted)} images of split "
            f"{split!r}, {dataset.image_id(missing[0])!r} is missing"
        )
    shared = found[owner >= 0]
    if len(shared):
        raise UserError(
            f"{dataset.directory}: split {split!r} shares {len(shared)} images with the split to "
            f"tune on ({dataset.image_id(shared[0])!r}), expected separate ones: over-fitting "
            "would not show"
        )
