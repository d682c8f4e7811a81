"""What training, evaluation and export have in common: flags, dataset, network, shapes."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common.nn.layers import norm
from common.training import distributed
from common.training.checkpoint import Checkpoints
from common.training.step import init_variables
from segmentation.models.segmenter import Segmenter, build

INFERENCE_FIELDS = ("image", "image_size", "image_valid", "classes")


def build_model(config: ConfigDict, num_classes: int) -> Segmenter:
    """The network as it runs on each device of the mesh."""
    return build(config.model, num_classes, distributed.DATA_AXIS)


def batch_shapes(canvas: tuple[int, int], batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of the fields of a training batch that the network reads."""
    b, (height, width) = batch_size, canvas
    return {
        "image": jax.ShapeDtypeStruct((b, height, width, 3), jnp.uint8),
        "image_size": jax.ShapeDtypeStruct((b, 2), jnp.float32),
        "image_valid": jax.ShapeDtypeStruct((b,), jnp.bool_),
        "classes": jax.ShapeDtypeStruct((b,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((b, height, width), jnp.uint8),
        "mask_valid": jax.ShapeDtypeStruct((b, height, width), jnp.bool_),
    }


def train_shapes(config: ConfigDict, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a training batch on the largest canvas."""
    return batch_shapes(max(config.data.canvases, key=lambda size: size[0] * size[1]), batch_size)


def init_batch(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """The smallest batch that parameters can be made with; they do not depend on the canvas."""
    del config
    return batch_shapes((32, 32), 1)


def frozen_pattern(config: ConfigDict) -> str:
    """Regular expression of the paths of parameters that are not trained."""
    return norm.frozen_pattern([], config.model.norm)


def variable_shapes(config: ConfigDict, model: Segmenter) -> dict:
    """Shapes of {'params', 'batch_stats'}."""
    return jax.eval_shape(lambda: init_variables(model, config.seed, init_batch(config)))


def restore_variables(
    config: ConfigDict, model: Segmenter, workdir: str, mesh: Mesh, step: int | None = None
) -> tuple[dict, int]:
    """Parameters and statistics of a checkpoint (the newest by default), and its step."""
    checkpoints = Checkpoints(Path(workdir) / "checkpoints")
    step = step or checkpoints.latest_step()
    abstract = distributed.abstract(variable_shapes(config, model), mesh)
    variables, _ = checkpoints.restore_params(step, abstract)
    checkpoints.close()
    return variables, step


def evaluation_data(config: ConfigDict) -> ConfigDict:
    """`config.data` with the crop sizes and canvases of `config.test`."""
    data = ConfigDict(config.data.to_dict())
    data.unlock()
    data.crop = crop_of(config.test)
    data.canvases = config.test.canvases
    return data


def crop_of(test: ConfigDict) -> ConfigDict:
    """Crop sizes of a `config.test`."""
    return ConfigDict({name: test.get(name) for name in ("short", "long", "fixed")})
