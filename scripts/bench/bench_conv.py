"""Times our convolutions against torch's: forward, input gradient and kernel gradient.

    python -m scripts.bench.bench_conv
    python -m scripts.bench.bench_conv --shapes=grouped

Needs torch in the same environment. Shapes: the convolutions of R50-FPN and its proposal network,
or the grouped ones of ResNeXt-101 64x4d and 32x8d and of SENet-154, at batch 2 and 512x512,
float32. Each side is a process of its own and they take turns; a column gives the best milliseconds
of both and their ratio (below 1: ours is faster).
"""

import multiprocessing
import time
from collections.abc import Callable

import numpy as np
from absl import flags

from common.io.commands import run_main

_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each side and shape.")
_CALLS = flags.DEFINE_integer("calls", 3, "Timed calls of each computation in a turn.")
_SHAPES = flags.DEFINE_enum("shapes", "r50", ("r50", "grouped"), "Which convolutions.")
_THREADS = flags.DEFINE_integer("threads", 2, "torch threads (JAX takes the cores it may use).")

BATCH = 2
# (input side, input channels, output channels, kernel side, stride)
SHAPES = (
    (512, 3, 64, 7, 2),
    (128, 64, 64, 3, 1),
    (128, 64, 256, 1, 1),
    (128, 256, 64, 1, 1),
    (128, 128, 128, 3, 2),
    (128, 256, 512, 1, 2),
    (64, 128, 128, 3, 1),
    (64, 128, 512, 1, 1),
    (64, 512, 128, 1, 1),
    (64, 256, 256, 3, 2),
    (32, 256, 256, 3, 1),
    (32, 256, 1024, 1, 1),
    (32, 1024, 256, 1, 1),
    (16, 512, 512, 3, 1),
    (16, 512, 2048, 1, 1),
    (16, 2048, 512, 1, 1),
    (128, 256, 256, 3, 1),
    (64, 256, 256, 3, 1),
    (128, 256, 256, 1, 1),
)
# (input side, input channels, output channels, kernel side, stride, groups)
GROUPED_SHAPES = (
    (128, 256, 256, 3, 1, 64),
    (64, 512, 512, 3, 1, 64),
    (32, 1024, 1024, 3, 1, 64),
    (32, 2048, 2048, 3, 2, 64),
    (16, 2048, 2048, 3, 1, 64),
    (128, 256, 256, 3, 1, 32),
    (64, 512, 512, 3, 1, 32),
    (32, 1024, 1024, 3, 1, 32),
    (128, 128, 256, 3, 1, 64),
    (64, 256, 512, 3, 1, 64),
    (32, 512, 1024, 3, 1, 64),
)
PARTS = ("forward", "input gradient", "kernel gradient")


def torch_calls(shape, threads: int) -> list[Callable[[], object]]:
    """One function per part of `PARTS`."""
    import torch

    torch.set_num_threads(threads)
    side, c, d, k, stride, groups = shape
    x, kernel = torch.randn(BATCH, c, side, side), torch.randn(d, c // groups, k, k)
    pads, strides = [k // 2] * 2, [stride] * 2
    options = {"stride": strides, "padding": pads, "groups": groups}
    gradient = torch.randn_like(torch.conv2d(x, kernel, **options))

    def backward(of_x, of_kernel):
        return torch.ops.aten.convolution_backward(
            gradient,
            x,
            kernel,
            None,
            strides,
            pads,
            [1, 1],
            False,
            [0, 0],
            groups,
            [of_x, of_kernel, False],
        )

    return [
        lambda: torch.conv2d(x, kernel, **options),
        lambda: backward(True, False),
        lambda: backward(False, True),
    ]


def our_calls(shape) -> list[Callable[[], object]]:
    """Like `torch_calls`."""
    import jax
    import jax.numpy as jnp

    from common.nn.layers.conv import conv2d

    side, c, d, k, stride, groups = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((BATCH, side, side, c), np.float32))
    kernel = jnp.asarray(rng.standard_normal((k, k, c // groups, d), np.float32))

    def conv(x, kernel):
        return conv2d(x, kernel, (stride, stride), k // 2, groups)

    forward = jax.jit(conv)
    gradient = jnp.ones_like(forward(x, kernel))
    of_x = jax.jit(lambda x, kernel, g: jax.vjp(lambda x: conv(x, kernel), x)[1](g))
    of_kernel = jax.jit(lambda x, kernel, g: jax.vjp(lambda w: conv(x, w), kernel)[1](g))
    return [
        lambda: forward(x, kernel).block_until_ready(),
        lambda: jax.block_until_ready(of_x(x, kernel, gradient)),
        lambda: jax.block_until_ready(of_kernel(x, kernel, gradient)),
    ]


def serve(side: str, pipe, num_calls: int, threads: int) -> None:
    """Runs in a process of its own: answers a shape with the best seconds of each part."""
    from common.io.memory import keep_freed_memory

    keep_freed_memory()  # on both sides: this is about arithmetic
    made = {}
    for shape in iter(pipe.recv, None):
        if shape not in made:
            made = {shape: our_calls(shape) if side == "ours" else torch_calls(shape, threads)}
        best = []
        for call in made[shape]:
            call()
            seconds = []
            for _ in range(num_calls):
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
            best.append(min(seconds))
        pipe.send(best)


def main() -> None:
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for side in ("torch", "ours"):
        pipes[side], theirs = context.Pipe()
        arguments = (side, theirs, _CALLS.value, _THREADS.value)
        context.Process(target=serve, args=arguments, daemon=True).start()
    print(f"{'side C D k stride G':22s}" + "".join(f"{part:>26s}" for part in PARTS))
    total = np.zeros((2, len(PARTS)))
    shapes = [(*shape, 1) for shape in SHAPES] if _SHAPES.value == "r50" else GROUPED_SHAPES
    for shape in shapes:
        best = np.full((2, len(PARTS)), np.inf)
        for _ in range(_ROUNDS.value):
            for row, pipe in zip(best, pipes.values(), strict=True):
                pipe.send(shape)
                np.minimum(row, pipe.recv(), out=row)
        total += best
        print_row(" ".join(map(str, shape)), best)
    print_row("sum", total)
    for pipe in pipes.values():
        pipe.send(None)


def print_row(name: str, seconds: np.ndarray) -> None:
    """One line: torch's and our milliseconds and their ratio for each part."""
    columns = (f"{t * 1e3:9.1f}{o * 1e3:9.1f}{o / t:8.2f}" for t, o in seconds.T)
    print(f"{name:22s}" + "".join(columns), flush=True)


if __name__ == "__main__":
    run_main(main)
