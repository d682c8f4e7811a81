"""Applies a chain of layers to the rows that are there, of arrays padded to a fixed number of rows.

On CPU the rows that are there are put first, and each layer walks over them in chunks: time follows
their number, forward and backward. Accelerators compute all rows at once: they are faster at few
large arrays.

Shape legend: N rows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

_CHUNK = 16  # rows

Layer = tuple[Callable[..., Array], Any]  # a function of parameters and rows, and its parameters


def map_present(
    layers: Sequence[Layer], present: Bool[Array, " N"], x: Array, fixed: tuple[Array, ...] = ()
) -> Array:
    """`x = function(parameters, x, *fixed)` of each layer in turn where `present`, else zeros.

    A layer's backward pass computes the layer once more, but for what its gradients do not depend
    on. So an activation costs least at the beginning of a layer: of `conv(parameters, relu(x))`
    only the activation is repeated.

    Args:
      layers: each maps rows to rows, of any number of rows and independently of the others.
      present: which rows count.
      x: (N, ...), what the first layer reads.
      fixed: (N, ...), what every layer may read beside it; they get no gradient.
    """
    count = present.shape[0]  # an expression, in programs exported for any number of images

    def at_once(x):
        for function, parameters in layers:
            x = function(parameters, x, *fixed)
        return jnp.where(present.reshape(-1, *[1] * (x.ndim - 1)), x, 0)

    def in_turns(x):
        order = jnp.argsort(~present, stable=True)
        places = jnp.argsort(order, stable=True)
        num_present = present.sum(dtype=jnp.int32)
        pad = -count % min(_CHUNK, count)
        x = _pad(_permute(x, order, places), pad)
        others = tuple(_pad(jnp.take(a, order, axis=0), pad) for a in fixed)
        for function, parameters in layers:
            x = _first_rows(function, num_present, parameters, x, others)
        x = _permute(x[:count], places, order)
        return jnp.where(present.reshape(-1, *[1] * (x.ndim - 1)), x, 0)

    return lax.platform_dependent(x, cpu=in_turns, default=at_once)


def _pad(x: Array, rows: Any) -> Array:
    return jnp.pad(x, ((0, rows), *[(0, 0)] * (x.ndim - 1)))


@jax.custom_vjp
def _permute(x: Array, order: Int[Array, " N"], places: Int[Array, " N"]) -> Array:
    """`x[order]`; `places` is the inverse of `order`, so that no gradient is scattered."""
    del places
    return jnp.take(x, order, axis=0, mode="clip")


def _permute_forward(x, order, places):
    return _permute(x, order, places), (order, places)


def _permute_backward(saved, gradient):
    order, places = saved
    return _permute(gradient, places, order), None, None


_permute.defvjp(_permute_forward, _permute_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _first_rows(function, num_present, parameters, x, fixed):
    """A layer of the first rows, to a whole chunk; zeros behind it."""
    chunk = _chunk(x)
    part = jax.eval_shape(function, parameters, *_chunk_of(0, chunk, (x, *fixed)))

    def visit(i, result):
        rows = function(parameters, *_chunk_of(i, chunk, (x, *fixed)))
        return lax.dynamic_update_slice_in_dim(result, rows, i * chunk, 0)

    result = jnp.zeros((x.shape[0], *part.shape[1:]), part.dtype)
    return lax.fori_loop(0, _num_chunks(num_present, chunk), visit, result)


def _first_rows_forward(function, num_present, parameters, x, fixed):
    result = _first_rows(function, num_present, parameters, x, fixed)
    return result, (num_present, parameters, x, fixed)


def _first_rows_backward(function, saved, gradient):
    num_present, parameters, x, fixed = saved
    chunk = _chunk(x)

    def visit(i, grads):
        rows, row_gradient, *others = _chunk_of(i, chunk, (x, gradient, *fixed))
        transpose = jax.vjp(lambda *a: function(*a, *others), parameters, rows)[1]
        parameter_grads, row_grads = transpose(row_gradient)
        return (
            jax.tree.map(jnp.add, grads[0], parameter_grads),
            lax.dynamic_update_slice_in_dim(grads[1], row_grads, i * chunk, 0),
        )

    start = jax.tree.map(jnp.zeros_like, (parameters, x))
    grads = lax.fori_loop(0, _num_chunks(num_present, chunk), visit, start)
    return None, *grads, None


_first_rows.defvjp(_first_rows_forward, _first_rows_backward)


def _chunk(x: Array) -> Any:
    return min(_CHUNK, x.shape[0])


def _num_chunks(num_present: Int[Array, ""], chunk: Any) -> Int[Array, ""]:
    return (num_present + chunk - 1) // chunk


def _chunk_of(i: Any, chunk: Any, arrays: tuple[Array, ...]) -> list[Array]:
    return [lax.dynamic_slice_in_dim(a, i * chunk, chunk) for a in arrays]
