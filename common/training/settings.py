"""`config.checkpoint` and `config.log` of every training command."""

import dataclasses

from common.io.settings import check


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """When a run saves its state.

    Attributes:
      every_steps: 0: only at the end (and at epoch ends, where these are kept).
      keep_last: how many of the newest checkpoints stay.
      keep_epochs: saves at the end of every epoch, too, and these stay for
        scripts.average_checkpoints.
    """

    every_steps: int
    keep_last: int
    keep_epochs: bool

    def __post_init__(self):
        check(self.every_steps >= 0, "every_steps", self.every_steps, "0 (at the end) or more")
        check(self.keep_last >= 1, "keep_last", self.keep_last, "at least 1")

    def is_due(self, step: int, steps_per_epoch: int, num_steps: int) -> bool:
        """Whether the state after `step` is saved."""
        by_steps = self.every_steps and step % self.every_steps == 0
        by_epochs = self.keep_epochs and step % steps_per_epoch == 0
        return bool(by_steps or by_epochs or step == num_steps)


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """When a run reports.

    Attributes:
      every_steps: steps from one line of figures to the next.
      stall_seconds: without a finished step until the stacks of all threads are printed; 0: never.
      abort_after_stalls: so many times `stall_seconds` without a step end the run, which names the
        process that holds up the others; 0: never.
      profile_steps: first and last step that are traced (`common.training.profiling`); (): none.
    """

    every_steps: int
    stall_seconds: float
    abort_after_stalls: int
    profile_steps: tuple[int, ...]

    def __post_init__(self):
        check(self.every_steps >= 1, "every_steps", self.every_steps, "at least 1")
        check(self.stall_seconds >= 0, "stall_seconds", self.stall_seconds, "0 (off) or more")
        stalls = self.abort_after_stalls
        check(stalls >= 0, "abort_after_stalls", stalls, "0 (never) or more")
        steps = self.profile_steps
        expected = "() or the first and the last step, counted from 1"
        fits = not steps or (len(steps) == 2 and 1 <= steps[0] <= steps[1])
        check(fits, "profile_steps", steps, expected)

    def is_due(self, step: int, first_step: int, num_steps: int) -> bool:
        """Whether the figures of `step` are reported: also those of the first and the last step."""
        return step % self.every_steps == 0 or step in (first_step, num_steps)
