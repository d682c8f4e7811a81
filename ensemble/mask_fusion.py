"""Merging by masks: averaged masks, and NMS by the overlap of masks.

`config.mask_rule` "best" keeps the mask of the best box of a cluster, "mean" takes the pixels that
more than half of the cluster's masks have, each mask weighing as much as its score. A row belongs
to the merged detection of its image and class whose box it overlaps most, if their IoU is greater
than the operator's `iou_threshold`; the row that a merged detection stems from belongs to it in any
case. Masks are averaged as run lengths, without making pixels.

With `config.mask_match` "masks" rows overlap by the IoU of their masks instead of their boxes:
greedy NMS, after which a row belongs to the kept one that dropped it.

Shape legend: n rows that entered the ensemble, m merged ones, c clusters, e ends of runs.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, Int64

from common.geometry.boxes import paired_iou
from common.masks import rle
from common.masks.rle.counts import counts_of_ones, ones
from common.tables.ranges import expand_ranges, pieces
from ensemble.operators import Operator
from ensemble.operators.groups import Rows, apply_operator, rank_rows

_PAIRS = 1 << 22  # of a row and a merged one at once
_CHARACTERS = 1 << 22  # of masks at once
_NO_SCORE = 1e-9  # weight of a mask with score 0


def merge_rows(
    rows: Rows,
    operator: Operator,
    counts: np.ndarray,
    sizes: Int32[np.ndarray, "n 2"],
    *,
    rule: str,
    match: str,
) -> tuple[Rows, np.ndarray, Int32[np.ndarray, "m 2"]]:
    """Applies an operator to rows with masks.

    Args:
      rows: of all models.
      operator: what makes one list of each group.
      counts: of the masks of the rows.
      sizes: their height and width.
      rule: "best" or "mean".
      match: "boxes" or "masks".

    Returns:
      Merged rows, counts of their masks, and their height and width.
    """
    threshold = vars(operator)["iou_threshold"]  # every operator has one
    cluster = None
    if match == "masks":
        kept, cluster = mask_nms(rows, counts, sizes, threshold)
        merged = rows.take(kept)
    else:
        merged, kept = apply_operator(rows, operator)
    masks, mask_sizes = counts[kept], sizes[kept]
    if rule == "mean":
        if cluster is None:
            cluster = find_clusters(rows, merged, kept, threshold)
        masks[:] = mean_masks(counts, sizes, rows.scores, cluster, kept)
    return merged, masks, mask_sizes


def find_clusters(
    rows: Rows, merged: Rows, source: Int64[np.ndarray, " m"], iou_threshold: float
) -> Int64[np.ndarray, " n"]:
    """The merged row that each row belongs to, -1: none.

    Args:
      rows: that entered the operator.
      merged: that came out, by group.
      source: row that each of these stems from.
      iou_threshold: of the operator.
    """
    cluster = np.full(len(rows), -1, np.int64)
    first = np.searchsorted(merged.group, rows.group, "left")
    counts = np.searchsorted(merged.group, rows.group, "right") - first
    for part in pieces(counts, _PAIRS):
        row, place = expand_ranges(first[part], counts[part])
        row += part.start
        iou = paired_iou(rows.boxes[row], merged.boxes[place])
        order = np.lexsort((place, -iou, row))
        best = order[np.unique(row[order], return_index=True)[1]]
        best = best[iou[best] > iou_threshold]
        cluster[row[best]] = place[best]
    cluster[source] = np.arange(len(source))
    return cluster


def mask_nms(
    rows: Rows,
    counts: Sequence[bytes] | np.ndarray,
    sizes: Int[np.ndarray, "n 2"],
    iou_threshold: float,
) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " n"]]:
    """Greedy NMS by the IoU of masks in every group.

    Args:
      rows: in any order.
      counts: of their masks.
      sizes: height and width of these; brought to those of the best row of a group.
      iou_threshold: a row is dropped when its IoU with a kept one is greater.

    Returns:
      kept: rows, by group and falling score.
      cluster: place in `kept` of the row that each belongs to.
    """
    order = rank_rows(rows.group, rows.scores)
    starts = np.flatnonzero(_new(rows.group[order]))
    owner = np.arange(len(order))
    for start, stop in zip(starts, np.append(starts[1:], len(order)), strict=True):
        if stop - start < 2:
            continue
        group = order[start:stop]
        frame = np.asarray(sizes[group[0]], np.int64)
        texts = [_in_frame(bytes(counts[row]), np.asarray(sizes[row]), frame) for row in group]
        iou = rle.iou(texts, texts, (int(frame[0]), int(frame[1])))
        free = np.ones(len(group), bool)
        for place in range(len(group)):
            if free[place]:
                dropped = np.flatnonzero(
                    free[place + 1 :] & (iou[place, place + 1 :] > iou_threshold)
                )
                dropped += place + 1
                free[dropped] = False
                owner[group[dropped]] = group[place]
    kept = order[owner[order] == order]
    number = np.full(len(order), -1, np.int64)
    number[kept] = np.arange(len(kept))
    return kept, number[owner]


def mean_masks(
    counts: Sequence[bytes] | np.ndarray,
    sizes: Int[np.ndarray, "n 2"],
    weights: Float[np.ndarray, " n"],
    cluster: Int64[np.ndarray, " n"],
    best: Int64[np.ndarray, " c"],
) -> list[bytes]:
    """Counts of the mean mask of each cluster, of the height and width of its best row's mask.

    Args:
      counts: of the masks of the rows.
      sizes: their height and width.
      weights: not negative.
      cluster: 0..c-1 of each row, -1: of none.
      best: row of each cluster whose mask stays where it has no company.
    """
    result = [bytes(counts[row]) for row in best]
    members = np.flatnonzero(cluster >= 0)
    members = members[np.argsort(cluster[members], kind="stable")]
    of = cluster[members]
    sizes_of_clusters = np.bincount(of, minlength=len(best))
    several = np.flatnonzero(sizes_of_clusters > 1)
    first = np.cumsum(sizes_of_clusters) - sizes_of_clusters
    lengths = np.array([len(counts[row]) for row in members.tolist()], np.int64)
    total = np.concatenate([[0], np.cumsum(lengths)])
    characters = total[first[several] + sizes_of_clusters[several]] - total[first[several]]
    for part in pieces(characters, _CHARACTERS):
        chosen = several[part]
        owner, place = expand_ranges(first[chosen], sizes_of_clusters[chosen])
        rows = members[place]
        frames = np.asarray(sizes, np.int64)[best[chosen]]
        texts = [
            _in_frame(bytes(counts[row]), sizes[row], frame)
            for row, frame in zip(rows.tolist(), frames[owner], strict=True)
        ]
        found = _weighted_union(
            texts, owner, np.maximum(weights[rows], _NO_SCORE), frames.prod(axis=1)
        )
        for number, text in zip(chosen.tolist(), found, strict=True):
            result[number] = text
    return result


def _in_frame(counts: bytes, size: Int[np.ndarray, " 2"], frame: Int[np.ndarray, " 2"]) -> bytes:
    if (size == frame).all():
        return counts
    (height, width), (new_height, new_width) = size.tolist(), frame.tolist()
    return rle.resize([counts], (height, width), (new_height, new_width))[0]


def _weighted_union(
    counts: Sequence[bytes],
    owner: Int64[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
    pixels: Int[np.ndarray, " c"],
) -> list[bytes]:
    """Pixels in which more than half of the weight of each of c clusters is foreground.

    Args:
      counts: masks of the same size within a cluster.
      owner: cluster of each, non-decreasing.
      weights: of each, positive.
      pixels: of the masks of each cluster.
    """
    mask, start, stop = ones(counts)
    of = np.concatenate([owner[mask], owner[mask]])
    at = np.concatenate([start, stop])
    # Whole numbers: sums that come back to half are half again, whatever the order.
    scale = (1 << 30) / np.maximum.reduceat(weights, np.flatnonzero(_new(owner)))
    whole = np.maximum(np.round(weights * scale[owner]).astype(np.int64), 1)
    change = np.concatenate([whole[mask], -whole[mask]])
    order = np.lexsort((at, of))
    of, at, change = of[order], at[order], change[order]
    # All runs of a cluster end within it, so that the sum starts at 0 in the next one.
    level = np.cumsum(change)
    # Only the last of several ends at one pixel counts.
    last = np.append((of[1:] != of[:-1]) | (at[1:] != at[:-1]), len(of) > 0)[: len(of)]
    of, at, level = of[last], at[last], level[last]
    inside = 2 * level > np.bincount(owner, whole, len(pixels)).astype(np.int64)[of]
    before = np.concatenate([[False], inside[:-1]])
    begins, ends = np.flatnonzero(inside & ~before), np.flatnonzero(~inside & before)
    return counts_of_ones(of[begins], at[begins], at[ends], pixels)


def _new(owner: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Where a number differs from the one before."""
    return np.diff(owner, prepend=-1) != 0
