"""The largest batch that fits a memory, by few compilations: memory is nearly linear in it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

_LINES = 6  # tries after which straight lines are no longer trusted, and intervals are halved


class Trial(NamedTuple):
    """What one size needs.

    Attributes:
      size: that was tried.
      bytes: of memory; None: more than there is, by how much is not known.
      fixed: of these, bytes that every size needs.
    """

    size: int
    bytes: int | None
    fixed: int = 0

    def fits(self, limit: int) -> bool:
        return self.bytes is not None and self.bytes <= limit


def largest_that_fits(
    measure: Callable[[int], Trial], limit: int, start: int, most: int, say: Callable[[str], None]
) -> list[Trial]:
    """Tries sizes until one fits and the next one does not.

    Args:
      measure: tries a size, which takes long.
      limit: bytes that a size may need.
      start: size that is tried first.
      most: size beyond which nothing is tried.
      say: hears of each result what it means for the next try.

    Returns:
      the tries in their order; none of them fits where not even 1 does.
    """
    trials: list[Trial] = []
    size, stride = min(max(start, 1), most), 1
    while True:
        trials.append(measure(size))
        fitting = max((t.size for t in trials if t.fits(limit)), default=0)
        failing = min((t.size for t in trials if not t.fits(limit)), default=most + 1)
        if failing - fitting <= 1:
            say(f"{_told(trials[-1], limit)}; the search ends")
            return trials
        line = crossing(trials, limit)
        size = (fitting + failing) // 2
        if line is not None and len(trials) < _LINES:
            if fitting < line < failing:
                size = line
            else:  # what the line says is not so, or is to be made sure of
                size = fitting + stride if line <= fitting else failing - stride
                size = min(max(size, fitting + 1), failing - 1)
                stride *= 2
        told = _told(trials[-1], limit)
        say(
            told + ("" if line is None else f"; a straight line ends at {line}") + f": tries {size}"
        )


def crossing(trials: Sequence[Trial], limit: int) -> int | None:
    """The largest size below the limit on the straight line through the two tries nearest to it.

    One try alone makes a line with its fixed part; without any there is none.
    """
    near = sorted(
        (abs(t.bytes - limit), t.size, t.bytes, t.fixed) for t in trials if t.bytes is not None
    )
    if not near:
        return None
    _, size, needed, fixed = near[0]
    slope = (needed - fixed) / size
    if len(near) > 1:
        _, other, others_needed, _ = near[1]
        slope = (needed - others_needed) / (size - other)
    if slope <= 0:
        return None
    return max(int(size + (limit - needed) // slope), 0)


def _told(trial: Trial, limit: int) -> str:
    if trial.bytes is None:
        return f"{trial.size} do not fit"
    verb = "need" if trial.fits(limit) else "would need"
    return f"{trial.size} {verb} {trial.bytes / 2**30:.2f} of {limit / 2**30:.2f} GiB"
