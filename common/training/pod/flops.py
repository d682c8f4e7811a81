"""What a program computes and moves: its matrix products and convolutions, and its other passes.

XLA's own count takes the body of a loop once, however often it runs, so it misses most of a
deformable convolution.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax.extend import core

CONVOLUTION, PRODUCT = "convolutions", "matrix products"
GATHER, SORT, REDUCTION = "gathers and scatters", "sorts", "reductions"
# Primitives that read and write memory by themselves; all others are fused into what uses them.
_KINDS = {
    "gather": GATHER,
    "dynamic_slice": GATHER,
    "sort": SORT,
    "top_k": SORT,
    "approx_top_k": SORT,
    "cumsum": REDUCTION,
    "cummax": REDUCTION,
    "argmax": REDUCTION,
    "argmin": REDUCTION,
}
# Primitives that change some rows of an array, and which of their inputs the new rows are.
_CHANGES = {
    "scatter": 2,
    "scatter-add": 2,
    "scatter_add": 2,
    "scatter-max": 2,
    "scatter_max": 2,
    "dynamic_update_slice": 1,
}


class Operation(NamedTuple):
    """A step of a program that the compiler cannot fuse away.

    Attributes:
      kind: one of the names above.
      flops: multiplications and additions of a product or convolution; others have none.
      depth: terms of each sum of a product.
      width: columns of its result; those of a convolution are its channels.
      bytes: read and written.
      turns: how often a loop runs it.
    """

    kind: str
    flops: int
    depth: int
    width: int
    bytes: int
    turns: int = 1


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
    return _flops(operations(function, *arguments, platform=platform))


def operations(function: Callable, *arguments, platform: str = "tpu") -> list[Operation]:
    """The operations of a call; arguments as `count`."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return _of_jaxpr(jaxpr, [True] * len(jaxpr.outvars), platform)[0]


def _flops(found: list[Operation]) -> int:
    return sum(operation.flops * operation.turns for operation in found)


def _of_jaxpr(
    jaxpr: core.Jaxpr, wanted: list[bool], platform: str
) -> tuple[list[Operation], list[bool]]:
    """Operations behind the wanted results, and which inputs they depend on."""
    needed = {v for v, used in zip(jaxpr.outvars, wanted, strict=True) if used and _is_var(v)}
    total: list[Operation] = []
    for equation in reversed(jaxpr.eqns):
        wanted = [v in needed for v in equation.outvars]
        if any(wanted) or equation.effects:
            found, inputs = _of_equation(equation, wanted, platform)
            total += found
            needed |= {
                v for v, used in zip(equation.invars, inputs, strict=True) if used and _is_var(v)
            }
    return total, [v in needed for v in jaxpr.invars]


def _is_var(atom) -> bool:
    return not isinstance(atom, core.Literal)


def _of_equation(equation, wanted: list[bool], platform: str) -> tuple[list[Operation], list[bool]]:
    """As `_of_jaxpr`."""
    name, params = equation.primitive.name, equation.params
    everything = [True] * len(equation.invars)
    if name == "dot_general":
        (contracted, _), (batched, _) = params["dimension_numbers"]
        left, right = (v.aval.shape for v in equation.invars)
        terms = math.prod(left[axis] for axis in contracted)
        shared = math.prod(left[axis] for axis in batched)
        columns = math.prod(right) // max(terms * shared, 1)
        flops = 2 * equation.outvars[0].aval.size * terms
        return [Operation(PRODUCT, flops, terms, columns, _bytes(equation))], everything
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        channels = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        taps = kernel.size // channels
        zeros = math.prod(params["lhs_dilation"])
        flops = 2 * equation.outvars[0].aval.size * taps // zeros
        groups = params["feature_group_count"] * params["batch_group_count"]
        moved = _bytes(equation)
        return [Operation(CONVOLUTION, flops, taps, channels // groups, moved)], everything
    jaxprs = list(_jaxprs(params))
    if name == "cond":
        platforms = params.get("branches_platforms")
        if platforms is not None:
            jaxprs = [jaxprs[_branch(platforms, platform)]]
        branches = [_of_jaxpr(jaxpr, wanted, platform) for jaxpr in jaxprs]
        inputs = [any(used) for used in zip(*(used for _, used in branches), strict=True)]
        return max((found for found, _ in branches), key=_flops), [True, *inputs]
    if len(jaxprs) == 1 and name not in ("scan", "while"):
        (jaxpr,) = jaxprs
        if len(jaxpr.invars) == len(everything) and len(jaxpr.outvars) == len(wanted):
            return _of_jaxpr(jaxpr, wanted, platform)
    if kind := _kind(name):
        moved = _bytes(equation)
        if kind == GATHER:  # of a large array only some rows are read, or written
            moved = 2 * _size(
                equation.invars[_CHANGES[name]] if name in _CHANGES else equation.outvars[0]
            )
        return [Operation(kind, 0, 0, 0, moved)], everything
    # Every turn of a loop may need all that the one before left.
    turns = params.get("length", 1) if name == "scan" else 1
    parts = [_of_jaxpr(jaxpr, [True] * len(jaxpr.outvars), platform)[0] for jaxpr in jaxprs]
    return [op._replace(turns=turns * op.turns) for part in parts for op in part], everything


def _kind(name: str) -> str:
    if name.startswith("reduce_") and name != "reduce_precision":
        return REDUCTION
    return GATHER if name in _CHANGES else _KINDS.get(name, "")


def _bytes(equation) -> int:
    return sum(_size(v) for v in (*equation.invars, *equation.outvars))


def _size(atom) -> int:
    dtype = getattr(atom.aval, "dtype", None)
    return atom.aval.size * getattr(dtype, "itemsize", 0)


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
