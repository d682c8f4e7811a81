"""Floating-point operations of a program: those of its matrix products and convolutions.

XLA's own count takes the body of a loop once, however often it runs, so it misses most of a
deformable convolution.
"""

import math
from collections.abc import Callable, Iterator

import jax
from jax.extend import core


def count(function: Callable, *arguments, platform: str = "tpu") -> int:
    """Multiplications and additions of a call, of one device where it is sharded.

    Padding counts; zeros between the cells of a strided convolution's gradient do not, nor does
    what no result depends on. A loop whose length depends on the data counts once; of the branches
    of a condition, the dearest counts.

    Args:
      function: what JAX can trace.
      arguments: its arrays, or their shapes.
      platform: which branch of `jax.lax.platform_dependent` counts.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return _of_jaxpr(jaxpr, [True] * len(jaxpr.outvars), platform)[0]


def _of_jaxpr(jaxpr: core.Jaxpr, wanted: list[bool], platform: str) -> tuple[int, list[bool]]:
    """FLOPs of the wanted results, and which inputs they depend on."""
    needed = {v for v, used in zip(jaxpr.outvars, wanted, strict=True) if used and _is_var(v)}
    total = 0
    for equation in reversed(jaxpr.eqns):
        wanted = [v in needed for v in equation.outvars]
        if any(wanted) or equation.effects:
            flops, inputs = _of_equation(equation, wanted, platform)
            total += flops
            needed |= {
                v for v, used in zip(equation.invars, inputs, strict=True) if used and _is_var(v)
            }
    return total, [v in needed for v in jaxpr.invars]


def _is_var(atom) -> bool:
    return not isinstance(atom, core.Literal)


def _of_equation(equation, wanted: list[bool], platform: str) -> tuple[int, list[bool]]:
    """As `_of_jaxpr`."""
    name, params = equation.primitive.name, equation.params
    everything = [True] * len(equation.invars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        terms = math.prod(left[axis] for axis in contracted)
        return 2 * equation.outvars[0].aval.size * terms, everything
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        taps = kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        zeros = math.prod(params["lhs_dilation"])
        return 2 * equation.outvars[0].aval.size * taps // zeros, everything
    jaxprs = list(_jaxprs(params))
    if name == "cond":
        platforms = params.get("branches_platforms")
        if platforms is not None:
            jaxprs = [jaxprs[_branch(platforms, platform)]]
        branches = [_of_jaxpr(jaxpr, wanted, platform) for jaxpr in jaxprs]
        inputs = [any(used) for used in zip(*(used for _, used in branches), strict=True)]
        return max(flops for flops, _ in branches), [True, *inputs]
    if len(jaxprs) == 1 and name not in ("scan", "while"):
        (jaxpr,) = jaxprs
        if len(jaxpr.invars) == len(everything) and len(jaxpr.outvars) == len(wanted):
            return _of_jaxpr(jaxpr, wanted, platform)
    # Every turn of a loop may need all that the one before left.
    turns = params.get("length", 1) if name == "scan" else 1
    parts = [_of_jaxpr(jaxpr, [True] * len(jaxpr.outvars), platform)[0] for jaxpr in jaxprs]
    return turns * sum(parts), everything


def _branch(platforms: tuple, platform: str) -> int:
    """Index of the branch that is compiled for `platform`; None stands for all others."""
    return next(i for i, names in enumerate(platforms) if names is None or platform in names)


def _jaxprs(params: dict) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
