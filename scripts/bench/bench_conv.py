"""Times the convolutions of `common.nn.xla_cpu` against XLA:CPU's own, whose results they equal.

    python -m scripts.bench.bench_conv [--kinds=dense,depthwise,winograd]

Shapes of ResNet-50, ResNeXt-101 and EfficientNet-B0 at batch 2 and 512x512, and of a mask head for
16 boxes, float32: forward, the gradient of the input and that of the kernel. Prints medians of the
processor time of all threads, taken in turns in one process, and their ratio (below 1: ours is
faster).
"""

import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from jax import lax

from common.io.commands import run_main
from common.nn.layers.conv import conv2d
from common.nn.xla_cpu.winograd import winograd_conv
from scripts.bench.timing import compare

BATCH = {"winograd": 16}  # else 2
_LAYOUT = ("NHWC", "HWIO", "NHWC")
# (input side, input channels, output channels, kernel side, stride, groups)
SHAPES = {
    "dense": (
        (512, 3, 64, 7, 2, 1),
        (64, 512, 128, 1, 1, 1),
        (64, 128, 128, 3, 1, 1),
        (64, 256, 256, 3, 2, 1),
    ),
    "grouped": ((16, 512, 512, 3, 1, 64), (32, 1024, 1024, 3, 1, 32)),
    "winograd": ((14, 256, 256, 3, 1, 1),),
    "depthwise": ((128, 96, 96, 3, 2, 96), (64, 240, 240, 5, 1, 240)),
}


def define_flags() -> None:
    flags.DEFINE_list(
        "kinds",
        ["dense", "depthwise"],
        f"Some of {', '.join(SHAPES)}; XLA:CPU's kernel gradient of grouped ones takes long.",
    )
    flags.DEFINE_integer("calls", 5, "Timed calls of each side.")


def parts(conv: Callable, x, kernel) -> dict[str, Callable[[], object]]:
    """Forward, gradient of `x` and gradient of `kernel`, as blocking calls."""
    gradient = jax.numpy.ones_like(jax.jit(conv)(x, kernel))
    functions = {
        "forward": lambda x, kernel, gradient: conv(x, kernel),
        "input gradient": lambda x, kernel, g: jax.vjp(lambda x: conv(x, kernel), x)[1](g),
        "kernel gradient": lambda x, kernel, g: jax.vjp(lambda k: conv(x, k), kernel)[1](g),
    }

    def call(function):
        compiled = jax.jit(function)
        return lambda: jax.block_until_ready(compiled(x, kernel, gradient))

    return {name: call(function) for name, function in functions.items()}


def main() -> None:
    rng = np.random.default_rng(0)
    for kind in flags.FLAGS.kinds:
        for side, c, d, k, stride, groups in SHAPES[kind]:
            batch = BATCH.get(kind, 2)
            x = jax.device_put(rng.standard_normal((batch, side, side, c), np.float32))
            kernel = jax.device_put(rng.standard_normal((k, k, c // groups, d), np.float32))
            strides, pads = (stride, stride), [(k // 2, k // 2)] * 2

            def xla(x, kernel, strides=strides, pads=pads, groups=groups):
                return lax.conv_general_dilated(
                    *(x, kernel, strides, pads),
                    dimension_numbers=_LAYOUT,
                    feature_group_count=groups,
                )

            def ours(x, kernel, kind=kind, strides=strides, k=k, groups=groups):
                if kind == "winograd":
                    return winograd_conv(x, kernel)
                return conv2d(x, kernel, strides, k // 2, groups)

            print(f"{kind}: side {side}, {c} -> {d} channels, {k}x{k}, stride {stride}, G {groups}")
            own, theirs = parts(ours, x, kernel), parts(xla, x, kernel)
            for name in own:
                sides = {"ours": own[name], "XLA:CPU": theirs[name]}
                compare(name, sides, flags.FLAGS.calls, time.process_time)


if __name__ == "__main__":
    define_flags()
    run_main(main)
