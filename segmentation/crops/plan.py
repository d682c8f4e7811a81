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

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, Int64

from common.data.batches import StepMemo
from common.data.box_shapes import photo_sizes
from common.data.dataset import Dataset
from common.data.plans.permutation import permute, stream_key, uniforms
from common.data.plans.streams import ClassImages, ClassPlan, UniformPlan
from common.data.rotation import rotation_deviations
from segmentation.crops.instances import Instances, find_instances, median_aspects
from segmentation.crops.proposals import Matches, match_proposals
from segmentation.crops.settings import DataSettings
from segmentation.crops.windows import NUM_DRAWS, Augmentation, choose_canvas

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


def make_plan(dataset: Dataset, settings: DataSettings, seed: int) -> InstancePlan:
    """Plans the crops of a run.

    Args:
      dataset: with masks.
      settings: of the run.
      seed: of the run.

    Raises:
      UserError: no instances, or a bad table of proposals.
    """
    instances = find_instances(dataset, settings.train_split)
    if settings.max_instances:
        instances = instances.sample(settings.max_instances, stream_key(seed, _SAMPLE))
    deviations = np.zeros(dataset.num_classes)
    if settings.rotate:
        deviations = rotation_deviations(median_aspects(dataset, instances))
    matches = None
    if settings.proposals:
        matches = match_proposals(settings.proposals, dataset, instances)
    return InstancePlan(
        dataset,
        instances,
        _stream(instances, settings.sampler, seed, settings.batch_size),
        Augmentation(settings.crop, settings.jitter, settings.flip),
        np.array(settings.canvases),
        settings.group_steps,
        deviations,
        matches,
        settings.proposal_share,
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
