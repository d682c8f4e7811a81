"""A batch in parts: the devices' parts, and of each of these the parts that come one after another.

Layers and losses ask here for what concerns the whole batch: sums over all of its images, and the
number of an image in it. Where a device computes its images in several parts
(`common.training.accumulation`), sums over the whole cannot be known while the first part is
computed. So the forward pass runs twice: once `recording` what each part has to add, and once more,
with gradients, `replaying` the totals in the same order.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from common.io.errors import UserError


@dataclasses.dataclass
class _Part:
    """The part that is being traced.

    Attributes:
      number: of the part on its device, traced.
      count: parts of each device.
      values: what was summed so far (recording), or the totals still to be taken (replaying).
      replaying: which of the two.
    """

    number: Array
    count: int
    values: list[Any]
    replaying: bool


_part: _Part | None = None  # tracing is single-threaded


@contextlib.contextmanager
def recording(number: Array, count: int) -> Iterator[list[Any]]:
    """Collects what `sum_over_batch` is asked for in the block; it returns the part's own values.

    Args:
      number: of this part on its device, 0 ... count - 1.
      count: parts of each device.
    """
    with _tracing(_Part(number, count, [], replaying=False)) as part:
        yield part.values


@contextlib.contextmanager
def replaying(number: Array, count: int, totals: Sequence[Any]) -> Iterator[None]:
    """Has `sum_over_batch` return the totals, in the order of the recording."""
    with _tracing(_Part(number, count, list(totals), replaying=True)) as part:
        yield
        assert not part.values, "the two passes asked for different sums"


@contextlib.contextmanager
def _tracing(part: _Part) -> Iterator[_Part]:
    global _part
    assert _part is None, "parts of parts"
    _part = part
    try:
        yield part
    finally:
        _part = None


def sum_over_batch(tree: Any, axis_name: str | None) -> Any:
    """Sum over the images of the whole batch of what this part has of them.

    Args:
      tree: arrays that are no functions of such sums.
      axis_name: of the devices; None: this is the whole batch.
    """
    if axis_name is None:
        return tree
    if _part is None:
        return jax.lax.psum(tree, axis_name)
    if _part.replaying:
        return _part.values.pop(0)
    _part.values.append(tree)
    return tree


def image_numbers(num_images: int, axis_name: str | None) -> Int[Array, " b"]:
    """The numbers of the images of this part in the whole batch."""
    numbers = jnp.arange(num_images)
    if axis_name is None:
        return numbers
    part = jax.lax.axis_index(axis_name)
    if _part is not None:
        part = part * _part.count + _part.number
    return numbers + part * num_images


def refuse_parts(what: str) -> None:
    """For layers that need all images of a batch at the same time.

    Raises:
      UserError: the batch is computed in parts.
    """
    if _part is not None:
        raise UserError(
            f"config.optimizer.accumulate: found {_part.count}, expected 1: {what} needs all "
            "images of a batch at once"
        )
