"""The class losses of a step: each head's logits, and what its loss keeps between steps.

Shape legend
  B  images
  R  sampled RoIs per image
  L  class logits of a RoI, see `detection.classifiers`
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from detection.classifiers import ClassTargets, RoIClassifier
from detection.losses.shares import share
from detection.losses.weights import Term
from detection.models.settings import ModelSettings
from detection.structures import HeadOutput, RoITargets


class ClassLosses(NamedTuple):
    """How the heads of a model learn to classify in a step.

    Attributes:
      classifier: of all heads.
      key: random key of the step, the same on all devices.
      states: what each loss keeps between steps, by the label of its `Term`. A loss that is not
        among them starts anew in every step.
      read_only: the states stay as they are.
    """

    classifier: RoIClassifier
    key: Array
    states: Mapping[str, nn.Variable]
    read_only: bool = False

    def of_stage(
        self,
        stage: int,
        num_stages: int,
        targets: RoITargets,
        batch: Mapping[str, Array],
        keys: Array,
        axis_name: str | None,
    ) -> "StageClassLosses":
        """Those of the heads of a stage.

        Args:
          stage: its index.
          num_stages: of the model.
          targets: of the RoIs of the stage.
          batch: image_valid, optional class_known and labels.
          keys: (B,) random keys, one an image.
          axis_name: device axis over which RoIs are counted and states summed.
        """
        verified = batch.get("labels")
        class_targets = ClassTargets(
            targets.labels,
            targets.counted(batch["image_valid"]),
            jax.vmap(jax.random.fold_in, (0, None))(keys, 1),
            jax.random.fold_in(self.key, stage),
            batch.get("class_known"),
            None if verified is None else verified != 0,
        )
        return StageClassLosses(self, stage, num_stages, class_targets, axis_name, targets.weighted)


class StageClassLosses(NamedTuple):
    """See `ClassLosses.of_stage`."""

    losses: ClassLosses
    stage: int
    num_stages: int
    targets: ClassTargets
    axis_name: str | None
    weighted: Callable[[Array], Array] = lambda losses: losses

    @property
    def classifier(self) -> RoIClassifier:
        return self.losses.classifier

    def masked(self, output: HeadOutput) -> HeadOutput:
        """The output of a head without classes that are unknown in an image."""
        known = self.targets.known
        if known is None:
            return output
        return output.with_logits(lambda logits: self.classifier.mask_unknown(logits, known))

    def share(
        self, name: str, branch: int | None, logits: Float[Array, "B R L"]
    ) -> Float[Array, ""]:
        """This device's share of the mean over RoIs; the state of the loss moves on, unless the
        step only reads it.

        Args:
          name: of the loss in `config.model.loss_weights`.
          branch: of the head, None where there is only one.
          logits: masked.
        """
        state = self.losses.states.get(Term(name, branch, self.stage).label(self.num_stages))
        before = self.classifier.start_state() if state is None else state.value
        values, after = self.classifier.loss(logits, self.targets, before, self.axis_name)
        if state is not None and not self.losses.read_only:
            state.value = after
        counted = self.targets.counted
        return share(self.weighted(values), counted, counted.sum(), self.axis_name)


def class_loss_labels(settings: ModelSettings) -> list[str]:
    """Of all heads of a model."""
    names = ["box_class"]
    if settings.box_head.kind == "decoupling":
        names.append("sibling_box_class")
    branches = (0, 1) if settings.split_after else (None,)
    stages = len(settings.stages.iou)
    return [
        Term(name, branch, stage).label(stages)
        for stage in range(stages)
        for branch in branches
        for name in names
    ]
