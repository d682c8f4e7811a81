"""State, optimisation step and inference step of a model, as pure functions over the global batch.

A model is a Linen module with a field `axis_name`. `model(batch, train=True)` gives its share of
the losses by name and figures to watch, `{"losses": {...}, "monitor": {...}}`, in which sums over
the devices make those of the global batch; `model(batch, train=False)` gives what inference is to
give, batch first. Random streams: "sampling", "dropout".
"""

from collections.abc import Callable, Mapping

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from common.training.accumulation import summed_over_parts
from common.training.distributed import DATA_AXIS, batch_sharded, replicated


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step depends on but its batch; a checkpoint holds exactly this.

    Attributes:
      step: steps done.
      key: data of the run's random key. It is here and not in the program, so that runs that
        differ in their seed alone share a compiled program.
    """

    step: Array
    key: Array
    params: dict
    batch_stats: dict
    opt_state: optax.OptState

    @property
    def variables(self) -> dict:
        """What inference needs."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    seed: int,
    batch: Mapping[str, jax.ShapeDtypeStruct],
) -> TrainState:
    """The state before the first step; only the shapes of `batch` matter. Call under `jit`."""
    variables = init_variables(model, seed, batch)
    params = variables["params"]
    return TrainState(
        jnp.zeros((), jnp.int32),
        jax.random.key_data(jax.random.key(seed)),
        params,
        variables["batch_stats"],
        tx.init(params),
    )


def init_variables(model: nn.Module, seed: int, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict:
    """Random parameters and statistics; only the shapes of `batch` matter. Call under `jit`."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dict(batch))
    key = jax.random.key(seed)
    streams = {"params": key, "sampling": key, "dropout": key}
    # Parameters do not depend on the devices, and outside of them there is no axis to sum over.
    variables = model.clone(axis_name=None).init(streams, zeros, train=True)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def variable_shapes(model: nn.Module, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict:
    """Shapes of {'params', 'batch_stats'}; only the shapes of `batch` matter."""
    return jax.eval_shape(lambda: init_variables(model, 0, batch))


def make_train_step(
    model: nn.Module, tx: optax.GradientTransformation, mesh: Mesh, accumulate: int = 1
) -> Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """The update `(state, batch) -> (state, metrics)`, a pure function of both.

    Each device differentiates its share of the loss on its own images; one sum over devices, in
    float32, makes the gradient of the global batch. Left to the partitioner instead, the loops of
    NMS would synchronise all devices in every round and bfloat16 gradients would be summed in
    bfloat16.

    With `accumulate` each device computes its images in so many parts, one after another, which
    gives what as many times the devices would (`common.training.accumulation`).

    Metrics: every loss term as `loss/...`, their sum `loss`, figures of the model, and the global
    norm of the gradient.
    """

    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def device_gradients(params, batch_stats, key, batch):
        streams = {
            name: jax.random.fold_in(key, i) for i, name in enumerate(("sampling", "dropout"))
        }

        def apply(params, batch):
            return model.apply(
                {"params": params, "batch_stats": batch_stats},
                batch,
                train=True,
                rngs=streams,
                mutable=["batch_stats"],
            )

        def loss_fn(params, batch):
            out, mutated = apply(params, batch)
            return sum(out["losses"].values()), (out, mutated.get("batch_stats", batch_stats))

        def gradients(batch):
            grads, (out, new_stats) = jax.grad(loss_fn, has_aux=True)(params, batch)
            return (grads, out), new_stats

        (grads, out), new_stats = summed_over_parts(
            gradients, lambda batch: apply(params, batch), batch, accumulate, in_order=on_cpu
        )
        return grads, out, new_stats

    sharded_gradients = jax.shard_map(
        device_gradients,
        mesh=mesh,
        in_specs=(P(), P(), P(), P(DATA_AXIS)),
        out_specs=P(),
        check_vma=False,
    )

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        grads, out, batch_stats = sharded_gradients(state.params, state.batch_stats, key, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {f"loss/{name}": value for name, value in out["losses"].items()}
        metrics |= {"loss": sum(out["losses"].values()), "gradient_norm": optax.tree.norm(grads)}
        state = TrainState(state.step + 1, state.key, params, batch_stats, opt_state)
        return state, metrics | out["monitor"]

    return train_step


def jit_train_step(
    model: nn.Module, tx: optax.GradientTransformation, mesh: Mesh, accumulate: int = 1
) -> jax.stages.Wrapped:
    """`make_train_step` compiled: state replicated and given up, the batch split over devices."""
    return jax.jit(
        make_train_step(model, tx, mesh, accumulate),
        donate_argnums=0,
        in_shardings=(replicated(mesh), batch_sharded(mesh)),
        out_shardings=replicated(mesh),
    )


def make_predict_step(
    model: nn.Module, mesh: Mesh
) -> Callable[[dict, Mapping[str, Array]], dict[str, Array]]:
    """The inference step `(variables, batch) -> results`, each device on its own images."""

    def predict(variables, batch):
        return model.apply(variables, batch, train=False)

    return jax.shard_map(
        predict, mesh=mesh, in_specs=(P(), P(DATA_AXIS)), out_specs=P(DATA_AXIS), check_vma=False
    )
