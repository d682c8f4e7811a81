"""One optimisation step and one inference step as pure functions over the global batch."""

from collections.abc import Callable, Mapping

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from common.training.distributed import DATA_AXIS, sum_over_devices
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
    streams = {"params": key, "sampling": key, "dropout": key}
    # Parameters do not depend on the devices, and outside of them there is no axis to sum over.
    variables = model.clone(axis_name=None).init(streams, zeros, train=True)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def make_train_step(
    model: FasterRCNN, tx: optax.GradientTransformation, mesh: Mesh, seed: int
) -> Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """The update `(state, batch) -> (state, metrics)`, a pure function of (state, batch, seed).

    Each device differentiates its share of the loss on its own images; one sum over devices, in
    float32, makes the gradient of the global batch. Left to the partitioner instead, the loops of
    NMS would synchronise all devices in every round and bfloat16 gradients would be summed in
    bfloat16.

    Metrics: every loss term as `loss/...`, their sum `loss`, figures of the model, and the global
    norm of the gradient.
    """

    def device_gradients(params, batch_stats, key, batch):
        streams = {
            name: jax.random.fold_in(key, i) for i, name in enumerate(("sampling", "dropout"))
        }

        def loss_fn(params):
            out, mutated = model.apply(
                {"params": params, "batch_stats": batch_stats}, batch, train=True,
                rngs=streams, mutable=["batch_stats"],
            )
            return sum(out["losses"].values()), (out, mutated.get("batch_stats", batch_stats))

        grads, (out, new_stats) = jax.grad(loss_fn, has_aux=True)(params)
        grads, out = sum_over_devices((grads, out))
        return grads, out, new_stats

    sharded_gradients = jax.shard_map(
        device_gradients, mesh=mesh, in_specs=(P(), P(), P(), P(DATA_AXIS)), out_specs=P(),
        check_vma=False,
    )

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, out, batch_stats = sharded_gradients(state.params, state.batch_stats, key, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {f"loss/{name}": value for name, value in out["losses"].items()}
        metrics |= {"loss": sum(out["losses"].values()), "gradient_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics | out["monitor"]

    return train_step


def make_predict_step(
    model: FasterRCNN, mesh: Mesh
) -> Callable[[dict, Mapping[str, Array]], dict[str, Array]]:
    """The inference step `(variables, batch) -> detections` of `FasterRCNN.detect`."""

    def detect(variables, batch):
        return model.apply(variables, batch, train=False)

    return jax.shard_map(
        detect, mesh=mesh, in_specs=(P(), P(DATA_AXIS)), out_specs=P(DATA_AXIS), check_vma=False
    )


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
