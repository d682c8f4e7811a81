"""Which instances a training step cuts, how, and on which canvas: pure functions of (seed, step).

Canvases are the shapes that programs are compiled for, and a batch has one. So that few suffice and
little of them is padding, the crops of a group of steps are sorted by aspect, cut into the batches
of the group, and each batch takes the smallest canvas that holds its crops. Instances, random
numbers and sizes all follow from (seed, slot), so every host finds the same batches without asking
another, and a resumed run goes on exactly.

Shape legend: B slots of a global batch, n instances of the split, G steps of a group, p boxes of
the proposals that match an instance.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, Int64

from common.data.batches import StepMemo
from common.data.dataset import Dataset
from common.data.plans.permutation import permute, stream_key, uniforms
from common.data.plans.streams import ClassImages, ClassPlan, UniformPlan
from common.io.errors import UserError
from segmentation.crops.instances import Instances, find_instances, median_aspects, photo_sizes
from segmentation.crops.proposals import Matches, match_proposals
from segmentation.crops.windows import (
    NUM_DRAWS,
    Augmentation,
    CropSize,
    choose_canvas,
    read_canvases,
    rotation_deviations,
)

SAMPLERS = ("uniform", "class_aware")
# Streams of random numbers, apart from those of common.data.plans.permutation.
_CROPS, _STEPS, _PLACES, _SAMPLE = 16, 17, 18, 19


@dataclasses.dataclass(frozen=True)
class PlannedCrops:
    """The crops of one batch.

    Attributes:
      canvas: height, width.
      rows: of `dataset.boxes`.
      images: index of the photo of each.
      classes: of each.
      boxes: normalised: the annotated box, or a proposal that matches it.
      jittered: which boxes to move: the annotated ones.
      deviations: of the angles, in radians.
      draws: random numbers of each crop.
    """

    canvas: tuple[int, int]
    rows: Int64[np.ndarray, " B"]
    images: Int32[np.ndarray, " B"]
    classes: Int32[np.ndarray, " B"]
    boxes: Float[np.ndarray, "B 4"]
    jittered: Bool[np.ndarray, " B"]
    deviations: Float[np.ndarray, " B"]
    draws: Float[np.ndarray, "B 8"]


class InstancePlan:
    """Plan of a run; see `make_plan`.

    Attributes:
      num_instances: n.
      num_classes: classes that have instances.
      batch_size: B.
      steps_per_epoch: steps that draw n instances.
      canvases: those of the config.
      augmentation: how crops vary.
    """

    def __init__(
        self,
        dataset: Dataset,
        instances: Instances,
        stream: UniformPlan | ClassPlan,
        augmentation: Augmentation,
        canvases: Int[np.ndarray, "c 2"],
        group_steps: int,
        deviations: Float[np.ndarray, " K"],
        matches: Matches | None,
        proposal_share: float,
    ):
        self.num_instances = len(instances)
        self.num_classes = int((np.bincount(instances.classes) > 0).sum())
        self.batch_size = stream.batch_size
        self.steps_per_epoch = -(-len(instances) // stream.batch_size)
        self.canvases = [tuple(canvas) for canvas in canvases.tolist()]
        self.augmentation = augmentation
        self._dataset = dataset
        self._instances = instances
        self._stream = stream
        self._canvases = canvases
        self._group_steps = group_steps
        self._deviations = deviations
        self._matches = matches
        self._proposal_share = proposal_share
        self._group = StepMemo(self._make_group, size=4)

    def canvas(self, step: int) -> tuple[int, int]:
        """Height, width of the crops of a step."""
        return self.batch(step).canvas

    def batch(self, step: int) -> PlannedCrops:
        """The crops of a step, those of all hosts."""
        group, place = divmod(step, self._group_steps)
        return self._group(group)[place]

    def _make_group(self, group: int) -> list[PlannedCrops]:
        steps, size = self._group_steps, self.batch_size
        slots = np.arange(group * steps * size, (group + 1) * steps * size, dtype=np.int64)
        members = self._stream.draw(slots).images
        draws = uniforms(NUM_DRAWS + 2, self._stream.seed, _CROPS, slots)
        crops = self._crops(members, draws)
        windows = self.augmentation.windows(
            crops["boxes"],
            photo_sizes(self._dataset, crops["images"]),
            crops["jittered"],
            crops["deviations"],
            crops["draws"],
        )
        order = np.arange(len(slots))
        if len(self._canvases) > 1:
            aspect = np.log(windows.sides[:, 1] / windows.sides[:, 0])
            order = np.argsort(aspect, kind="stable")
        # Batches in random order, and crops in random order within each.
        batches = permute(np.arange(steps), steps, stream_key(self._stream.seed, _STEPS, group))
        places = permute(
            np.tile(np.arange(size), steps),
            size,
            np.repeat(stream_key(self._stream.seed, _PLACES, group, np.arange(steps)), size),
        )
        chosen = order.reshape(steps, size)[batches]
        chosen = np.take_along_axis(chosen, places.reshape(steps, size), axis=1)
        largest = windows.content[chosen].max(axis=1)
        canvases = choose_canvas(largest, self._canvases)
        return [
            PlannedCrops(self.canvases[canvas], **{name: a[rows] for name, a in crops.items()})
            for canvas, rows in zip(canvases, chosen, strict=True)
        ]

    def _crops(
        self, members: Int64[np.ndarray, " m"], draws: Float[np.ndarray, "m 10"]
    ) -> dict[str, np.ndarray]:
        instances = self._instances
        rows, classes = instances.rows[members], instances.classes[members]
        boxes = np.asarray(self._dataset.boxes[rows], np.float64)
        jittered = np.ones(len(members), bool)
        if self._matches is not None:
            proposals, there = self._matches.pick(members, draws[:, NUM_DRAWS + 1])
            there &= draws[:, NUM_DRAWS] < self._proposal_share
            boxes[there], jittered = proposals[there], ~there
        return {
            "rows": rows,
            "images": instances.images[members],
            "classes": classes,
            "boxes": boxes,
            "jittered": jittered,
            "deviations": self._deviations[classes],
            "draws": draws[:, :NUM_DRAWS],
        }


def make_plan(dataset: Dataset, data_config: Any, seed: int) -> InstancePlan:
    """Plans the crops of a run.

    Args:
      dataset: with masks.
      data_config: ConfigDict with the fields
        train_split: name of the split.
        sampler: 'uniform': an endless stream of permutations of the instances; 'class_aware': of
          permutations of the classes, each taking the next of its own permuted instances.
        max_instances: train on a random sample of that many instances, a function of the seed; 0:
          on all.
        batch_size: B, crops of all hosts together.
        crop: short, long, fixed: see `crops.CropSize`.
        canvases: allowed (height, width); of crops that none holds the size is reduced.
        group_steps: G; more steps sort better and need more crops to be planned at once.
        jitter: share of its length by which a side of an annotated box may move, below 0.5.
        rotate: turn crops, those of classes of long boxes more (`crops.rotation_deviations`).
        flip: mirror half of the crops.
        proposals: path of a detections table, or '' for none. Its boxes that match an instance (of
          the same label, IoU at least 0.5) are cut as they are, instead of the annotated box,
        proposal_share: of the time.
      seed: of the run.

    Raises:
      UserError: a field is out of range, no instances, or a bad table.
    """
    requirements = {
        "sampler": (data_config.sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}"),
        "max_instances": (data_config.max_instances >= 0, "at least 0"),
        "batch_size": (data_config.batch_size >= 1, "at least 1"),
        "group_steps": (data_config.group_steps >= 1, "at least 1"),
        "jitter": (0 <= data_config.jitter < 0.5, "a share from 0 to below 0.5"),
        "proposal_share": (0 <= data_config.proposal_share <= 1, "a share between 0 and 1"),
    }
    for field, (holds, expected) in requirements.items():
        if not holds:
            raise UserError(f"data.{field} is {getattr(data_config, field)!r}: expected {expected}")
    size = CropSize.of(data_config.crop)
    canvases = read_canvases(data_config.canvases)
    instances = find_instances(dataset, data_config.train_split)
    if data_config.max_instances:
        instances = instances.sample(data_config.max_instances, stream_key(seed, _SAMPLE))
    deviations = np.zeros(dataset.num_classes)
    if data_config.rotate:
        deviations = rotation_deviations(median_aspects(dataset, instances))
    matches = None
    if data_config.proposals:
        matches = match_proposals(data_config.proposals, dataset, instances)
    return InstancePlan(
        dataset,
        instances,
        _stream(instances, data_config.sampler, seed, data_config.batch_size),
        Augmentation(size, float(data_config.jitter), bool(data_config.flip)),
        canvases,
        data_config.group_steps,
        deviations,
        matches,
        float(data_config.proposal_share),
    )


def _stream(
    instances: Instances, sampler: str, seed: int, batch_size: int
) -> UniformPlan | ClassPlan:
    """Endless stream of places in `instances`."""
    count = len(instances)
    if sampler == "uniform":
        return UniformPlan(np.arange(count), seed, batch_size)
    members = np.argsort(instances.classes, kind="stable").astype(np.int32)
    counts = np.bincount(instances.classes)
    present = np.flatnonzero(counts)
    offsets = np.concatenate([[0], np.cumsum(counts[present])])
    return ClassPlan(present.astype(np.int32), ClassImages(offsets, members), seed, batch_size)
