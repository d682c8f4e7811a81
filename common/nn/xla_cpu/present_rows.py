"""Applies a network to the rows that are there, of arrays padded to a fixed number of rows.

Shape legend: N rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

_CHUNK = 16  # rows


def map_present(
    function: Callable[..., Array], present: Bool[Array, " N"], rows: tuple[Any, ...]
) -> Array:
    """`function(*rows)`, row by row independent, where `present`; zeros elsewhere.

    On CPU chunks of rows are taken in turn, and those without any present row are left out, forward
    and backward: time follows the number of present rows if they are put together. Accelerators
    compute all rows at once: they are faster at few large arrays.

    Args:
      function: of arrays with N rows each, or of any other number.
      present: which rows count.
      rows: arguments, each (N, ...).
    """

    def at_once(present, *rows):
        result = function(*rows)
        return jnp.where(present.reshape(-1, *[1] * (result.ndim - 1)), result, 0)

    def in_turns(present, *rows):
        count = present.shape[0]  # an expression, in programs exported for any number of images
        chunk = min(_CHUNK, count)
        num_chunks, pad = -(-count // chunk), -count % chunk

        def chunks(x):
            x = jnp.pad(x, ((0, pad), *[(0, 0)] * (x.ndim - 1)))
            return x.reshape(num_chunks, chunk, *x.shape[1:])

        def visit(part):
            shape = jax.eval_shape(at_once, *part)
            nothing = lambda *part: jnp.zeros(shape.shape, shape.dtype)  # noqa: E731
            return lax.cond(part[0].any(), at_once, nothing, *part)

        result = lax.map(visit, jax.tree.map(chunks, (present, *rows)))
        return result.reshape(-1, *result.shape[2:])[:count]

    return lax.platform_dependent(present, *rows, cpu=in_turns, default=at_once)
