"""How long a training step takes at best, from what the devices compute, move and send.

Each operation takes the longer of two times: its products on the matrix unit, padded to the unit's
sides, and its bytes through the device's memory. Elementwise operations are taken as fused. A run
reaches a part of that; which part, published runs tell (`REACHED`).
"""

import collections
from collections.abc import Iterable

from common.training.pod.flops import CONVOLUTION, PRODUCT, Operation
from common.training.pod.places import Place, Rates

# Shares of this bound that runs reach: least, likely, most. The likely one is that of published
# runs on TPU v3 and v4, see tests/common/training/test_roofline.py.
REACHED = (0.45, 0.6, 0.75)


def merged(found: Iterable[Operation]) -> list[Operation]:
    """Operations of one kind and shape as one, in the order of their kinds."""
    sums: dict[tuple, list[int]] = collections.defaultdict(lambda: [0, 0])
    for op in found:
        entry = sums[op.kind, op.depth, op.width]
        entry[0] += op.flops * op.turns
        entry[1] += op.bytes * op.turns
    return [
        Operation(kind, flops, depth, width, moved)
        for (kind, depth, width), (flops, moved) in sorted(sums.items())
    ]


def seconds(operation: Operation, rates: Rates) -> float:
    """The bound of one operation on one device."""
    memory = operation.bytes / (rates.memory * 1e9)
    if operation.kind not in (CONVOLUTION, PRODUCT):
        return memory * operation.turns
    waste = _padded(operation.depth, rates.unit) * _padded(operation.width, rates.unit)
    return max(operation.flops * waste / (rates.tflops * 1e12), memory) * operation.turns


def _padded(size: int, unit: int) -> float:
    """By how much a side grows to fill the matrix unit."""
    return -(-size // unit) * unit / max(size, 1)


def all_reduce_seconds(size: int, where: Place) -> dict[str, float]:
    """Seconds of a sum of `size` bytes over all devices, by network.

    Within a slice each device sends and receives all but a part twice; between slices each host
    does so with its share.
    """
    rates, result = where.rates, {}
    groups = where.devices // rates.per_host if where.is_gpu else where.slices
    within = where.devices // max(groups, 1)
    if within > 1:
        result["links"] = 2 * size * (within - 1) / within / (rates.links * 1e9)
    if groups > 1:
        share = size / (where.hosts / groups)
        result["network"] = 2 * share * (groups - 1) / groups / (rates.network * 1e9)
    return result


def step_seconds(found: Iterable[Operation], gradient_bytes: int, where: Place) -> dict[str, float]:
    """The bound of a step by kind of operation, and of its sums over devices."""
    result: dict[str, float] = collections.defaultdict(float)
    for operation in found:
        result[operation.kind] += seconds(operation, where.rates)
    for name, value in all_reduce_seconds(gradient_bytes, where).items():
        result[f"sum of gradients over {name}"] = value
    return dict(result)
