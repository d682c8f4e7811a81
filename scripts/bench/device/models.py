"""The detectors and segmenters that are compared and timed, at the sizes of a run."""

from typing import Any

import numpy as np

from common.training.distributed import DATA_AXIS
from configs.segmentation import hrnet_w48_112
from detection.batch_fields import init_shapes
from detection.models.faster_rcnn import build
from detection.models.two_stage import frozen_pattern
from detection.settings import RunSettings, read_run
from scripts.bench.bench_train_step import MASK_SIZE, ellipse, example, our_config
from scripts.bench.device.programs import Trained, make_trained
from scripts.bench.device.sizes import Sizes
from segmentation import batch_fields as crop_fields
from segmentation import settings as segmenter_settings
from segmentation.models import segmenter

MASKS = "Mask R-CNN"
# Name -> changes of `config.model` of the baseline with torchvision's settings.
DETECTORS: dict[str, dict[str, Any]] = {
    "R50-FPN": {},
    MASKS: {},  # a mask head, and masks in the batch
    "Decoupling Head": {"box_head.kind": "decoupling"},
    "DCN": {"deform": (1, 1, 1)},
}


def detector_settings(name: str, size: Sizes, dtype: str) -> RunSettings:
    config = our_config(masks=name == MASKS)
    for field, value in [*DETECTORS[name].items(), *size.model]:
        config.model.update_from_flattened_dict({field: value})
    config.model.dtype = dtype
    return read_run(config)


def detector(name: str, size: Sizes, dtype: str, axis_name: str | None = DATA_AXIS):
    """The module of a detector, and its settings."""
    settings = detector_settings(name, size, dtype)
    return build(settings.model, size.classes, axis_name), settings


def detector_batch(
    count: int, photo: tuple[int, int], canvas: tuple[int, int], classes: int, masks: bool
) -> dict[str, np.ndarray]:
    """Photos with 20 boxes each, and with their masks, at the top left of their canvas."""
    data = example(count, photo, classes)
    images = np.zeros((count, *canvas, 3), np.uint8)
    images[:, : photo[0], : photo[1]] = data["image"]
    valid = np.ones(data["gt_classes"].shape, bool)
    if masks:
        mask = np.packbits(ellipse(MASK_SIZE, MASK_SIZE), axis=1)
        data["gt_masks"] = np.broadcast_to(mask, (*valid.shape, *mask.shape)).copy()
        data["gt_has_mask"] = valid
    return data | {
        "image": images,
        "image_size": np.full((count, 2), photo, np.float32),
        "image_valid": np.ones(count, bool),
        "gt_valid": valid,
    }


def trained_detector(name: str, size: Sizes) -> Trained:
    model, settings = detector(name, size, "bfloat16")
    frozen = frozen_pattern(settings.model)
    return make_trained(model, settings.optimizer, init_shapes(settings.data), frozen)


def segmenter_model(size: Sizes, dtype: str, axis_name: str | None = DATA_AXIS):
    """The module of the segmenter, and its settings."""
    config = hrnet_w48_112.get_config()
    config.model.update(backbone=size.hrnet, upsampling="nearest", dtype=dtype)
    if size.layout:
        config.model.layout = dict(size.layout)
    settings = segmenter_settings.read_run(config)
    return segmenter.build(settings.model, 1, axis_name), settings


def crop_batch(count: int, canvas: tuple[int, int]) -> dict[str, np.ndarray]:
    """Random crops that fill their canvas, with random masks."""
    rng = np.random.default_rng(0)
    shape = (count, *canvas)
    return {
        "image": rng.integers(0, 256, (*shape, 3), np.uint8),
        "image_size": np.full((count, 2), canvas, np.float32),
        "image_valid": np.ones(count, bool),
        "classes": np.zeros(count, np.int32),
        "mask": rng.integers(0, 2, shape, np.uint8),
        "mask_valid": np.ones(shape, bool),
    }


def trained_segmenter(size: Sizes) -> Trained:
    model, settings = segmenter_model(size, "bfloat16")
    return make_trained(model, settings.optimizer, crop_fields.init_shapes())
