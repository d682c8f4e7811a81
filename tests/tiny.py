"""A detection problem small enough for tests: coloured squares on grey photos, and its config."""

from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from PIL import Image

from common.data.dataset import DatasetWriter
from configs.detection import base, r50_refine
from detection import batch_fields
from detection.settings import RunSettings, read_run

COLOURS = ((200, 40, 40), (40, 160, 60), (50, 70, 220))


def write_dataset(
    directory: Path,
    num_images: int = 12,
    size: int = 64,
    seed: int = 0,
    labels: Sequence[str] = ("red", "green", "blue"),
    order: Sequence[int] = (0, 1, 2),
) -> Path:
    """Writes photos and a dataset directory with the splits "train" and "validation".

    `order`: class of each colour.
    """
    rng = np.random.default_rng(seed)
    photos = directory.with_name(directory.name + "_photos")
    photos.mkdir(parents=True)
    labels = list(labels)
    hierarchy = {"LabelName": "root", "Subcategory": [{"LabelName": label} for label in labels]}
    with DatasetWriter(directory, "tiny", labels, labels, hierarchy, str(photos)) as writer:
        for i in range(num_images):
            pixels = rng.integers(90, 130, (size, size, 3)).astype(np.uint8)
            boxes, classes = [], []
            for class_ in rng.permutation(3)[: rng.integers(1, 4)]:
                side = int(rng.integers(size // 5, size // 3))
                x, y = rng.integers(0, size - side, 2)
                pixels[y : y + side, x : x + side] = COLOURS[class_]
                boxes.append([x, y, x + side, y + side])
                classes.append(order[class_])
            Image.fromarray(pixels).save(photos / f"photo{i:03d}.png")
            writer.add_image(
                f"photo{i:03d}",
                f"photo{i:03d}.png",
                (size, size),
                np.array(boxes) / size,
                classes,
                label_classes=[0, 1, 2],
                label_confidences=[int(c in classes) for c in range(3)],
            )
        split = num_images - num_images // 4
        writer.add_split("train", range(split))
        writer.add_split("validation", range(split, num_images))
    return directory


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """ResNet-10 on 64x64 canvases; `arg` is the number of epochs (default 3), "refine" or "weak".

    "weak": every second step is of image-level labels, and each class that is there is mined.
    """
    refine, weak = arg == "refine", arg == "weak"
    config = shrink(r50_refine.get_config() if refine else base.get_config())
    config.name = "tiny_refine" if refine else "tiny"
    config.data.sampler = "uniform"
    config.optimizer.update(num_epochs=3.0, warmup_epochs=0.5, clip_norm=10.0)
    if refine:
        config.data.max_proposals = 8
    elif weak:
        config.name = "tiny_weak"
        config.data.image_labels = True
        config.data.sources = (dict(split="train"), dict(split="train", annotations="labels"))
        config.data.label_steps.share = 0.5
        config.model.weak.update(kind="wsddn", width=16, num_proposals=20, refinements=2)
        config.model.weak.mining.update(threshold=0.0, refine=True)
        config.optimizer.num_epochs = 1.5
    else:
        config.optimizer.num_epochs = float(arg or 3)
    return config


def shrink(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Any detector's config at sizes that a test can pay; heads, losses and samplers stay."""
    config.data.update(batch_size=4, canvas=(64, 64), scales=(), max_boxes=8)
    config.model.update(backbone="resnet10", norm="group", frozen_stages=0, dtype="float32")
    config.model.update(deform=(0, 0, 0), remat=False, fpn_channels=16)
    config.model.box_head.width = 32
    config.model.box_head.sample.num_samples = 16
    if not config.model.box_head.kind == "regressor":
        config.model.anchors.scales = (4.0,)
        config.model.rpn.loss.num_samples = 32
        config.model.rpn.train_proposals.update(pre_nms=50, post_nms=50)
        config.model.rpn.test_proposals.update(pre_nms=50, post_nms=50)
        config.model.detections.update(max_candidates=64, max_detections=20)
    if config.model.mask_head.kind != "none":
        config.data.mask_size = 16
        config.model.mask_head.update(width=8, num_convs=1)
    config.checkpoint.update(every_steps=2, keep_epochs=False)
    config.evaluation.batch_size = 4
    config.log.every_steps = 1
    return config


def settings(arg: str | None = None) -> RunSettings:
    """`get_config` as the commands read it."""
    return read_run(get_config(arg))


def init_shapes() -> dict:
    """A batch of one image, from whose shapes parameters are made."""
    return batch_fields.init_shapes(settings().data)


def losses(model: nn.Module, variables: dict, batch: dict) -> dict[str, jax.Array]:
    """The terms of the loss of one training step; random choices are always the same."""
    streams = {"sampling": jax.random.key(0), "dropout": jax.random.key(0)}
    out, _ = model.apply(variables, batch, train=True, rngs=streams, mutable=["batch_stats"])
    return out["losses"]
