"""The weights of all losses of a model, applied in one place."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Array, Float

from detection.models.settings import ModelSettings


class Term(NamedTuple):
    """Which loss a value is.

    Attributes:
      name: as in `config.model.loss_weights`.
      branch: index of the branch of a decoupled backbone, None where there is only one.
      stage: index of the stage of box heads, None outside of them.
    """

    name: str
    branch: int | None = None
    stage: int | None = None

    def label(self, num_stages: int) -> str:
        """Name of the loss in a model with so many stages, such as `box_class_1_stage2`."""
        label = self.name
        if self.branch is not None:
            label += f"_{self.branch + 1}"
        if self.stage is not None and num_stages > 1:
            label += f"_stage{self.stage + 1}"
        return label


def weighted(
    terms: Mapping[Term, Float[Array, ""]], settings: ModelSettings
) -> dict[str, Float[Array, ""]]:
    """The weighted losses, by names such as `box_class_1_stage2`; counts start at 1.

    Args:
      terms: losses as they are.
      settings: `loss_weights` of each kind of loss; `stages.loss_weights` of all losses of a stage;
        `low_weight` of the box losses of the branch for classes, which is the first one, and of the
        class losses of the branch for boxes (paper section 5.2).
    """
    result, stage_weights = {}, settings.stages.loss_weights
    for term, value in terms.items():
        name, branch, stage = term
        weight = getattr(settings.loss_weights, name)
        if branch is not None:
            weight *= settings.low_weight if name.endswith("class") == (branch == 1) else 1.0
        if stage is not None:
            weight = stage_weights[stage] * weight
        result[term.label(len(stage_weights))] = weight * value
    return result
