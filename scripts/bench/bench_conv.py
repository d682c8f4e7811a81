"""Times the convolutions of `common.nn.xla_cpu` against XLA:CPU's own, whose results they equal.

    python -m scripts.bench.bench_conv

Shapes of ResNet-50, of ResNeXt-101 64x4d and 32x8d and of EfficientNet-B0 at batch 2 and 512x512,
float32: the forward pass, and the gradients of input and kernel together. Prints medians, taken in
turns in one process, and their ratio (below 1: ours is faster).
"""

from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from jax import lax

from common.io.commands import run_main
from common.nn.layers.conv import conv2d
from scripts.bench.timing import compare

BATCH = 2
_LAYOUT = ("NHWC", "HWIO", "NHWC")
# (input side, input channels, output channels, kernel side, stride, groups)
SHAPES = {
    "dense": (
        (512, 3, 64, 7, 2, 1),
        (64, 512, 128, 1, 1, 1),
        (64, 128, 128, 3, 1, 1),
        (64, 256, 256, 3, 2, 1),
    ),
    "grouped": ((32, 1024, 1024, 3, 1, 32), (32, 1024, 1024, 3, 1, 64)),
    "depthwise": ((128, 96, 96, 3, 2, 96), (64, 240, 240, 5, 1, 240)),
}


def define_flags() -> None:
    flags.DEFINE_list("kinds", list(SHAPES), f"Some of {', '.join(SHAPES)}.")
    flags.DEFINE_integer("calls", 5, "Timed calls of each side.")


def forward_and_gradients(conv: Callable, x, kernel) -> tuple[Callable, Callable]:
    """The convolution, and its gradients with respect to `x` and `kernel`, as blocking calls."""
    forward = jax.jit(conv)
    gradient = jax.numpy.ones_like(forward(x, kernel))
    backward = jax.jit(lambda x, kernel, gradient: jax.vjp(conv, x, kernel)[1](gradient))
    return (
        lambda: jax.block_until_ready(forward(x, kernel)),
        lambda: jax.block_until_ready(backward(x, kernel, gradient)),
    )


def main() -> None:
    rng = np.random.default_rng(0)
    for kind in flags.FLAGS.kinds:
        for side, c, d, k, stride, groups in SHAPES[kind]:
            x = jax.device_put(rng.standard_normal((BATCH, side, side, c), np.float32))
            kernel = jax.device_put(rng.standard_normal((k, k, c // groups, d), np.float32))
            strides, pads = (stride, stride), [(k // 2, k // 2)] * 2

            def xla(x, kernel, strides=strides, pads=pads, groups=groups):
                return lax.conv_general_dilated(
                    *(x, kernel, strides, pads),
                    dimension_numbers=_LAYOUT,
                    feature_group_count=groups,
                )

            def ours(x, kernel, strides=strides, k=k, groups=groups):
                return conv2d(x, kernel, strides, k // 2, groups)

            print(f"{kind}: side {side}, {c} -> {d} channels, {k}x{k}, stride {stride}, G {groups}")
            sides = (forward_and_gradients(conv, x, kernel) for conv in (ours, xla))
            for title, mine, theirs in zip(("forward", "gradients"), *sides, strict=True):
                compare(title, {"ours": mine, "XLA:CPU": theirs}, flags.FLAGS.calls)


if __name__ == "__main__":
    define_flags()
    run_main(main)
