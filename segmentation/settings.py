"""The config of a segmenter's run, read and checked once where a command starts.

Each class mirrors one table of fields of configs/segmentation/base.py.
"""

import dataclasses
from typing import Any, Literal

from ml_collections import ConfigDict

from common.io.settings import check, read_settings
from common.masks.vote import Rule
from common.nn.backbones import BACKBONES
from common.nn.backbones.hrnet import Layout
from common.nn.layers.norm import NORM_KINDS
from common.training.optimizer import OptimizerSettings
from common.training.settings import CheckpointSettings, LogSettings
from segmentation.crops.settings import DataSettings, check_canvases
from segmentation.crops.windows import CropSize


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The network.

    Attributes:
      backbone: one of `common.nn.backbones.BACKBONES`.
      pretrained: file written by scripts.convert_weights; empty: random weights.
      class_specific: one pair of logits a class instead of one for all.
      upsampling: in the exchange units of HRNet.
      norm: of trunk and head.
      remat: recompute activations in the backward pass.
      dtype: of matmuls and convolutions; parameters and losses are float32.
      layout: of a smaller variant of an HRNet.
    """

    backbone: str
    pretrained: str
    class_specific: bool
    upsampling: Literal["bilinear", "nearest"]
    norm: str
    remat: bool
    dtype: Literal["float32", "bfloat16"]
    layout: Layout | None

    def __post_init__(self):
        known = ", ".join(BACKBONES)
        check(self.backbone in BACKBONES, "backbone", self.backbone, f"one of {known}")
        check(self.norm in NORM_KINDS, "norm", self.norm, f"one of {', '.join(NORM_KINDS)}")


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How a segmenter is measured.

    Attributes:
      batch_size: crops of all devices together; rounded up to a multiple of the devices.
      every_steps: of a training; 0: only at the end; -1: never.
    """

    batch_size: int
    every_steps: int

    def __post_init__(self):
        check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        expected = "-1 (never), 0 (at the end) or more"
        check(self.every_steps >= -1, "every_steps", self.every_steps, expected)

    @property
    def is_on(self) -> bool:
        """Whether a training evaluates at all; it then does so at its end."""
        return self.every_steps >= 0

    def is_due(self, step: int, steps_per_epoch: int, num_steps: int) -> bool:
        """Whether the state after `step` is evaluated before the training goes on."""
        del steps_per_epoch  # it is due after so many steps
        return self.every_steps > 0 and 0 < step < num_steps and step % self.every_steps == 0


@dataclasses.dataclass(frozen=True)
class InferenceSettings:
    """How evaluation and export look at a box, and what export makes of the voters' maps.

    Attributes:
      short, long, fixed: see `CropSize`; of a range of short sides the middle is taken.
      canvases: allowed heights and widths.
      flip: average with the mirrored crop.
      vote, threshold: see `common.masks.vote`.
    """

    short: float | tuple[float, float] | None
    long: float | None
    fixed: tuple[int, int] | None
    canvases: tuple[tuple[int, int], ...]
    flip: bool
    vote: Rule
    threshold: float

    def __post_init__(self):
        check_canvases(self.canvases)
        check(0 <= self.threshold < 1, "threshold", self.threshold, "0 or more and less than 1")
        _ = self.crop  # checks its fields

    @property
    def crop(self) -> CropSize:
        return CropSize(self.short, self.long, self.fixed)


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Everything that a run of a segmenter depends on beside its data."""

    task: Literal["segmentation"]
    name: str
    seed: int
    data: DataSettings
    model: ModelSettings
    optimizer: OptimizerSettings
    checkpoint: CheckpointSettings
    evaluation: EvaluationSettings
    test: InferenceSettings
    log: LogSettings

    @property
    def evaluation_data(self) -> DataSettings:
        """`data` with the crop sizes and canvases of `test`."""
        return dataclasses.replace(self.data, crop=self.test.crop, canvases=self.test.canvases)

    def to_dict(self) -> dict[str, Any]:
        """The config as nested dictionaries, for config.json and the metadata of tables."""
        return dataclasses.asdict(self)


def read_run(config: ConfigDict) -> RunSettings:
    """The settings of a segmenter's run.

    Raises:
      UserError: a field that is missing, unknown, of the wrong type or out of range, by its name.
    """
    return read_settings(RunSettings, config)
