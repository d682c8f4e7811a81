"""Runs an operator over flat rows of detections: many small groups, bucketed by size.

A group is what an operator sees at once: the rows of one class in one image, of all models. Most
groups have a handful of rows, a few have hundreds. They are sorted by size into buckets, cut into
blocks of fixed shape and handed to one jitted program per shape, block after block, spread over
the local devices.

Shape legend:
  n: input rows   m: output rows   N: entries of a group (padded)   G: groups of a block
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int32, Int64

from common.io.parallel import behind
from ensemble.operators import Fused, Operator

# Entries of a block on one device: it stays within a core's cache.
_BLOCK_ENTRIES = 1 << 15
# Of few rows: entries up to which groups of several sizes share a program, and its least size.
_FEW_ENTRIES = 1 << 11
_FEW_SIZE = 8
# Blocks handed to the device before the result of the first is fetched.
_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class Rows:
    """Detections of any number of images and models as flat arrays.

    Attributes:
      group: key of the group, any integers, e.g. image * num_classes + class.
      scores: not negative, finite; may exceed 1.
      boxes: xmin, ymin, xmax, ymax, finite.
      model: index of the model that a row comes from.
    """

    group: Int64[np.ndarray, " n"]
    scores: Float32[np.ndarray, " n"]
    boxes: Float32[np.ndarray, "n 4"]
    model: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.group)

    def take(self, rows: slice | np.ndarray) -> "Rows":
        return Rows(self.group[rows], self.scores[rows], self.boxes[rows], self.model[rows])


def rank_rows(group: np.ndarray, scores: np.ndarray) -> Int64[np.ndarray, " n"]:
    """Order of the rows by group, then falling score, then row."""
    n = len(group)
    if n == 0:
        return np.zeros(0, np.int64)
    low = group.min()
    if int(group.max()) - int(low) < 1 << 32:
        code = (group - low).astype(np.uint64)
    else:
        code = np.unique(group, return_inverse=True)[1].astype(np.uint64)
    # The bits of floats that are not negative have the order of the floats. + 0 turns -0 to 0.
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)
    key = code << np.uint64(32) | ~bits
    order = np.argsort(key)  # vectorised, not stable
    key = key[order]
    same = key[1:] == key[:-1]
    if same.any():
        tied = np.zeros(n, bool)
        tied[1:] = same
        tied[:-1] |= same
        at = np.flatnonzero(tied)
        order[at] = order[at][np.lexsort((order[at], key[at]))]
    return order


def apply_operator(
    rows: Rows, operator: Operator, *, few: bool = False
) -> tuple[Rows, Int64[np.ndarray, " m"]]:
    """Applies an operator to every group.

    Args:
      rows: in any order.
      operator: what to do with a group.
      few: the rows are far from filling a block, and go through programs of about their size. Such
        sizes are many, and each is compiled when it first comes.

    Returns:
      The rows that come out, by group and, within it, by the falling *input* score of the row they
      stem from (an operator may change the order of scores); and `source`, the input row of each:
      the row that was kept, for fused boxes the best of the cluster.
    """
    order = rank_rows(rows.group, rows.scores)
    group, scores, boxes = rows.group[order], rows.scores[order], rows.boxes[order]
    model = rows.model[order] if operator.uses_models else None
    n = len(group)
    if n == 0:
        return rows, order
    starts = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    counts = np.diff(starts, append=n)
    columns = np.ascontiguousarray(boxes.T)
    if operator.keeps_single:
        plural = counts > 1
        starts, counts = starts[plural], counts[plural]

    valid, new_scores, new_columns = np.ones(n, bool), None, None
    blocks = _blocks(operator, starts, counts, columns, scores, model, few)
    for index, real, fused in behind(blocks, _IN_FLIGHT):
        at = index[real]
        valid[at] = np.asarray(fused.valid)[real]
        if fused.scores is not None:
            new_scores = scores.copy() if new_scores is None else new_scores
            new_scores[at] = np.asarray(fused.scores)[real]
        if fused.boxes is not None:
            new_columns = columns.copy() if new_columns is None else new_columns
            for new, column in zip(new_columns, np.asarray(fused.boxes), strict=True):
                new[at] = column[real]
    kept = np.flatnonzero(valid)
    source = order[kept]
    out = Rows(
        group=group[kept],
        scores=(scores if new_scores is None else new_scores)[kept],
        boxes=boxes[kept] if new_columns is None else new_columns[:, kept].T,
        model=rows.model[source],
    )
    return out, source


def bucket_sizes(counts: np.ndarray) -> Int64[np.ndarray, " groups"]:
    """Padded size of every group: a power of two, or a greater one that other groups need.

    A bucket that does not fill one block joins the next greater one, so that a small input needs
    one program and not one for each size.
    """
    padded = _power_of_two(counts)
    sizes, members = np.unique(padded, return_counts=True)
    waiting, place = 0, {}
    for number, (size, count) in enumerate(zip(sizes, members, strict=True)):
        waiting += int(count)
        if number + 1 < len(sizes) and waiting * int(size) < _BLOCK_ENTRIES:
            continue
        place[int(size)], waiting = waiting, 0
    targets = np.array(sorted(place), np.int64)
    return targets[np.searchsorted(targets, padded)]


def few_sizes(counts: np.ndarray) -> Int64[np.ndarray, " groups"]:
    """`bucket_sizes` for few rows: small groups join greater ones while together they stay few."""
    padded = np.maximum(_power_of_two(counts), _FEW_SIZE)
    sizes, members = np.unique(padded, return_counts=True)
    targets, joint = [], 0
    for number, (size, count) in enumerate(zip(sizes.tolist(), members.tolist(), strict=True)):
        joint += count
        if number + 1 < len(sizes):
            following = (joint + int(members[number + 1])) * int(sizes[number + 1])
            if following <= _FEW_ENTRIES:
                continue
        targets.append(size)
        joint = 0
    return np.array(targets)[np.searchsorted(targets, padded)]


def _power_of_two(counts: np.ndarray) -> Int64[np.ndarray, " groups"]:
    return np.left_shift(1, np.ceil(np.log2(np.maximum(counts, 1))).astype(np.int64))


def _blocks(operator, starts, counts, columns, scores, model, few):
    """Yields index (N, G) into the ranked rows, which entries are real, and the result.

    The result may still be on its way.
    """
    devices = jax.local_devices()
    run = _program(operator, tuple(devices))
    bucket = few_sizes(counts) if few else bucket_sizes(counts)
    for size in np.unique(bucket).tolist():
        members = np.flatnonzero(bucket == size)
        width = max(_BLOCK_ENTRIES // size, 1) * len(devices)
        if few:  # powers of 4, so that there are not too many programs
            needed = -(-len(members) // len(devices)) - 1
            width = min(width, 4 ** -(-needed.bit_length() // 2) * len(devices))
        position = np.arange(size)[:, None]
        for first in range(0, len(members), width):
            chosen = members[first : first + width]
            begin, sizes = np.zeros(width, np.int64), np.zeros(width, np.int32)
            begin[: len(chosen)], sizes[: len(chosen)] = starts[chosen], counts[chosen]
            index = begin + position
            fused = run(
                columns.take(index, axis=1, mode="clip"),
                scores.take(index, mode="clip"),
                None if model is None else model.take(index, mode="clip"),
                sizes,
            )
            yield index, position < sizes, fused


@functools.lru_cache(maxsize=64)
def _program(operator: Operator, devices: tuple[jax.Device, ...]) -> Callable[..., Fused]:
    """The jitted operator; with several devices each takes an equal part of the groups."""

    def run(
        boxes: Float32[Array, "4 N G"],
        scores: Float32[Array, "N G"],
        models: Int32[Array, "N G"] | None,
        sizes: Int32[Array, " G"],
    ) -> Fused:
        valid = jnp.arange(scores.shape[0], dtype=jnp.int32)[:, None] < sizes
        return operator.fuse(boxes, scores, models, valid)

    if len(devices) == 1:
        return jax.jit(run)
    mesh = jax.sharding.Mesh(np.array(devices), ("groups",))
    boxes, entries, groups = P(None, None, "groups"), P(None, "groups"), P("groups")
    return jax.jit(
        jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(boxes, entries, entries, groups),
            out_specs=Fused._make([entries, entries, boxes]),
            # The loops carry constants next to values that differ between devices.
            check_vma=False,
        )
    )
