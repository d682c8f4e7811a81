"""Our programs for one accelerator: random variables, batches, and compilation side by side."""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import path_aware_map

from common.training import distributed
from common.training.optimizer import make_optimizer
from common.training.pod import flops
from common.training.step import TrainState, make_predict_step, make_train_step, variable_shapes
from scripts.bench.bench_train_step import LAST_NORM_SCALE, LEARNING_RATE
from scripts.bench.device.clock import Side, time_sides
from scripts.bench.device.sizes import Sizes

_THREADS = 8
_CLASSIFIER_STD = 0.1  # spreads the scores, so that inference has detections to select among


def random_values(shapes: dict) -> dict:
    """He-normal kernels, scales and variances of 1, residual branches damped, scores spread.

    By NumPy: compiling the initialisers would take longer than all that is timed.
    """
    rng = np.random.default_rng(0)

    def fill(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        if path[-2:] == ("classifier", "kernel"):
            return (_CLASSIFIER_STD * rng.standard_normal(leaf.shape)).astype(np.float32)
        if path[-1] == "kernel":
            scale = np.sqrt(2 / max(np.prod(leaf.shape[:-1]), 1))
            return scale * rng.standard_normal(leaf.shape, np.float32)
        if path[-2:] in (("norm3", "scale"), ("norm2", "scale")):
            return np.full(leaf.shape, LAST_NORM_SCALE, np.float32)
        return np.full(leaf.shape, path[-1] in ("scale", "var"), np.float32)

    return dict(path_aware_map(fill, shapes))


@dataclasses.dataclass
class Trained:
    """A model with its state on the device, and the steps of it.

    Attributes:
      state: replaced by each step.
      train: jitted `(state, batch) -> (state, metrics)`.
      predict: jitted `(variables, batch) -> results`.
    """

    state: TrainState
    train: Any
    predict: Any
    mesh: jax.sharding.Mesh


def make_trained(
    model: nn.Module, optimizer, init_shapes: Mapping[str, Any], frozen: str = ""
) -> Trained:
    """`optimizer`, `frozen`: as of `common.training.optimizer.make_optimizer`."""
    mesh = distributed.make_mesh(jax.devices()[:1])
    variables = random_values(variable_shapes(model, init_shapes))
    params = variables["params"]
    tx: optax.GradientTransformation = make_optimizer(
        optimizer, params, *([frozen] if frozen else [])
    )
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(
        jnp.zeros((), jnp.int32), key, params, variables["batch_stats"], tx.init(params)
    )
    return Trained(
        jax.device_put(state, distributed.replicated(mesh)),
        jax.jit(
            functools.partial(make_train_step(model, tx, mesh), learning_rate=LEARNING_RATE),
            donate_argnums=0,
        ),
        jax.jit(make_predict_step(model, mesh)),
        mesh,
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      run: the executable.
      seconds: of its compilation, beside the others.
      flops: of a call.
      gib: device memory of arguments, results and temporaries.
    """

    run: Any
    seconds: float
    flops: int
    gib: float


def compile_program(function: Any, *arguments: Any) -> Program:
    """`function`: jitted; the arguments may be shapes."""
    count = flops.count(function, *arguments, platform="cuda")
    lowered = function.lower(*arguments)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    size = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    size += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(compiled, seconds, count, size / 2**30)


def compile_all(jobs: Mapping[str, Callable[[], Program]]) -> dict[str, Program | Exception]:
    """Compiles side by side; an entry that fails holds its error."""

    def attempt(job: Callable[[], Program]) -> Program | Exception:
        try:
            return job()
        except Exception as error:  # reported by the case that needs the program
            return error

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(jobs, pool.map(attempt, jobs.values()), strict=True))


@functools.cache
def matrix_rate(size: Sizes) -> float:
    """FLOP a second of a bfloat16 matrix product, measured: what shares of peak are shares of."""
    side = size.matrix
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (side, side), jnp.bfloat16) for key in keys)
    product = jax.jit(jnp.matmul)
    taken = time_sides({"product": Side(lambda: product(a, b), jax.block_until_ready)}, size)
    return 2 * side**3 / taken["product"].median
