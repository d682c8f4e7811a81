"""Bilinear enlargement by a whole factor, with half-pixel centres (`align_corners=False`).

`jax.image.resize` computes each output from all inputs of its row, as a product with a matrix. Here
it is a weighted sum of two neighbours, and so is the gradient.

Shapes: B batch, h w map, f factor, H W = f h, f w, C channels.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def enlarge(x: Float[Array, "B h w C"], factor: int) -> Float[Array, "B H W C"]:
    """Differentiable in reverse mode; sums are float32, the result has the type of `x`."""
    y = _along(_along(x.astype(jnp.float32), factor, 1), factor, 2)
    return y.astype(x.dtype)


def _forward(x, factor):
    return enlarge(x, factor), None


def _backward(factor, _, grad):
    total = _transposed(_transposed(grad.astype(jnp.float32), factor, 2), factor, 1)
    return (total.astype(grad.dtype),)


enlarge.defvjp(_forward, _backward)


def _places(factor):
    """Distance of each of the `factor` new cells from the centre of the old one, in old cells."""
    return [(i + 0.5) / factor - 0.5 for i in range(factor)]


def _along(x, factor, axis):
    """Enlarges one axis. Beyond the border the outermost cell is repeated."""
    count = x.shape[axis]
    padding = [(0, 0)] * x.ndim
    padding[axis] = (1, 1)
    padded = jnp.pad(x, padding, mode="edge")
    before = jax.lax.slice_in_dim(padded, 0, count, axis=axis)
    after = jax.lax.slice_in_dim(padded, 2, count + 2, axis=axis)
    parts = [
        x * (1 - abs(place)) + (before if place < 0 else after) * abs(place)
        for place in _places(factor)
    ]
    shape = (*x.shape[:axis], factor * count, *x.shape[axis + 1 :])
    return jnp.stack(parts, axis + 1).reshape(shape)


def _transposed(grad, factor, axis):
    """Transpose of `_along`, from gradients of the enlarged cells to those of the old ones."""
    count = grad.shape[axis] // factor
    parts = grad.reshape(*grad.shape[:axis], count, factor, *grad.shape[axis + 1 :])
    own = before = after = 0.0
    for i, place in enumerate(_places(factor)):
        part = jax.lax.index_in_dim(parts, i, axis + 1, keepdims=False)
        own = own + part * (1 - abs(place))
        if place < 0:
            before = before + part * -place
        else:
            after = after + part * place

    def cells(values, start, stop):
        return jax.lax.slice_in_dim(values, start, stop, axis=axis)

    # Beyond the border the neighbour was the outermost cell itself.
    from_left = jnp.concatenate([cells(before, 0, 1), cells(after, 0, count - 1)], axis)
    from_right = jnp.concatenate([cells(before, 1, count), cells(after, count - 1, count)], axis)
    return own + from_left + from_right
