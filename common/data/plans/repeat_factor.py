"""Repeat factor sampling (Gupta et al. 2019, LVIS): photos of rare classes come several times.

In epoch e image i comes floor(r_i) times, and once more if a uniform number of (seed, e, i) is
below the fraction of r_i. So its mean is r_i; which images get the extra draw changes from epoch
to epoch. The draws of an epoch are then permuted. Epochs differ in length: where one starts is the
sum of the lengths before, which takes a pass over the images an epoch, once.

Shape legend: B slots of a batch, n images of the stream.
"""

import threading

import numpy as np
from jaxtyping import Float64, Int64

from common.data.plans.permutation import IMAGES, REPEATS, permute, slots_of, stream_key, uniforms
from common.data.plans.streams import Drawn

_KEPT = 4  # epochs whose draws are in memory; a batch touches one or two


class RepeatFactorPlan:
    """An endless stream of epochs as above, cut into batches, which may straddle two.

    What lies at a place is a function of the arguments alone; the tables of the latest epochs are
    kept only so as not to make them again.
    """

    def __init__(
        self,
        images: Int64[np.ndarray, " n"],
        factors: Float64[np.ndarray, " n"],
        seed: int,
        batch_size: int,
        source: int = 0,
    ):
        """Reads nothing.

        Args:
          images: image indices of the dataset.
          factors: mean draws of each in an epoch, at least 1.
          seed: of the run.
          batch_size: B.
          source: their dataset.
        """
        self._images, self._seed = images, seed
        self._batch_size, self._source = batch_size, source
        self._whole = np.floor(factors).astype(np.int64)
        self._fraction = factors - self._whole
        self._uncertain = np.flatnonzero(self._fraction)
        self._starts = [0]  # of epochs, in places of the stream
        self._ends: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def batch(self, step: int) -> Drawn:
        return self.draw(slots_of(step, self._batch_size))

    def draw(self, slots: Int64[np.ndarray, " n"]) -> Drawn:
        images = np.empty(len(slots), np.int64)
        epochs = self._epochs(slots)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            ends = self._draw_ends(int(epoch))
            place = slots[chosen] - self._starts[epoch]
            place = permute(place, int(ends[-1]), stream_key(self._seed, IMAGES, epoch))
            images[chosen] = self._images[np.searchsorted(ends, place, "right")]
        classes = np.full(len(slots), -1, np.int32)
        return Drawn(images, classes, np.full(len(slots), self._source, np.int32))

    def draws(self, epoch: int) -> Int64[np.ndarray, " n"]:
        """How often each image comes in an epoch."""
        draws = self._whole.copy()
        rows = self._uncertain
        number = uniforms(1, self._seed, REPEATS, epoch, self._images[rows])[:, 0]
        draws[rows] += number < self._fraction[rows]
        return draws

    def _epochs(self, slots: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        last = int(slots.max(initial=0))
        with self._lock:
            while self._starts[-1] <= last:
                length = int(self.draws(len(self._starts) - 1).sum())
                self._starts.append(self._starts[-1] + length)
            return np.searchsorted(self._starts, slots, "right") - 1

    def _draw_ends(self, epoch: int) -> Int64[np.ndarray, " n"]:
        """Cumulative draws of an epoch."""
        with self._lock:
            if epoch not in self._ends:
                while len(self._ends) >= _KEPT:
                    del self._ends[next(iter(self._ends))]
                self._ends[epoch] = np.cumsum(self.draws(epoch))
            return self._ends[epoch]
