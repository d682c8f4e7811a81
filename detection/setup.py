"""What training, evaluation and export have in common: flags, dataset, detector, shapes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from common.data.dataset import Dataset
from common.data.proposals import TableBoxes
from common.io.errors import UserError
from common.metrics.coverage import split_images
from common.nn.backbones import make_backbone
from common.tables import DetectionsReader
from common.training.distributed import DATA_AXIS
from common.training.step import init_variables
from detection.models.box_refiner import BoxRefiner
from detection.models.faster_rcnn import FasterRCNN, build


def refines(config: ConfigDict) -> bool:
    """Whether the model refines given boxes instead of finding objects."""
    return config.model.box_head.kind == "regressor"


def open_proposals(
    config: ConfigDict, dataset: Dataset, say: Callable = print
) -> TableBoxes | None:
    """The table of `config.data.proposals` that a refiner trains on; None for detectors.

    None too for a refiner that trains on jittered ground truth alone.

    Raises:
      UserError: no table given, or none of the training photos, or the table of
        `config.evaluation.proposals` lacks images.
    """
    if not refines(config):
        return None
    data = config.data
    if data.max_proposals < 1:
        raise UserError(f"config.data.max_proposals: {data.max_proposals}, expected at least 1")
    if config.evaluation.proposals:  # rather now than after the training
        scored = DetectionsReader(config.evaluation.proposals)
        split_images(dataset, data.eval_split, scored, allow_partial=False)
    if not data.proposals:
        if config.model.truth_jitter.copies:
            return None
        raise UserError(
            "config.data.proposals: empty, expected a detections table of the training photos "
            "(or --config.model.truth_jitter.copies=N to train on jittered ground truth)"
        )
    boxes = TableBoxes(DetectionsReader(data.proposals), dataset)
    images = dataset.split(data.train_split)
    covered = boxes.num_covered(images)
    say(
        f"proposals: {data.proposals}, {boxes.counts.sum()} boxes; covers {covered} of "
        f"{len(images)} training images",
        flush=True,
    )
    if not covered:
        raise UserError(
            f"{data.proposals}: covers no image of split {data.train_split!r} of "
            f"{dataset.directory}"
        )
    return boxes


def build_model(config: ConfigDict, num_classes: int) -> FasterRCNN | BoxRefiner:
    """The detector, or refiner, as it runs on each device of the mesh."""
    return build(config.model, num_classes, DATA_AXIS)


def frozen_pattern(config: ConfigDict) -> str:
    """Regular expression of the paths of parameters that are not trained."""
    model = config.model
    backbone = make_backbone(model.backbone, norm=model.norm, frozen_stages=model.frozen_stages)
    return f"backbone(?:_class|_box)?/(?:{backbone.frozen_pattern()})"


def init_batch(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """The smallest batch that parameters can be made with; they do not depend on the canvas."""
    return train_shapes(config, 1, canvas=(64, 64))


def variable_shapes(config: ConfigDict, model: FasterRCNN | BoxRefiner) -> dict:
    """Shapes of {'params', 'batch_stats'}."""
    return jax.eval_shape(lambda: init_variables(model, config.seed, init_batch(config)))


def train_shapes(
    config: ConfigDict, batch_size: int, canvas: tuple[int, int] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """`batch_shapes` of a config."""
    data = config.data
    return batch_shapes(
        canvas or data.canvas,
        data.pad_multiple,
        data.max_boxes,
        batch_size,
        data.get("max_proposals", 0),
    )


def batch_shapes(
    canvas: tuple[int, int],
    pad_multiple: int,
    max_boxes: int,
    batch_size: int,
    max_proposals: int = 0,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of the fields of a training batch that the model reads."""
    height, width = (-(-side // pad_multiple) * pad_multiple for side in canvas)
    b, m, p = batch_size, max_boxes, max_proposals
    proposals = {
        "proposals": jax.ShapeDtypeStruct((b, p, 4), jnp.float32),
        "proposal_valid": jax.ShapeDtypeStruct((b, p), jnp.bool_),
    }
    return {
        "image": jax.ShapeDtypeStruct((b, height, width, 3), jnp.uint8),
        "image_size": jax.ShapeDtypeStruct((b, 2), jnp.float32),
        "image_valid": jax.ShapeDtypeStruct((b,), jnp.bool_),
        "gt_boxes": jax.ShapeDtypeStruct((b, m, 4), jnp.float32),
        "gt_classes": jax.ShapeDtypeStruct((b, m), jnp.int32),
        "gt_valid": jax.ShapeDtypeStruct((b, m), jnp.bool_),
        **(proposals if p else {}),
    }
