"""SGD with momentum and its learning-rate schedule.

One update, with g the gradient, w a parameter and m its momentum buffer:

    g <- g * min(1, clip_norm / |all g|)         of all trained parameters, see `make_optimizer`
    g <- g + weight_decay * w                    kernels of convolutions and dense layers only
    m <- momentum * m + g
    w <- w - learning_rate(step) * m

which is `torch.optim.SGD` after `clip_grad_norm_`. Frozen parameters have no momentum buffer, take
no part in the norm and do not change.

A config writes its learning rate in one of two ways. `learning_rate_per_image` is multiplied with
the batch size: the detector's 0.004 N for N accelerators with 2 images each is 0.002 per image
(paper section 6). `learning_rate` is the same for any batch: the segmenter's 0.08 holds for 8, 32
and 80 accelerators (paper section 8.4).
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from common.io.errors import UserError
from common.io.settings import check


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """`config.optimizer`.

    Attributes:
      learning_rate: the highest rate, whatever the batch size; or 0 and
      learning_rate_per_image: the highest rate divided by the images of a batch.
      warmup_start: absolute rate of step 0 (or the highest rate where that is lower).
      warmup_epochs: from `warmup_start` to the highest rate, in a straight line; or, when positive,
      warmup_steps: the same in steps.
      num_epochs: of the whole run, which may be a fraction; or, when positive,
      num_steps: the same in steps.
      decay: how the rate falls: 'step' by `decay_factor` at each of `decay_epochs`, 'cosine' half a
        cosine to 0, or 'poly' with the `power` of the share of steps that is left.
      momentum, weight_decay: see the head of the module.
      clip_norm: of the gradient of all trained parameters together, but for those that
        `make_optimizer` is told to clip by themselves; 0: not clipped.
      accumulate: parts, one after another, in which each device computes its images of a step.
      reduce_dtype: to which gradients are rounded for their sum over devices; all else is float32.
    """

    learning_rate: float
    learning_rate_per_image: float
    warmup_start: float
    warmup_epochs: float
    warmup_steps: int
    num_epochs: float
    num_steps: int
    decay: Literal["step", "cosine", "poly"]
    decay_epochs: tuple[float, ...]
    decay_factor: float
    power: float
    momentum: float
    weight_decay: float
    clip_norm: float
    accumulate: int
    reduce_dtype: Literal["float32", "bfloat16"]

    def __post_init__(self):
        rates = self.learning_rate, self.learning_rate_per_image
        check(
            sorted(rate > 0 for rate in rates) == [False, True] and min(rates) == 0,
            "learning_rate_per_image",
            self.learning_rate_per_image,
            f"one of it and learning_rate ({self.learning_rate}) above 0 and the other one 0",
        )
        for name in ("warmup_start", "warmup_epochs", "warmup_steps", "num_steps", "momentum"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("weight_decay", "clip_norm"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("decay_factor", "power"):
            check(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        check(self.accumulate >= 1, "accumulate", self.accumulate, "at least 1")
        if not self.num_steps:
            check(self.num_epochs > 0, "num_epochs", self.num_epochs, "more than 0")
        epochs = self.decay_epochs
        ascending = list(epochs) == sorted(set(epochs)) and min(epochs, default=1) > 0
        check(ascending, "decay_epochs", epochs, "ascending positive epochs")


def total_steps(settings: OptimizerSettings, steps_per_epoch: int) -> int:
    """Number of steps of the whole run."""
    return settings.num_steps or max(round(settings.num_epochs * steps_per_epoch), 1)


def warmup_note(settings: OptimizerSettings, steps_per_epoch: int) -> str:
    """A line for the start of a run that ends before its warm-up does; "" of others."""
    steps, warmup = total_steps(settings, steps_per_epoch), warmup_steps(settings, steps_per_epoch)
    if warmup < steps:
        return ""
    return (
        f"note: the warm-up takes {warmup} steps, the run has {steps}: the learning rate does not "
        "reach its full value (config.optimizer.warmup_steps, warmup_epochs)"
    )


def warmup_steps(settings: OptimizerSettings, steps_per_epoch: int) -> int:
    """Number of steps of the warm-up."""
    return settings.warmup_steps or round(settings.warmup_epochs * steps_per_epoch)


def make_schedule(
    settings: OptimizerSettings, *, batch_size: int, steps_per_epoch: int
) -> optax.Schedule:
    """The learning rate as a function of the step.

    Args:
      settings: of the run.
      batch_size: images of one global step.
      steps_per_epoch: of the training split.

    Returns:
      step (counted from 0, also inside `jit`) -> learning rate, float32.
    """
    peak = settings.learning_rate or settings.learning_rate_per_image * batch_size
    start = min(settings.warmup_start, peak)
    rising = warmup_steps(settings, steps_per_epoch)
    warmup = optax.linear_schedule(start, peak, rising)
    if not rising:  # optax would stay at `start`
        warmup = optax.constant_schedule(peak)
    last = total_steps(settings, steps_per_epoch)
    if settings.decay == "step":
        drops = {round(e * steps_per_epoch): settings.decay_factor for e in settings.decay_epochs}
        decay = optax.piecewise_constant_schedule(1.0, drops)
    elif settings.decay == "poly":  # of all steps, warm-up included
        decay = optax.polynomial_schedule(1.0, 0.0, settings.power, last)
    else:
        cosine = optax.cosine_decay_schedule(1.0, max(last - rising, 1))
        decay = optax.join_schedules([optax.constant_schedule(1.0), cosine], [rising])
    return lambda step: jnp.asarray(warmup(step) * decay(step), jnp.float32)


def make_optimizer(
    settings: OptimizerSettings,
    params: Any,
    frozen_pattern: str | None = None,
    apart_pattern: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The update of the module's head, `tx.update(grads, state, params, learning_rate=...)`.

    Nothing of the schedule is in it, so that runs whose schedules differ share a compiled step.

    Args:
      settings: of the run.
      params: tree of parameters, or of their shapes.
      frozen_pattern: regular expression for the whole '/'-joined path of parameters that are not
        trained, such as 'backbone/(?:conv1|layer1)/.*'.
      apart_pattern: the same for parameters whose gradients have a norm, and are clipped, by
        themselves, since their losses say nothing of the others' scale.

    Returns:
      a transformation whose state is a step count (one more with parameters apart) and one momentum
      buffer per trained parameter.

    Raises:
      UserError: nothing is left to train.
    """
    trained = trained_mask(params, frozen_pattern)
    if not any(jax.tree.leaves(trained)):
        raise UserError(f"model: all parameters are frozen (pattern {frozen_pattern!r})")
    steps = [
        optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity(),
        optax.add_decayed_weights(settings.weight_decay, mask=is_kernel_mask),
        optax.trace(decay=settings.momentum, nesterov=False),
        _scale_by_given_rate(),
    ]

    def group(is_trained: bool, is_with_others: bool) -> str:
        return ("trained" if is_with_others else "apart") if is_trained else "frozen"

    groups = jax.tree.map(group, trained, trained_mask(params, apart_pattern))
    learning = sorted({"trained", *jax.tree.leaves(groups)} - {"frozen"})
    updates = dict.fromkeys(learning, optax.chain(*steps))
    return optax.partition(updates | {"frozen": optax.set_to_zero()}, groups)


def _scale_by_given_rate() -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate` with its state, but for where the rate comes from."""

    def init(params: Any) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, learning_rate):
        del params
        scaled = jax.tree.map(lambda g: jnp.asarray(-learning_rate, g.dtype) * g, updates)
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def trained_mask(params: Any, frozen_pattern: str | None) -> Any:
    """True for each parameter whose '/'-joined path does not match `frozen_pattern` as a whole."""
    if frozen_pattern is None:
        return jax.tree.map(lambda _: True, params)
    frozen = re.compile(frozen_pattern)
    return _map_with_path(lambda path: not frozen.fullmatch(path), params)


def is_kernel_mask(params: Any) -> Any:
    """True for kernels of convolutions and dense layers; not for biases and norm parameters."""
    return _map_with_path(lambda path: path.rsplit("/", 1)[-1] == "kernel", params)


def _map_with_path(function: Callable[[str], Any], tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: function(jax.tree_util.keystr(path, simple=True, separator="/")), tree
    )
