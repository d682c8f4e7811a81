"""Random variables for a backbone, filled by NumPy: far quicker than compiling its initialisers."""

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util


def random_variables(module: nn.Module, seed: int = 0) -> dict:
    """Values for a trunk, which is called with images and `train`."""
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, False), images)
    return random_values(shapes, seed)


def random_values(shapes: dict, seed: int = 0) -> dict:
    """He-normal kernels, scales and variances around 1, biases and means around 0."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1] == "kernel":
            values = rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif path[-1] in ("scale", "var"):
            values = rng.uniform(0.7, 1.3, leaf.shape)
        else:
            values = 0.1 * rng.normal(size=leaf.shape)
        return values.astype(np.float32)

    return traverse_util.path_aware_map(fill, shapes)
