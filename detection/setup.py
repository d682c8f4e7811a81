"""What training, evaluation and export have in common: flags, dataset, detector, shapes."""

from pathlib import Path

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from common.data.dataset import Dataset
from common.errors import UserError
from common.nn.backbones import make_backbone
from common.training.distributed import DATA_AXIS, replicated
from detection.models.faster_rcnn import FasterRCNN, build
from detection.train_step import batch_shapes, init_variables


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


def abstract(shapes: dict, mesh: Mesh) -> dict:
    """The same shapes, replicated over the mesh: what a checkpoint is restored onto."""
    sharding = replicated(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
