"""Which images make up the batch of a training step, and its canvas: functions of (seed, step).

All photos of a step lie on one canvas. Landscape and portrait photos have canvases of their own;
steps of either orientation alternate in the proportion in which photos are drawn, and each
orientation has streams of its own (`common.data.plans.streams`), cut into batches by the steps that
have it. So every image is still drawn as often as without orientations, up to the rounding of
steps. With a square canvas there is one orientation.

Shape legend: B slots of a global batch, K classes with at least one image, n images.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from common.data.canvases import Canvas, is_portrait, step_canvases
from common.data.dataset import Dataset
from common.data.dataset_format import CROWD, GROUP_OF
from common.data.frequencies import class_frequencies, repeat_factors
from common.data.plans.class_index import annotated_classes, images_by_class, of_orientation
from common.data.plans.permutation import LABEL_STEPS, PORTRAIT, SCALES, SOURCE, permute, stream_key
from common.data.plans.pools import class_pools, pooled_images
from common.data.plans.repeat_factor import RepeatFactorPlan
from common.data.plans.step_kinds import StepKinds
from common.data.plans.streams import DENOMINATOR, ClassPlan, Drawn, Stream, UniformPlan, mix
from common.data.settings import DataSettings
from common.data.sources import Source, open_sources
from common.io.errors import UserError

_PORTRAIT_DENOMINATOR = 10**9  # of the share of portrait steps, so that few portraits do not vanish


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """The plan of a run, see `train_plan`.

    Attributes:
      sources: the datasets that the images are of.
      streams: of the landscape steps and of the portrait steps; one of them may be None.
      portrait: share of the portrait steps.
      canvases: (landscape, portrait) for each short side.
      seed: of the run.
      batch_size: B, images of all hosts together.
      steps_per_epoch: steps that draw as many images as the sources have.
      pools: (K,) of the classes of the run.
    """

    sources: tuple[Source, ...]
    streams: tuple[Stream | None, Stream | None]
    portrait: Fraction
    canvases: Sequence[tuple[Canvas, Canvas]]
    seed: int
    batch_size: int
    steps_per_epoch: int
    pools: Int32[np.ndarray, " K"]

    def labels_only(self, step: int) -> bool:
        """Whether the images of a step are all of sources of image-level labels, by design."""
        return False

    @property
    def box_sources(self) -> list[Source]:
        """The sources whose boxes are used."""
        return [source for source in self.sources if source.has_boxes]

    @property
    def boxed_images(self) -> int:
        """How many of the training images have a box."""
        counts = (
            source.dataset.box_offsets[source.images + 1]
            > source.dataset.box_offsets[source.images]
            for source in self.box_sources
        )
        return sum(int(np.count_nonzero(count)) for count in counts)

    @property
    def label_sources(self) -> list[Source]:
        """The sources of which only image-level labels are used."""
        return [source for source in self.sources if not source.has_boxes]

    def batch(self, step: int) -> Drawn:
        place, own_step = self._orientation(step)
        stream = self.streams[place]
        assert stream is not None  # its share of the steps would be 0
        return stream.batch(own_step)

    def canvas(self, step: int) -> Canvas:
        """Every short side comes once in a round of steps, in a random order."""
        count = len(self.canvases)
        rounds, place = divmod(step, count)
        key = stream_key(self.seed, SCALES, rounds)
        scale = int(permute(np.array([place]), count, key)[0]) if count > 1 else 0
        return self.canvases[scale][self._orientation(step)[0]]

    def image_name(self, index: int) -> str:
        """Id of an `image_index` of the batches; with several sources after its dataset."""
        source = next(s for s in reversed(self.sources) if s.first_index <= index)
        name = source.dataset.image_id(index - source.first_index)
        return name if len(self.sources) == 1 else f"{source.dataset.directory}: {name}"

    def _orientation(self, step: int) -> tuple[int, int]:
        """0 or 1 for portrait, and the number of earlier steps that have it."""
        p = self.portrait
        before, after = (s * p.numerator // p.denominator for s in (step, step + 1))
        return (1, before) if after > before else (0, step - before)


@dataclasses.dataclass(frozen=True)
class MixedPlan(TrainPlan):
    """The plan of the sources with boxes, with steps of sources of image-level labels in between.

    Attributes:
      labels: the plan of those.
      kinds: which steps are theirs.
    """

    labels: TrainPlan
    kinds: StepKinds

    def batch(self, step: int) -> Drawn:
        labelled, own_step = self.kinds.of_step(step)
        return self.labels.batch(own_step) if labelled else super().batch(own_step)

    def canvas(self, step: int) -> Canvas:
        labelled, own_step = self.kinds.of_step(step)
        return self.labels.canvas(own_step) if labelled else super().canvas(own_step)

    def labels_only(self, step: int) -> bool:
        return self.kinds.of_step(step)[0]


class _Part(NamedTuple):
    """Images that are drawn in one way: a stream for each orientation, if there are such images.

    Attributes:
      streams: landscape, portrait; only the first with a square canvas.
      portrait: share of the images, by how often they are drawn, that are portraits.
    """

    streams: tuple[Stream | None, Stream | None]
    portrait: Fraction


def train_plan(dataset: Dataset, data: DataSettings, seed: int) -> TrainPlan:
    """The plan of a training.

    `data.sampler` is one of
      'uniform': an endless stream of permutations of the images.
      'class_aware': an endless stream of permutations of the classes; a class takes the next image
        of its own endless stream of permuted images (without replacement).
      'full_class_batch': the same, and every batch of at least K slots holds every class.
      'expert': images with boxes by class, mixed with images that have none (paper section 5.4);
        the share `data.positive_share`, over the steps of both orientations, has boxes.
      'repeat_factor': an endless stream of epochs in which photos of rare classes come several
        times (`common.data.plans.repeat_factor`); how rare a class is, all sources say together.
    Each source is sampled so on its own, and has its share of the slots. With
    `data.label_steps.share` the sources of image-level labels are planned apart, and have that
    share of the steps; an epoch then is one of the sources with boxes.

    Args:
      dataset: that of the run, whose classes are the run's.
      data: `config.data`.
      seed: of the run.

    Raises:
      UserError: as `common.data.sources.open_sources` and `class_pools`; a sampler by classes
        without any box, an expert without images that have none, or full class batches of several
        sources.
    """
    sources = open_sources(dataset, data)
    pools = class_pools(dataset.class_labels, data.pools)
    if not data.label_steps.share:
        return _plan(sources, sources, data, pools, seed)
    boxes = _plan(sources, [s for s in sources if s.has_boxes], data, pools, seed)
    labels = _plan(
        sources,
        [s for s in sources if not s.has_boxes],
        data.of_label_steps,
        pools,
        int(stream_key(seed, LABEL_STEPS)[0]),
    )
    kinds = StepKinds(data.label_steps.exact_share, seed)
    epoch = math.ceil(boxes.steps_per_epoch / (1 - kinds.share))
    return MixedPlan(**vars(boxes) | {"steps_per_epoch": epoch}, labels=labels, kinds=kinds)


def _plan(
    all_sources: tuple[Source, ...],
    sources: Sequence[Source],
    data: DataSettings,
    pools: Int32[np.ndarray, " K"],
    seed: int,
) -> TrainPlan:
    """The plan of some of the run's sources."""
    canvases = step_canvases(data)
    oriented = any(landscape != portrait for landscape, portrait in canvases)
    if data.sampler == "full_class_batch" and len(sources) > 1:
        raise UserError(
            f"config.data.sampler: found 'full_class_batch' with {len(sources)} sources, whose "
            "shares of the slots leave no room for every class: expected 'class_aware'"
        )
    if data.sampler == "repeat_factor":
        parts = _by_repeat_factor(sources, data, seed, oriented)
    else:
        parts = [
            _part(source, data, pools, _source_seed(seed, source.place), oriented)
            for source in sources
        ]
    mixed = _mix_parts(
        [(part, source.share) for part, source in zip(parts, sources, strict=True)], data, seed
    )
    images = sum(len(source.images) for source in sources)
    return TrainPlan(
        all_sources,
        mixed.streams,
        mixed.portrait,
        canvases,
        seed,
        data.batch_size,
        steps_per_epoch=-(-images // data.batch_size),
        pools=pools,
    )


def ignored_flags(data: DataSettings) -> int:
    """Bits of the boxes that are no objects in training: an image is not drawn for them."""
    return CROWD | (0 if data.group_of == "ordinary" else GROUP_OF)


def _part(
    source: Source, data: DataSettings, pools: Int32[np.ndarray, " K"], seed: int, oriented: bool
) -> _Part:
    """How the images of a source are drawn."""
    if data.sampler == "uniform":
        return _uniform(source, np.ones(len(source.images), bool), data, seed, oriented)
    where = f"{source.dataset.directory}: its {len(source.images)} training images"
    classes = _by_class(source, data, pools, seed, oriented, where)
    if data.sampler != "expert":
        return classes
    if source.has_boxes:
        empty = np.diff(source.dataset.box_offsets)[source.images] == 0
    else:
        empty = np.ones(len(source.images), bool)
        empty[annotated_classes(source, source.images)[0]] = False
    if not empty.any():
        raise UserError(
            f"{where} all have boxes, sampler 'expert' mixes in images without: use sampler "
            "'class_aware'"
        )
    background = _uniform(source, empty, data, seed, oriented)
    share = Fraction(data.positive_share).limit_denominator(DENOMINATOR)
    return _mix_parts([(classes, share), (background, 1 - share)], data, seed)


def _by_repeat_factor(
    sources: Sequence[Source], data: DataSettings, seed: int, oriented: bool
) -> list[_Part]:
    flags, parts = ignored_flags(data), []
    frequencies = class_frequencies(sources, flags)
    if not any(frequencies.images):
        raise UserError(
            f"{sources[0].dataset.directory}: the training images have no boxes, sampler "
            "'repeat_factor' draws images by the classes of their boxes: use sampler 'uniform'"
        )
    for source in sources:
        factors = repeat_factors(source, frequencies, data.repeat_threshold, flags)
        portrait = source.portrait if oriented else np.zeros(len(source.images), bool)
        key, size = _source_seed(seed, source.place), data.batch_size
        streams = [
            RepeatFactorPlan(source.images[of], factors[of], stream_seed, size, source.place)
            if of.any()
            else None
            for of, stream_seed in zip((~portrait, portrait), _seeds(key), strict=True)
        ]
        share = Fraction(float(factors[portrait].sum() / factors.sum()))
        share = share.limit_denominator(_PORTRAIT_DENOMINATOR)
        parts.append(_Part((streams[0], streams[1]), share))
    return parts


def _mix_parts(parts: Sequence[tuple[_Part, Fraction]], data: DataSettings, seed: int) -> _Part:
    """Parts by their shares of the slots.

    Of the steps of an orientation a part has the share of its images which have it. So each image
    is drawn as often as without orientations; the shares hold over the steps of both together.
    """
    total = sum((share for _, share in parts), Fraction())
    portrait = sum((share * part.portrait for part, share in parts), Fraction()) / total
    portrait = portrait.limit_denominator(_PORTRAIT_DENOMINATOR)
    streams: list[Stream | None] = []
    for place, steps in enumerate((1 - portrait, portrait)):
        there = [
            (stream, share * (part.portrait if place else 1 - part.portrait))
            for part, share in parts
            if (stream := part.streams[place]) is not None
        ]
        streams.append(mix(there, _seeds(seed)[place], data.batch_size) if steps else None)
    return _Part((streams[0], streams[1]), portrait)


def _uniform(
    source: Source, chosen: Bool[np.ndarray, " n"], data: DataSettings, seed: int, oriented: bool
) -> _Part:
    images = source.images[chosen]
    portrait = source.portrait[chosen] if oriented else np.zeros(len(images), bool)
    streams = [
        UniformPlan(part, key, data.batch_size, source.place) if len(part) else None
        for part, key in zip((images[~portrait], images[portrait]), _seeds(seed), strict=True)
    ]
    return _Part((streams[0], streams[1]), Fraction(int(portrait.sum()), len(images)))


def _by_class(
    source: Source,
    data: DataSettings,
    pools: Int32[np.ndarray, " K"],
    seed: int,
    oriented: bool,
    where: str,
) -> _Part:
    classes, images = images_by_class(source, ignored_flags(data))
    if not len(classes):
        what = "boxes" if source.has_boxes else "labels of classes that are present"
        raise UserError(
            f"{where} have no {what}, sampler {data.sampler!r} draws images by the classes of "
            "these: use sampler 'uniform'"
        )
    if data.pools:
        images = pooled_images(classes, images, pools)
    full_rounds = data.batch_size // len(classes) if data.sampler == "full_class_batch" else 0
    fixed = (data.batch_size, full_rounds, source.place)
    sizes = source.dataset.image_sizes
    portrait = is_portrait(sizes)[images.members] if oriented else np.zeros(1, bool)
    if not portrait.any():
        return _Part((ClassPlan(classes, images, seed, *fixed), None), Fraction())
    of_class = np.add.reduceat(portrait, images.offsets[:-1]) / np.diff(images.offsets)
    share = Fraction(float(of_class.mean())).limit_denominator(_PORTRAIT_DENOMINATOR)
    streams: list[Stream | None] = [None, None]
    for place, steps in enumerate((1 - share, share)):
        if steps:
            chosen = portrait if place else ~portrait
            own, others, units = of_orientation(images, chosen, float(steps))
            key = _seeds(seed)[place]
            streams[place] = ClassPlan(classes, own, key, *fixed, own=units, others=others)
    return _Part((streams[0], streams[1]), share)


def _seeds(seed: int) -> tuple[int, int]:
    """Of the landscape streams, and of the portrait streams."""
    return seed, int(stream_key(seed, PORTRAIT)[0])


def _source_seed(seed: int, place: int) -> int:
    return int(stream_key(seed, SOURCE, place)[0]) if place else seed


class ClassHistogram(NamedTuple):
    """How often classes were seen; each array is (num_classes,) int64."""

    drawn: np.ndarray  # slots drawn for the class
    images: np.ndarray  # images that contain it
    boxes: np.ndarray  # boxes of it
    absent: np.ndarray  # batches without: no slot drawn for it; of plans without classes, no image


def class_histogram(plan: TrainPlan, steps: Iterable[int]) -> ClassHistogram:
    """Realised class frequencies of some steps of a plan (all boxes of each image counted, none of
    sources of image-level labels)."""
    count = plan.sources[0].num_classes
    counts = ClassHistogram(*(np.zeros(count, np.int64) for _ in range(4)))
    for step in steps:
        images, drawn, places = plan.batch(step)
        slots = np.bincount(drawn[drawn >= 0], minlength=count)
        shown = np.zeros(count, np.int64)
        for source in plan.sources:
            slot, classes = annotated_classes(source, images[places == source.place])
            if source.has_boxes:
                counts.boxes[:] += np.bincount(classes, minlength=count)
            once = np.unique(slot * count + classes) % count
            shown += np.bincount(once, minlength=count)
        counts.drawn[:] += slots
        counts.images[:] += shown
        counts.absent[:] += (slots if slots.any() else shown) == 0
    return counts
