"""State, optimisation step and inference step of a model, as pure functions over the global batch.

A model is a Linen module with a field `axis_name`. `model(batch, train=True)` gives its share of
the losses by name and figures to watch, `{"losses": {...}, "monitor": {...}}`, in which sums over
the devices make those of the global batch; `model(batch, train=False)` gives what inference is to
give, batch first. Random streams: "sampling", "dropout".
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from common.training.accumulation import summed_over_parts
from common.training.distributed import DATA_AXIS, batch_sharded, replicated, sum_over_devices


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step depends on but its batch; a checkpoint holds exactly this.

    Attributes:
      step: steps done.
      key: data of the run's random key. It is here and not in the program, so that runs that
        differ in their seed alone share a compiled program.
      loss_state: what losses keep from one step to the next; {} for most models.
    """

    step: Array
    key: Array
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    loss_state: dict = flax.struct.field(default_factory=dict)

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
    variables = _first_variables(model, seed, batch)
    params = variables["params"]
    return TrainState(
        jnp.zeros((), jnp.int32),
        jax.random.key_data(jax.random.key(seed)),
        params,
        variables.get("batch_stats", {}),
        tx.init(params),
        variables.get("loss_state", {}),
    )


def init_variables(model: nn.Module, seed: int, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict:
    """Random parameters and statistics; only the shapes of `batch` matter. Call under `jit`."""
    variables = _first_variables(model, seed, batch)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def _first_variables(
    model: nn.Module, seed: int, batch: Mapping[str, jax.ShapeDtypeStruct]
) -> Mapping[str, Any]:
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dict(batch))
    key = jax.random.key(seed)
    streams = {"params": key, "sampling": key, "dropout": key}
    # Parameters do not depend on the devices, and outside of them there is no axis to sum over.
    return model.clone(axis_name=None).init(streams, zeros, train=True)


def variable_shapes(model: nn.Module, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict:
    """Shapes of {'params', 'batch_stats'}; only the shapes of `batch` matter."""
    return jax.eval_shape(lambda: init_variables(model, 0, batch))


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    accumulate: int = 1,
    reduce_dtype: str = "float32",
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The update `(state, batch, learning_rate) -> (state, metrics)`, a pure function of all three.

    The rate is for `tx` of `common.training.optimizer`; one that has its own rate takes none.

    Each device differentiates its share of the loss on its own images; one sum over devices makes
    the gradient of the global batch. Left to the partitioner instead, the loops of NMS would
    synchronise all devices in every round, and the model's dtype would decide that of the sum.

    With `accumulate` each device computes its images in so many parts, one after another, which
    gives what as many times the devices would (`common.training.accumulation`).

    With `reduce_dtype` "bfloat16" each device rounds its gradients once, when all its parts are
    added, for their sum over the devices, which is rounded, too. Losses, counts and figures are
    summed in float32, and a device alone rounds nothing.

    Metrics: every loss term as `loss/...`, their sum `loss`, figures of the model, and the global
    norm of the gradient.
    """

    on_cpu = mesh.devices.flat[0].platform == "cpu"
    rounds = reduce_dtype != "float32" and mesh.size > 1

    def sum_rounded(summed):
        grads, out = summed
        rounded = jax.tree.map(lambda g: g.astype(reduce_dtype), grads)
        totals = jax.tree.map(lambda x: x.astype("float32"), sum_over_devices(rounded))
        return totals, sum_over_devices(out)

    def device_gradients(params, batch_stats, loss_state, key, batch):
        streams = {
            name: jax.random.fold_in(key, i) for i, name in enumerate(("sampling", "dropout"))
        }

        def apply(params, batch):
            return model.apply(
                {"params": params, "batch_stats": batch_stats, "loss_state": loss_state},
                batch,
                train=True,
                rngs=streams,
                mutable=["batch_stats", "loss_state"],
            )

        def loss_fn(params, batch):
            out, mutated = apply(params, batch)
            before = {"batch_stats": batch_stats, "loss_state": loss_state}
            return sum(out["losses"].values()), (out, before | dict(mutated))

        def gradients(batch):
            grads, (out, kept) = jax.grad(loss_fn, has_aux=True)(params, batch)
            return (grads, out), kept

        (grads, out), kept = summed_over_parts(
            gradients,
            lambda batch: apply(params, batch),
            batch,
            accumulate,
            in_order=on_cpu and not rounds,
            reduce=sum_rounded if rounds else sum_over_devices,
        )
        return grads, out, kept

    sharded_gradients = jax.shard_map(
        device_gradients,
        mesh=mesh,
        in_specs=(P(), P(), P(), P(), P(DATA_AXIS)),
        out_specs=P(),
        check_vma=False,
    )

    tx = optax.with_extra_args_support(tx)

    def train_step(state, batch, learning_rate=None):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        grads, out, kept = sharded_gradients(
            state.params, state.batch_stats, state.loss_state, key, batch
        )
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, learning_rate=learning_rate
        )
        params = optax.apply_updates(state.params, updates)
        metrics = {f"loss/{name}": value for name, value in out["losses"].items()}
        metrics |= {"loss": sum(out["losses"].values()), "gradient_norm": optax.tree.norm(grads)}
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, **kept)
        return state, metrics | out["monitor"]

    return train_step


def jit_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    accumulate: int = 1,
    reduce_dtype: str = "float32",
) -> jax.stages.Wrapped:
    """`make_train_step` compiled: the batch split over devices, all else on each of them."""
    return jax.jit(
        make_train_step(model, tx, mesh, accumulate, reduce_dtype),
        donate_argnums=0,
        in_shardings=(replicated(mesh), batch_sharded(mesh), replicated(mesh)),
        out_shardings=replicated(mesh),
    )


def scheduled(
    step: Callable[..., tuple[TrainState, dict[str, Array]]], schedule: optax.Schedule, mesh: Mesh
) -> Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """The update `(state, batch) -> (state, metrics)` of `jit_train_step` at a schedule's rates.

    The rate comes from a small program of its own: another schedule compiles that one alone, and no
    step waits for the host.
    """
    rate = jax.jit(schedule, out_shardings=replicated(mesh))
    return lambda state, batch: step(state, batch, rate(state.step))


def make_predict_step(
    model: nn.Module, mesh: Mesh
) -> Callable[[dict, Mapping[str, Array]], dict[str, Array]]:
    """The inference step `(variables, batch) -> results`, each device on its own images."""

    def predict(variables, batch):
        return model.apply(variables, batch, train=False)

    return jax.shard_map(
        predict, mesh=mesh, in_specs=(P(), P(DATA_AXIS)), out_specs=P(DATA_AXIS), check_vma=False
    )
