"""Category relationships: re-scoring of detections by what is usually seen together (section 5.8).

Two rules, both learned by `scripts.mine_relations` from a dataset directory:

* co-occurrence: where class j is seen, class i is expected with score s_j P(i|j) at least. If the
  image has class i with some confidence, but less than that, its score is raised.
* surround: an object that practically always lies inside one of class j (wheel in bicycle) gains
  score inside a confident detection of j and loses score outside; a j that holds one gains too.

    rules = load_rules("relations.npz", class_labels, settings)
    scores = rescore(rules, image_index, classes, scores, boxes)

They belong after expansion to parent classes and before truncation to the best rows of an image.

Shape legend: n detections, K classes, R ordered class pairs of a rule.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64

from common.io.errors import UserError
from common.io.paths import PathLike
from common.io.settings import check
from common.tables.ranges import expand_ranges, pieces
from ensemble.relations.counts import Relations, read_relations

_MAX_JOINED = 1 << 21  # pairs looked at together, bounds the memory


@dataclasses.dataclass(frozen=True)
class RelationSettings:
    """Which rules, and from where on they hold.

    Attributes:
      file: written by scripts.mine_relations; empty for no relations.
      cooccurrence: 'top' raises the best box of the class, 'scale' all of them by one factor,
        'off' none.
      surround: whether the surround rules are used.
      denominator: of P(i|j), 'j' or 'i', see `Relations.cooccurrence`.
      tau_p: least P(i|j) of a pair.
      tau_s: least score of the detection that speaks for another.
      tau_i: least best score of the class that is raised.
      tau_q: least share of i boxes inside j boxes of a pair.
      inside: share of a detection that must be covered to be inside another.
      gain: a, a score that is spoken for is multiplied by 1 + a.
      loss: b, one outside of all that should surround it by 1 - b.
      min_images: pairs whose P comes from fewer images are left out.
      min_boxes: pairs whose q comes from fewer boxes are left out.
    """

    file: str = ""
    cooccurrence: Literal["top", "scale", "off"] = "top"
    surround: bool = True
    denominator: Literal["j", "i"] = "j"
    tau_p: float = 0.8
    tau_s: float = 0.5
    tau_i: float = 0.1
    tau_q: float = 0.9
    inside: float = 0.9
    gain: float = 0.1
    loss: float = 0.1
    min_images: int = 10
    min_boxes: int = 10

    def __post_init__(self):
        for name in ("tau_p", "tau_s", "tau_i", "tau_q", "inside", "loss"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a number in [0, 1]")
        check(self.gain >= 0, "gain", self.gain, "0 or more")
        for name in ("min_images", "min_boxes"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")


class Partners(NamedTuple):
    """For every class its partners: rows starts[c] ... starts[c] + counts[c] - 1."""

    starts: Int64[np.ndarray, " K"]
    counts: Int64[np.ndarray, " K"]
    classes: Int64[np.ndarray, " R"]
    values: Float32[np.ndarray, " R"]

    @classmethod
    def of(cls, matrix: Float32[np.ndarray, "K K"], least: float) -> "Partners":
        """Partners of row class c are the columns with at least `least` (and more than 0)."""
        rows, columns = np.nonzero((matrix >= least) & (matrix > 0))
        counts = np.bincount(rows, minlength=len(matrix))
        return cls(np.cumsum(counts) - counts, counts, columns, matrix[rows, columns])


@dataclasses.dataclass(frozen=True)
class Rules:
    """Relations ready for use.

    Attributes:
      settings: thresholds.
      num_classes: K.
      expected: for class j the classes i with P(i|j) >= tau_p.
      outer: for class i the classes j with q(i in j) >= tau_q.
      inner: the same pairs, for class j the classes i.
    """

    settings: RelationSettings
    num_classes: int
    expected: Partners
    outer: Partners
    inner: Partners


def make_rules(relations: Relations, settings: RelationSettings | None = None) -> Rules:
    """Picks the class pairs that the settings let through."""
    s = settings or RelationSettings()
    probability = relations.cooccurrence(s.denominator, s.min_images)
    containment = relations.containment(s.min_boxes)
    return Rules(
        settings=s,
        num_classes=len(relations.class_labels),
        expected=Partners.of(probability.T, s.tau_p),
        outer=Partners.of(containment, s.tau_q),
        inner=Partners.of(containment.T, s.tau_q),
    )


def load_rules(
    path: PathLike, class_labels: Sequence[str], settings: RelationSettings | None = None
) -> Rules:
    """Reads a relations file for a list of classes.

    Args:
      path: written by scripts.mine_relations.
      class_labels: what the class indices given to `rescore` mean.
      settings: which rules; the defaults unless given.

    Raises:
      UserError: a broken file or field, or no class in common.
    """
    relations = read_relations(path)
    if not set(relations.class_labels) & set(class_labels):
        raise UserError(
            f"{path}: knows none of the {len(class_labels)} classes, it has "
            f"{', '.join(relations.class_labels[:3])} and so on"
        )
    return make_rules(relations.reordered(class_labels), settings)


def rescore(
    rules: Rules,
    image_index: Int[np.ndarray, " n"],
    classes: Int[np.ndarray, " n"],
    scores: Float32[np.ndarray, " n"],
    boxes: Float32[np.ndarray, "n 4"],
) -> Float32[np.ndarray, " n"]:
    """New scores of detections: co-occurrence, then surround on what that gives.

    A score is raised to 1 at most (one above 1, as voting gives, is never lowered by that).

    Args:
      rules: from `load_rules` or `make_rules`.
      image_index: any non-negative numbers; rows in any order, images complete.
      classes: class index of each row.
      scores: of each row.
      boxes: xmin, ymin, xmax, ymax in any unit.

    Returns:
      (n,) scores, the rows unmoved: sort them again before writing.
    """
    image = np.asarray(image_index, np.int64)
    classes = np.asarray(classes, np.int64)
    scores = np.array(scores, np.float32)
    if rules.settings.cooccurrence != "off":
        scores = raise_by_cooccurrence(rules, image, classes, scores)
    if rules.settings.surround:
        scores = rescore_by_surround(rules, image, classes, scores, boxes)
    return scores


def raise_by_cooccurrence(
    rules: Rules,
    image: Int64[np.ndarray, " n"],
    classes: Int64[np.ndarray, " n"],
    scores: Float32[np.ndarray, " n"],
) -> Float32[np.ndarray, " n"]:
    """Co-occurrence bound (paper section 5.8): max s_i >= max over j of s_j P(i|j), j != i.

    Every bound comes from the scores as given. Of equal best boxes 'top' raises the first row.
    """
    s = rules.settings
    keys = image * rules.num_classes + classes
    order = np.lexsort((-scores, keys))
    first = np.flatnonzero(np.diff(keys[order], prepend=-1))
    top = order[first]  # best row of each class of each image
    key, best = keys[top], scores[top]
    evidence = np.flatnonzero(best >= s.tau_s)
    counts = rules.expected.counts[classes[top[evidence]]]
    bound = np.zeros(len(top), np.float32)
    for part in pieces(counts, _MAX_JOINED):
        rows = evidence[part]
        owner, pair = expand_ranges(rules.expected.starts[classes[top[rows]]], counts[part])
        owner = rows[owner]
        wanted = image[top[owner]] * rules.num_classes + rules.expected.classes[pair]
        place = np.minimum(np.searchsorted(key, wanted), max(len(key) - 1, 0))
        there = key[place] == wanted
        expected = np.minimum(best[owner], 1) * rules.expected.values[pair]
        np.maximum.at(bound, place[there], expected[there])
    chosen = (best >= s.tau_i) & (best < bound)
    result = scores.copy()
    if s.cooccurrence == "top":
        result[top[chosen]] = bound[chosen]
        return result
    factor = np.ones(len(top), np.float32)
    factor[chosen] = bound[chosen] / best[chosen]
    sizes = np.diff(np.append(first, len(order)))
    result[order] = _scaled(scores[order], np.repeat(factor, sizes))
    return result


def rescore_by_surround(
    rules: Rules,
    image: Int64[np.ndarray, " n"],
    classes: Int64[np.ndarray, " n"],
    scores: Float32[np.ndarray, " n"],
    boxes: Float32[np.ndarray, "n 4"],
) -> Float32[np.ndarray, " n"]:
    """Surround and being surrounded (paper section 5.8), all judged by the scores as given.

    A detection counts as surrounded when one of its partner classes surrounds it, whatever the
    others do, and gains once however many speak for it.
    """
    s = rules.settings
    boxes = np.asarray(boxes, np.float32)
    evidence = np.flatnonzero(scores >= s.tau_s)
    keys = image[evidence] * rules.num_classes + classes[evidence]
    order = np.argsort(keys, kind="stable")
    evidence, keys = evidence[order], keys[order]

    def spoken_for(partners: Partners, surrounds: bool) -> Bool[np.ndarray, " n"]:
        """Rows with a confident detection of a partner class around (or inside) them."""
        supported = np.zeros(len(scores), bool)
        rows = np.flatnonzero(partners.counts[classes])
        counts = partners.counts[classes[rows]]
        for part in pieces(counts, _MAX_JOINED):
            owner, pair = expand_ranges(partners.starts[classes[rows[part]]], counts[part])
            owner = rows[part][owner]
            wanted = image[owner] * rules.num_classes + partners.classes[pair]
            start = np.searchsorted(keys, wanted, "left")
            size = np.searchsorted(keys, wanted, "right") - start
            for piece in pieces(size, _MAX_JOINED):
                asking, place = expand_ranges(start[piece], size[piece])
                asking, other = owner[piece][asking], evidence[place]
                inner, outer = (asking, other) if surrounds else (other, asking)
                supported[asking[covered_share(boxes[inner], boxes[outer]) >= s.inside]] = True
        return supported

    surrounded = spoken_for(rules.outer, True)
    alone = (rules.outer.counts[classes] > 0) & ~surrounded
    factor = np.where(surrounded, 1 + s.gain, np.where(alone, 1 - s.loss, 1.0))
    factor *= np.where(spoken_for(rules.inner, False), 1 + s.gain, 1.0)
    return _scaled(scores, factor.astype(np.float32))


def covered_share(
    inner: Float[np.ndarray, "n 4"], outer: Float[np.ndarray, "n 4"]
) -> Float[np.ndarray, " n"]:
    """Intersection of each pair of boxes divided by the area of the first; 0 for an empty first."""
    low = np.maximum(inner[:, :2], outer[:, :2])
    side = np.maximum(np.minimum(inner[:, 2:], outer[:, 2:]) - low, 0)
    area = (inner[:, 2] - inner[:, 0]) * (inner[:, 3] - inner[:, 1])
    inter = side[:, 0] * side[:, 1]
    return np.divide(inter, area, out=np.zeros_like(inter), where=area > 0)


def _scaled(
    scores: Float32[np.ndarray, " n"], factor: Float32[np.ndarray, " n"]
) -> Float32[np.ndarray, " n"]:
    return np.minimum(scores * factor, np.maximum(scores, np.float32(1)))
