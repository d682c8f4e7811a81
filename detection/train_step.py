"""One optimisation step and one inference step as pure functions over the global batch."""

from collections.abc import Callable, Mapping

import flax
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from detection.models.faster_rcnn import FasterRCNN


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes; a checkpoint holds exactly this."""

    step: Array
    params: dict
    batch_stats: dict
    opt_state: optax.OptState


def init_variables(model: FasterRCNN, seed: int, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict:
    """Random parameters and statistics; only the shapes of `batch` matter. Call under `jit`."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dict(batch))
    key = jax.random.key(seed)
    variables = model.init({"params": key, "sampling": key, "drop_path": key}, zeros, train=True)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def make_train_step(
    model: FasterRCNN, tx: optax.GradientTransformation, seed: int
) -> Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """The update `(state, batch) -> (state, metrics)`, a pure function of (state, batch, seed).

    Metrics: every loss term as `loss/...`, their sum `loss`, figures of the model, and the global
    norms of gradients and parameters.
    """

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        streams = {
            name: jax.random.fold_in(key, i) for i, name in enumerate(("sampling", "drop_path"))
        }

        def loss_fn(params):
            out, mutated = model.apply(
                {"params": params, "batch_stats": state.batch_stats}, batch, train=True,
                rngs=streams, mutable=["batch_stats"],
            )
            total = sum(out["losses"].values())
            return total, (out, mutated.get("batch_stats", state.batch_stats))

        (total, (out, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": total, "gradient_norm": optax.global_norm(grads)}
        metrics |= {f"loss/{name}": value for name, value in out["losses"].items()}
        metrics |= out["monitor"]
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return train_step


def make_predict_step(model: FasterRCNN) -> Callable[[dict, Mapping[str, Array]], dict[str, Array]]:
    """The inference step `(variables, batch) -> detections` of `FasterRCNN.detect`."""

    def predict_step(variables, batch):
        return model.apply(variables, batch, train=False)

    return predict_step


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
