"""Gradients of a device's images in several parts, one after another, as if on as many devices.

A part has the images of one device of a larger mesh, and K parts on D devices equal one on K D
devices up to the rounding of float32: losses are normalised over the whole batch, random numbers
follow the image. On CPU all parts are added in the order of their images; what is left are the last
bits of convolutions' gradients, which XLA compiles differently inside a loop.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from common.nn import parts
from common.training.distributed import DATA_AXIS, sum_over_devices

Batch = Mapping[str, Array]


def summed_over_parts(
    gradients: Callable[[Batch], tuple[Any, Any]],
    forward: Callable[[Batch], Any],
    batch: Batch,
    count: int,
    *,
    in_order: bool,
    reduce: Callable[[Any], Any] = sum_over_devices,
) -> tuple[Any, Any]:
    """Calls `gradients` for each part of the device's images; call it inside `jax.shard_map`.

    Args:
      gradients: part -> (what is summed over all parts, what is averaged over this device's).
      forward: part -> anything; the sums over the batch that it asks for are those that `gradients`
        asks for.
      batch: of this device, whose rows are a multiple of `count`.
      count: parts; 1 calls `gradients` as it is.
      in_order: adds the parts of all devices in the order of their images, without `reduce`. It
        takes memory for the gradients of all parts.
      reduce: sums over devices what each of them has added.

    Returns:
      the sums and the averages.
    """
    if count == 1:
        summed, averaged = gradients(batch)
        return reduce(summed), averaged
    rows = {name: x.reshape(count, -1, *x.shape[1:]) for name, x in batch.items()}
    numbered = (jnp.arange(count), rows)

    def own_values(part):
        number, batch = part
        with parts.recording(number, count) as values:
            forward(batch)
        return tuple(values)

    values = jax.tree.map(lambda x: x.sum(axis=0), jax.lax.map(own_values, numbered))
    totals = jax.lax.psum(values, DATA_AXIS)

    def of_part(part):
        number, batch = part
        with parts.replaying(number, count, totals):
            return gradients(batch)

    if in_order:
        summed, averaged = jax.lax.map(of_part, numbered)
        summed = jax.tree.map(_sum_in_order, summed)
    else:
        shapes, _ = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], numbered))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(carry, part):
            summed, averaged = of_part(part)
            return jax.tree.map(jnp.add, carry, summed), averaged

        summed, averaged = jax.lax.scan(add, zeros, numbered)
        summed = reduce(summed)
    return summed, jax.tree.map(_mean, averaged)


def _mean(x: Array) -> Array:
    """Over the first axis; of equal values their own bits."""
    return x[0] + (x - x[0]).mean(axis=0).astype(x.dtype)


def _sum_in_order(x: Array) -> Array:
    """Of (count, ...) on each device: the sum over all parts, as `sum_over_devices` adds."""
    everywhere = jax.lax.all_gather(x, DATA_AXIS)
    return everywhere.reshape(-1, *x.shape[1:]).sum(axis=0)
