"""SGD with momentum and its learning-rate schedule.

One update, with g the gradient, w a parameter and m its momentum buffer:

    g <- g * min(1, clip_norm / |all g|)         all trained parameters together
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

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from common.io.errors import UserError


def total_steps(config: ConfigDict, steps_per_epoch: int) -> int:
    """Number of steps of the whole run: `config.num_steps` when there and positive, else those of
    `config.num_epochs`, which may be a fraction."""
    if steps := config.get("num_steps"):
        if steps < 0:
            raise UserError(f"config.optimizer.num_steps: found {steps}, expected 0 or more")
        return steps
    return max(round(config.num_epochs * steps_per_epoch), 1)


def make_schedule(config: ConfigDict, *, batch_size: int, steps_per_epoch: int) -> optax.Schedule:
    """Linear warm-up, then drops by `decay_factor` at the given epochs, half a cosine to 0, or a
    power of the share of steps that is left.

    Args:
      config: learning_rate_per_image or learning_rate, the other one 0; warmup_start, the absolute
        rate of step 0 (or the peak where that is lower); warmup_epochs, or warmup_steps when
        positive; decay, 'step' (also where the field is missing), 'cosine' or 'poly'; decay_epochs,
        ascending, and decay_factor of 'step'; power of 'poly'; num_epochs, or num_steps when there
        and positive.
      batch_size: images of one global step, which multiply learning_rate_per_image.
      steps_per_epoch: of the training split.

    Returns:
      step (counted from 0, also inside `jit`) -> learning rate, float32.

    Raises:
      UserError: a field has a value that makes no schedule.
    """
    _check_schedule(config)
    peak = config.learning_rate or config.learning_rate_per_image * batch_size
    decay = config.get("decay", "step")
    start = min(config.warmup_start, peak)
    warmup_steps = config.get("warmup_steps") or round(config.warmup_epochs * steps_per_epoch)
    last = total_steps(config, steps_per_epoch)
    if decay == "step":
        boundaries = np.array([round(e * steps_per_epoch) for e in config.decay_epochs], np.int32)
        factors = config.decay_factor ** np.arange(len(boundaries) + 1, dtype=np.float64)

    def schedule(step):
        step = jnp.asarray(step, jnp.int32)
        share = jnp.minimum(step.astype(jnp.float32) / max(warmup_steps, 1), 1.0)
        warm = start + (peak - start) * share if warmup_steps else peak
        if decay == "poly":  # of all steps, warm-up included
            left = 1 - jnp.clip(step.astype(jnp.float32) / last, 0.0, 1.0)
            return jnp.float32(warm) * left**config.power
        if decay == "cosine":
            left = (step - warmup_steps) / max(last - warmup_steps, 1)
            return jnp.float32(warm) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(left, 0.0, 1.0)))
        drops = jnp.sum(step >= boundaries, dtype=jnp.int32)
        return jnp.float32(warm) * jnp.asarray(factors, jnp.float32)[drops]

    return schedule


def make_optimizer(
    config: ConfigDict, schedule: optax.Schedule, params: Any, frozen_pattern: str | None = None
) -> optax.GradientTransformation:
    """The update of the module's head.

    Args:
      config: momentum, weight_decay, clip_norm (0 or None: off).
      schedule: step -> learning rate.
      params: tree of parameters, or of their shapes.
      frozen_pattern: regular expression for the whole '/'-joined path of parameters that are not
        trained, such as 'backbone/(?:conv1|layer1)/.*'.

    Returns:
      a transformation whose state is a step count and one momentum buffer per trained parameter.

    Raises:
      UserError: a negative coefficient, or nothing left to train.
    """
    for name in ("momentum", "weight_decay", "clip_norm"):
        if (config[name] or 0) < 0:
            raise UserError(f"config.optimizer.{name}: found {config[name]}, expected 0 or more")
    trained = trained_mask(params, frozen_pattern)
    if not any(jax.tree.leaves(trained)):
        raise UserError(f"model: all parameters are frozen (pattern {frozen_pattern!r})")
    steps = [
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.add_decayed_weights(config.weight_decay, mask=is_kernel_mask),
        optax.trace(decay=config.momentum, nesterov=False),
        optax.scale_by_learning_rate(schedule),
    ]
    return optax.partition(
        {"trained": optax.chain(*steps), "frozen": optax.set_to_zero()},
        jax.tree.map(lambda is_trained: "trained" if is_trained else "frozen", trained),
    )


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


def _check_schedule(config: ConfigDict) -> None:
    decay = config.get("decay", "step")
    if decay not in ("step", "cosine", "poly"):
        raise UserError(
            f"config.optimizer.decay: found {decay!r}, expected 'step', 'cosine' or 'poly'"
        )
    rates = config.learning_rate, config.learning_rate_per_image
    if sorted(rate > 0 for rate in rates) != [False, True] or min(rates) < 0:
        raise UserError(
            f"config.optimizer.learning_rate_per_image: found {rates[1]} beside learning_rate "
            f"{rates[0]}, expected one of them above 0 and the other one 0"
        )
    positive = ["num_epochs"] if not config.get("num_steps") else []
    positive += {"step": ["decay_factor"], "cosine": [], "poly": ["power"]}[decay]
    for name in positive:
        if not config[name] > 0:
            raise UserError(f"config.optimizer.{name}: found {config[name]}, expected more than 0")
    for name in ("warmup_start", "warmup_epochs"):
        if config[name] < 0:
            raise UserError(f"config.optimizer.{name}: found {config[name]}, expected 0 or more")
    epochs = list(config.decay_epochs) if decay == "step" else []
    if epochs != sorted(set(epochs)) or any(epoch <= 0 for epoch in epochs):
        raise UserError(
            f"config.optimizer.decay_epochs: found {epochs}, expected ascending positive epochs"
        )
