"""Operators that make one list of boxes out of the boxes of one class in one image.

An operator is a frozen dataclass of settings. `ensemble.operators.groups.apply_operator` runs it
over the rows of many images and models; called directly, it takes groups of fixed size with masks:

    boxes, scores, valid = jax.jit(Nms(0.5))(boxes, scores, models, valid)  # (G, N, 4), (G, N)

What holds for all:
* Entries are ranked by falling score; equal scores by row (position in the input).
* Thresholds on IoU and score are exceeded strictly (>), compared in float32.
* Scores are not negative; a model's weight is multiplied into its scores beforehand. Boxes are
  finite, and never clipped or turned upright: the reading of tables has seen to that. A box of
  zero area overlaps nothing. (`ensemble_boxes` clips, turns and drops such boxes on its own.)
* A fused box lies in the place of its cluster's best entry.
* Same result on any device and in any grouping of the work, up to rounding of exp and sums.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.io.errors import UserError
from ensemble.operators.fusion import Nmw, WeightedBoxesFusion
from ensemble.operators.operator import Fused, Operator
from ensemble.operators.suppression import AdjNms, Nms, SoftNms
from ensemble.operators.voting import Voting

__all__ = [
    "AdjNms", "Fused", "Nms", "Nmw", "OPERATORS", "Operator", "SoftNms", "Voting",
    "WeightedBoxesFusion", "make_operator",
]  # fmt: skip

OPERATORS: Mapping[str, type[Operator]] = {
    "nms": Nms,
    "soft_nms": SoftNms,
    "adj_nms": AdjNms,
    "wbf": WeightedBoxesFusion,
    "nmw": Nmw,
    "voting": Voting,
}

_SHARE = (lambda x: 0 <= x <= 1, "a number from 0 to 1")
_SWITCH = (lambda x: isinstance(x, bool), "True or False")


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return lambda x: x in names, f"one of {', '.join(names)}"


# Field -> test of a value, what is expected.
_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "iou_threshold": _SHARE,
    "box_weight": _SHARE,
    "min_score": (lambda x: x >= 0, "a number of at least 0"),
    "score_weight": (lambda x: x >= 0, "a number of at least 0"),
    "sigma": (lambda x: x > 0, "a number greater than 0"),
    "k": (lambda x: isinstance(x, int) and x > 0, "a whole number of at least 1"),
    "method": _one_of("gaussian", "linear"),
    "few": _one_of("mean", "fixed"),
    "conf_type": _one_of("avg", "max", "box_and_model_avg", "absent_model_aware_avg"),
    "sequential": _SWITCH,
    "allows_overflow": _SWITCH,
    "model_weights": (
        lambda x: all(weight >= 0 for weight in x) and sum(x) > 0,
        "numbers of at least 0, one above",
    ),
}


def make_operator(
    config: Mapping[str, Any], model_weights: Sequence[float] | None = None
) -> Operator:
    """Builds the operator that a config section asks for.

    Args:
      config: `name` (a key of `OPERATORS`) and any of the operator's fields; the others keep
        their defaults.
      model_weights: of all models of the ensemble, by which their scores were multiplied; what
        weighted boxes fusion divides by where `config` does not say.

    Raises:
      UserError: unknown name or field, or a value out of range.
    """
    fields = dict(config)
    name = fields.pop("name", None)
    if name not in OPERATORS:
        raise UserError(f"operator.name {name!r}: unknown, expected one of {', '.join(OPERATORS)}")
    kind = OPERATORS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    for field in fields:
        if field not in known:
            raise UserError(
                f"operator.{field}: {name} has no such setting, expected {', '.join(known)}"
            )
    if kind is WeightedBoxesFusion:
        weights = fields.get("model_weights")
        if weights is None:
            if model_weights is None:
                raise UserError("operator.model_weights: wbf needs the weights of all models")
            weights = map(float, model_weights)
        fields["model_weights"] = tuple(weights)
    for field, value in fields.items():
        accepts, expected = _RULES[field]
        try:
            good = accepts(value)
        except TypeError:  # compares no string with a number
            good = False
        if field == "sigma" and value is None and kind is Voting:
            good = True
        if not good:
            raise UserError(f"operator.{field} {value!r}: expected {expected}")
    return kind(**fields)
