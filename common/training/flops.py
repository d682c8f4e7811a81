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

    Padding counts, zeros between the cells of a strided convolution's gradient do not. A loop whose
    length depends on the data counts once; of the branches of a condition, the dearest counts.

    Args:
      function: what JAX can trace.
      arguments: its arrays, or their shapes.
      platform: which branch of `jax.lax.platform_dependent` counts.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr, platform)


def _of_jaxpr(jaxpr: core.Jaxpr, platform: str) -> int:
    return sum(_of_equation(equation, platform) for equation in jaxpr.eqns)


def _of_equation(equation, platform: str) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        out_features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        taps = kernel.size // out_features
        return 2 * equation.outvars[0].aval.size * taps // math.prod(params["lhs_dilation"])
    inner = [_of_jaxpr(jaxpr, platform) for jaxpr in _jaxprs(params)]
    if name == "cond":
        platforms = params.get("branches_platforms")
        if platforms is None:
            return max(inner)
        chosen = (i for i, names in enumerate(platforms) if names is None or platform in names)
        return inner[next(chosen)]
    return params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def _jaxprs(params: dict) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
