"""What training, evaluation and export have in common: flags, dataset, detector, shapes."""

from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict, config_flags

from common.data.dataset import Dataset
from common.errors import UserError
from common.nn.backbones import make_backbone
from common.training.distributed import DATA_AXIS
from common.training.train_step import init_variables
from detection.models.faster_rcnn import FasterRCNN, build


def define_flags() -> None:
    """--config and --workdir, the flags of every command here."""
    config_flags.DEFINE_config_file("config", None, "Python file with get_config(arg).")
    flags.DEFINE_string("workdir", None, "Directory of the run.")
    flags.mark_flags_as_required(["config", "workdir"])


def open_dataset(config: ConfigDict) -> Dataset:
    """The dataset directory of `config.data.dir`.

    Raises:
      UserError: the field is empty, or the directory is none.
    """
    if not config.data.dir:
        raise UserError(
            "config.data.dir: empty, expected a dataset directory written by "
            "scripts.prepare_data (--config.data.dir=DIR)"
        )
    return Dataset.open(Path(config.data.dir))


def build_model(config: ConfigDict, num_classes: int) -> FasterRCNN:
    """The detector as it runs on each device of the mesh."""
    return build(config.model, num_classes, DATA_AXIS)


def frozen_pattern(config: ConfigDict) -> str:
    """Regular expression of the paths of parameters that are not trained."""
    model = config.model
    backbone = make_backbone(
        model.backbone, norm=model.norm, frozen_stages=model.frozen_stages
    )
    return f"backbone(?:_class|_box)?/(?:{backbone.frozen_pattern()})"


def init_batch(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """The smallest batch that parameters can be made with; they do not depend on the canvas."""
    return batch_shapes((64, 64), config.data.pad_multiple, config.data.max_boxes, 1)


def variable_shapes(config: ConfigDict, model: FasterRCNN) -> dict:
    """Shapes of {'params', 'batch_stats'}."""
    return jax.eval_shape(lambda: init_variables(model, config.seed, init_batch(config)))


def batch_shapes(
    canvas: tuple[int, int], pad_multiple: int, max_boxes: int, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of the fields of a training batch that the model reads."""
    height, width = (-(-side // pad_multiple) * pad_multiple for side in canvas)
    b, m = batch_size, max_boxes
    return {
        "image": jax.ShapeDtypeStruct((b, height, width, 3), jnp.uint8),
        "image_size": jax.ShapeDtypeStruct((b, 2), jnp.float32),
        "image_valid": jax.ShapeDtypeStruct((b,), jnp.bool_),
        "boxes": jax.ShapeDtypeStruct((b, m, 4), jnp.float32),
        "classes": jax.ShapeDtypeStruct((b, m), jnp.int32),
        "valid": jax.ShapeDtypeStruct((b, m), jnp.bool_),
    }
