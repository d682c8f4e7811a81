"""Speed of the segmenter's input: crops of instances in training, crops of boxes in export.

    python -m scripts.bench.bench_crops --config=configs/segmentation/hrnet_w48_256.py
        --config.data.dir=DIR

plan    an index of OpenImages' size (944,037 photos, 2.1 M instances, 300 classes): finding the
        instances, planning a group of steps, memory; needs no dataset
train   crops/s as training sees them, and the share of the canvases that is content
boxes   crops/s of random boxes, 100 a photo, as export sees them
"""

import collections
import resource
import time
import types

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from common.data.dataset import Dataset
from common.io.commands import run_main
from common.io.errors import UserError
from segmentation.crops import batches as inputs
from segmentation.crops.plan import make_plan

_PARTS = ("plan", "train", "boxes")


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "configuration of a segmenter")
    flags.DEFINE_list("part", list(_PARTS), f"what to measure: {', '.join(_PARTS)}")
    flags.DEFINE_integer("steps", 40, "batches to time (part train)")
    flags.DEFINE_integer("photos", 50, "photos of the split to take boxes of (part boxes)")
    flags.mark_flag_as_required("config")


def main() -> None:
    config, parts = flags.FLAGS.config, set(flags.FLAGS.part)
    if parts - set(_PARTS):
        raise UserError(f"--part={','.join(parts)}: expected some of {','.join(_PARTS)}")
    if "plan" in parts:
        bench_plan(config)
    if parts - {"plan"}:
        if not config.data.dir:
            raise UserError("--config.data.dir is empty: expected a dataset directory with masks")
        dataset = Dataset.open(config.data.dir)
        if "train" in parts:
            bench_train(dataset, config)
        if "boxes" in parts:
            bench_boxes(dataset, config)


def bench_plan(config: ConfigDict) -> None:
    index = generated_index(num_images=944_037, num_boxes=2_900_000, num_classes=300)
    for sampler in ("uniform", "class_aware"):
        config.data.sampler = sampler
        before, start = _peak_mib(), time.perf_counter()
        plan = make_plan(index, config.data, 0)
        built = time.perf_counter() - start
        plan.batch(0)
        start = time.perf_counter()
        plan.batch(10 * config.data.group_steps)
        print(
            f"plan {sampler:11}: {plan.num_instances} instances found in {built:.2f} s, "
            f"{config.data.group_steps} steps of {plan.batch_size} planned in "
            f"{1e3 * (time.perf_counter() - start):.0f} ms, "
            f"{_peak_mib() - before:.0f} MiB more at the peak",
            flush=True,
        )


def generated_index(num_images: int, num_boxes: int, num_classes: int) -> types.SimpleNamespace:
    """The arrays of a dataset with long-tailed classes; three boxes in four have a mask."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(num_boxes, np.full(num_images, 1 / num_images))
    share = 1 / np.arange(1, num_classes + 1)
    corner, sides = rng.random((2, num_boxes, 2), np.float32)
    sides = 0.05 + 0.5 * sides
    corner *= 1 - sides
    has_mask = rng.random(num_boxes) < 0.75
    return types.SimpleNamespace(
        directory="generated index",
        num_classes=num_classes,
        split=lambda _: np.arange(num_images),
        image_sizes=np.tile(np.int32([768, 1024]), (num_images, 1)),
        box_offsets=np.concatenate([[0], np.cumsum(counts)]),
        boxes=np.concatenate([corner, corner + sides], axis=1),
        box_classes=rng.choice(num_classes, num_boxes, p=share / share.sum()).astype(np.int32),
        box_flags=(rng.random(num_boxes) < 0.05).astype(np.uint8),
        mask_offsets=np.concatenate([[0], np.cumsum(has_mask * 40)]),
    )


def bench_train(dataset: Dataset, config: ConfigDict) -> None:
    plan = make_plan(dataset, config.data, 0)
    warm_up = 3
    batches = inputs.train_batches(
        dataset, plan, config.data, num_steps=flags.FLAGS.steps + warm_up
    )
    for _ in range(warm_up):
        next(batches)
    canvases: collections.Counter = collections.Counter()
    content = pixels = 0
    wall, cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        canvases["x".join(map(str, batch["image"].shape[1:3]))] += 1
        content += batch["image_size"].prod(axis=1).sum()
        pixels += batch["mask"].size
    count = flags.FLAGS.steps * plan.batch_size
    _say("train", count, time.perf_counter() - wall, time.process_time() - cpu, content / pixels)
    print(f"train: batches by canvas {dict(canvases.most_common())}", flush=True)


def bench_boxes(dataset: Dataset, config: ConfigDict) -> None:
    rng = np.random.default_rng(0)
    photos = dataset.split(config.data.eval_split)[: flags.FLAGS.photos]
    sides = 0.03 + 0.6 * rng.random((100 * len(photos), 2)) ** 2
    corner = rng.random(sides.shape) * (1 - sides)
    boxes = np.concatenate([corner, corner + sides], axis=1)
    view = inputs.View(config.test, config.test.canvases)
    content = pixels = 0
    wall, cpu = time.perf_counter(), time.process_time()
    for batch in inputs.box_batches(
        dataset,
        np.repeat(photos, 100),
        boxes,
        [view],
        batch_size=config.evaluation.batch_size,
        num_threads=config.data.num_threads,
    ):
        content += batch.image_size.prod(axis=1).sum()
        pixels += batch.image[..., 0].size
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    _say("boxes", len(boxes), wall, cpu, content / pixels)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _say(part: str, count: int, wall: float, cpu: float, share: float) -> None:
    print(
        f"{part}: {count / wall:.0f} crops/s, {cpu / count * 1e3:.2f} ms of CPU a crop, "
        f"{cpu / wall:.1f} cores busy, {share:.0%} of the canvases is content",
        flush=True,
    )


if __name__ == "__main__":
    define_flags()
    run_main(main)
