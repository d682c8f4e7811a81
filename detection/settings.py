"""The config of a run, read and checked once where a command starts.

`read_run` makes a `RunSettings` of the --config of detectors and refiners, `read_pretrain` a
`PretrainSettings` of that of detection.pretrain. Each class mirrors one table of fields of
configs/detection/base.py or configs/pretrain/resnet50.py.
"""

import dataclasses
from typing import Any, Literal

from ml_collections import ConfigDict

from common.data.settings import DataSettings, LabelledDataSettings
from common.io.errors import UserError
from common.io.settings import check, read_settings
from common.metrics.names import Metric
from common.metrics.official import needs_masks
from common.training.optimizer import OptimizerSettings, warmup_steps
from common.training.settings import CheckpointSettings, LogSettings
from detection.models.settings import ClassifierSettings, ModelSettings
from detection.tta.settings import ViewSettings


@dataclasses.dataclass(frozen=True)
class PretrainEvaluationSettings:
    """When a training measures its state.

    Attributes:
      batch_size: images of all devices together; rounded up to a multiple of the devices.
      every_epochs: of a training; 0: only at the end; -1: never.
    """

    batch_size: int
    every_epochs: int

    def __post_init__(self):
        check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        expected = "-1 (never), 0 (at the end) or more"
        check(self.every_epochs >= -1, "every_epochs", self.every_epochs, expected)

    @property
    def is_on(self) -> bool:
        """Whether a training evaluates at all; it then does so at its end."""
        return self.every_epochs >= 0

    def is_due(self, step: int, steps_per_epoch: int, num_steps: int) -> bool:
        """Whether the state after `step` is evaluated before the training goes on."""
        every = self.every_epochs * steps_per_epoch
        return every > 0 and 0 < step < num_steps and step % every == 0


@dataclasses.dataclass(frozen=True)
class EvaluationSettings(PretrainEvaluationSettings):
    """How a detector is scored, and when.

    Attributes:
      metric: official metric of the figures, of boxes or of masks.
      mask_threshold: probability that a pixel of a mask must exceed, in export too.
      expand_predictions: copies detections to parent classes first (paper section 1).
      proposals: of a refiner: the detections table that is refined and scored.
      num_pictures: photos whose detections a training shows in TensorBoard; 0: none.
    """

    metric: Metric
    mask_threshold: float
    expand_predictions: bool
    proposals: str
    num_pictures: int

    def __post_init__(self):
        super().__post_init__()
        check(self.num_pictures >= 0, "num_pictures", self.num_pictures, "0 (none) or more")
        threshold = self.mask_threshold
        check(0 <= threshold < 1, "mask_threshold", threshold, "a number in [0, 1)")


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Everything that a run of a detector, or of a refiner of boxes, depends on beside its data.

    Attributes:
      init_from: work directory, or file of `scripts.export_weights`, of a trained detector of any
        classes to start from; "": none.
    """

    task: Literal["detection"]
    name: str
    seed: int
    init_from: str
    data: DataSettings
    model: ModelSettings
    optimizer: OptimizerSettings
    checkpoint: CheckpointSettings
    evaluation: EvaluationSettings
    test_time: ViewSettings
    log: LogSettings

    def __post_init__(self):
        size, kind = self.data.mask_size, self.model.mask_head.kind
        if self.model.has_masks:
            expected = f"a multiple of 8 such as 112: model.mask_head.kind {kind!r} needs masks"
            check(size > 0, "data.mask_size", size, expected)
        else:
            check(size == 0, "data.mask_size", size, "0: model.mask_head.kind is 'none'")
        metric = self.evaluation.metric
        possible = self.model.has_masks or not needs_masks(metric)
        check(possible, "evaluation.metric", metric, "one of boxes: the model has no mask head")
        weak, share = self.model.weak.kind, self.data.label_steps.share
        if self.model.weak.is_on:
            expected = f"True: model.weak.kind {weak!r} learns from image-level labels"
            check(self.data.image_labels, "data.image_labels", self.data.image_labels, expected)
        else:
            expected = "0: model.weak.kind is 'none'"
            check(share == 0, "data.label_steps.share", share, expected)
        if self.model.refines:
            size, scales = self.data.max_proposals, self.test_time.scales
            expected = "at least 1: box_head.kind 'regressor' refines the boxes of a table"
            check(size >= 1, "data.max_proposals", size, expected)
            check(not scales, "test_time.scales", scales, "(): a refiner has one view")

    def check_classes(self, num_classes: int) -> None:
        """What cannot be trained with so few classes.

        Raises:
          UserError: a weak head whose softmax over the classes is always 1.
        """
        weak = self.model.weak
        if weak.is_on and weak.class_stream == "softmax" and num_classes == 1:
            raise UserError(
                "config.model.weak.class_stream: found 'softmax' with one class, expected 'sigmoid'"
            )

    def mining_note(self, steps_per_epoch: int) -> str:
        """A line for the start of a run whose mined boxes count before the warm-up is over; "" of
        others."""
        start = self.model.weak.mining.start_steps
        warmup = warmup_steps(self.optimizer, steps_per_epoch)
        if not self.data.label_steps.share or start >= warmup:
            return ""
        return (
            f"note: mined boxes count from step {start} of both kinds on, the warm-up ends with "
            f"step {warmup} (config.model.weak.mining.start_steps)"
        )

    def to_dict(self) -> dict[str, Any]:
        """The config as nested dictionaries, for config.json and the metadata of tables."""
        return dataclasses.asdict(self)


def read_run(config: ConfigDict) -> RunSettings:
    """The settings of a detector's run.

    Raises:
      UserError: a field that is missing, unknown, of the wrong type or out of range, by its name.
    """
    return read_settings(RunSettings, config)


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
    """Everything that the training of a classifier depends on beside its photos."""

    task: Literal["classification"]
    name: str
    seed: int
    data: LabelledDataSettings
    model: ClassifierSettings
    optimizer: OptimizerSettings
    checkpoint: CheckpointSettings
    evaluation: PretrainEvaluationSettings
    log: LogSettings

    def to_dict(self) -> dict[str, Any]:
        """The config as nested dictionaries, for config.json."""
        return dataclasses.asdict(self)


def read_pretrain(config: ConfigDict) -> PretrainSettings:
    """The settings of a classifier's run; errors as `read_run`."""
    return read_settings(PretrainSettings, config)
