"""The canvases of a run: the few image shapes that its programs are compiled for.

`config.data.canvas` is (short, long): the short side of a photo becomes `short`, unless its long
side would exceed `long`, in either orientation. Landscape photos lie on a canvas of height `short`
and width `long`, portrait photos on one of height `long` and width `short`. `config.data.scales`
are the short sides of multi-scale training; their long sides keep the ratio of the canvas.

Sizes and canvases are (height, width).
"""

import numpy as np
from jaxtyping import Bool, Int

from common.data.images import canvas_shape
from common.data.settings import DataSettings

Canvas = tuple[int, int]


def orientations(canvas: Canvas) -> tuple[Canvas, Canvas]:
    """The canvases of landscape (and square) and of portrait photos; equal for a square canvas."""
    short, long = canvas
    return (short, long), (long, short)


def step_canvases(data: DataSettings) -> list[tuple[Canvas, Canvas]]:
    """`orientations` for each short side that training steps have."""
    short, long = data.canvas
    return [orientations((scale, round(long * scale / short))) for scale in data.scales or (short,)]


def train_canvases(data: DataSettings) -> list[Canvas]:
    """The padded shapes of all training batches, each once: a program is compiled for each."""
    every = [canvas for pair in step_canvases(data) for canvas in pair]
    return list(dict.fromkeys(canvas_shape(canvas, data.pad_multiple) for canvas in every))


def is_portrait(sizes: Int[np.ndarray, "n 2"]) -> Bool[np.ndarray, " n"]:
    """Which photos are higher than wide; those of unknown size, 0, are taken as landscape."""
    sizes = np.asarray(sizes)
    return sizes[:, 0] > sizes[:, 1]
