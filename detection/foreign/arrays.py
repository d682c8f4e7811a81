"""How an array of another framework lies in ours, forth and back.

torch keeps kernels as (outputs, inputs, height, width), we as (height, width, inputs, outputs).
Layers with outputs for each class may have them in another order, and more of them: of background,
or of numbers that no class has.

Shape legend: I inputs, O outputs, h w sides of a kernel, S side and C channels of pooled features,
n outputs of ours.
"""

import dataclasses
import math

import numpy as np

State = dict[str, np.ndarray]

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Which outputs of another model are ours.

    Attributes:
      places: (n,) of ours among theirs.
      total: how many theirs has.
    """

    places: tuple[int, ...]
    total: int

    def repeated(self, width: int) -> "Outputs":
        """The same of a layer with `width` outputs a class."""
        places = [place * width + i for place in self.places for i in range(width)]
        return Outputs(tuple(places), self.total * width)

    def take(self, value: np.ndarray) -> np.ndarray:
        return value[..., np.array(self.places, np.int64)]

    def put_back(self, value: np.ndarray) -> np.ndarray:
        """Theirs of ours; what we lack is 0."""
        result = np.zeros((*value.shape[:-1], self.total), value.dtype)
        result[..., np.array(self.places, np.int64)] = value
        return result


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one of our arrays lies in another framework.

    Attributes:
      shape: of ours.
      pooled: C, S where the inputs of a dense layer are flattened pooled features; else None.
      reversed_inputs: the first layer of a network that reads pixels as blue, green, red.
      outputs: which of theirs are ours; None: all, in the same order.
      transposed: kernel of a transposed convolution: torch's has its inputs first.
      pointwise: kernel of a matmul that torch has as 1x1 convolution.
      shift: subtracted from theirs (a variance where theirs has another epsilon).
    """

    shape: tuple[int, ...]
    pooled: tuple[int, int] | None = None
    reversed_inputs: bool = False
    outputs: Outputs | None = None
    transposed: bool = False
    pointwise: bool = False
    shift: float = 0.0

    @property
    def their_shape(self) -> tuple[int, ...]:
        return self.to_theirs(np.zeros(self.shape, np.float32)).shape

    def to_ours(self, value: np.ndarray) -> np.ndarray:
        """Float32, of `shape` if `value` has `their_shape`."""
        if value.ndim == 4:
            value = value.transpose(2, 3, 0, 1) if self.transposed else value.transpose(2, 3, 1, 0)
        elif value.ndim == 2:
            value = value.T
        if self.pointwise:
            value = value[0, 0]
        if self.pooled is not None:
            channels, side = self.pooled
            value = value.reshape(channels, side, side, -1).transpose(1, 2, 0, 3)
            value = value.reshape(side * side * channels, -1)
        if self.reversed_inputs:
            value = value[:, :, ::-1]
        if self.outputs is not None:
            value = self.outputs.take(value)
        if self.shift:
            value = value.astype(np.float64) - self.shift
        return np.ascontiguousarray(value, np.float32)

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`, bit for bit where nothing is shifted."""
        if self.shift:
            value = value.astype(np.float64) + self.shift
        if self.outputs is not None:
            value = self.outputs.put_back(value)
        if self.reversed_inputs:
            value = value[:, :, ::-1]
        if self.pooled is not None:
            channels, side = self.pooled
            value = value.reshape(side, side, channels, -1).transpose(2, 0, 1, 3)
            value = value.reshape(math.prod(value.shape[:3]), -1)
        if self.pointwise:
            value = value[None, None]
        if value.ndim == 4:
            value = value.transpose(2, 3, 0, 1) if self.transposed else value.transpose(3, 2, 0, 1)
        elif value.ndim == 2:
            value = value.T
        return np.ascontiguousarray(value, np.float32)
