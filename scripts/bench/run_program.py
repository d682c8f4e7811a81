"""Runs a program that `scripts.plan_pod --save` compiled, on the devices that it was made for.

    python -m scripts.bench.run_program --program=FILE

On every host of the slice at once (`scripts/launch_pod.sh run scripts.bench.run_program`). Nothing
is traced or compiled, no data is read: all arguments are zeros, so that loops which go on until
nothing changes, such as NMS, have little to do. Prints the time of a step beside what the plan
expected. Loading a file may run code: run only programs that you made.
"""

import time

import jax
import jax.numpy as jnp
from absl import flags

from common.io.commands import run_main
from common.io.errors import UserError
from common.training import command
from common.training.pod.saved import SavedProgram, load_program


def define_flags() -> None:
    flags.DEFINE_string("program", None, "Written by scripts.plan_pod --save.", required=True)
    flags.DEFINE_integer("steps", 10, "That are timed, after one that is not.", lower_bound=1)


def zeros(program: SavedProgram) -> list[jax.Array]:
    """Arguments for a step."""
    return [
        jax.jit(lambda x=x: jnp.zeros(x.shape, x.dtype), out_shardings=x.sharding)()
        for x in program.arguments
    ]


def step_seconds(program: SavedProgram, steps: int) -> float:
    """Of one step, each with the state that the one before left."""
    arguments = zeros(program)
    state = [name.startswith("[0]") for name in program.names]
    others = [x for x, is_state in zip(arguments, state, strict=True) if not is_state]
    left = [x for x, is_state in zip(arguments, state, strict=True) if is_state]
    for number in range(steps + 1):
        if number == 1:
            jax.block_until_ready(left)
            start = time.perf_counter()
        # The state comes first, in the arguments and in the results.
        left = list(program.call(*left, *others))[: len(left)]
    jax.block_until_ready(left)
    return (time.perf_counter() - start) / steps


def main() -> None:
    values = flags.FLAGS
    mesh, say = command.start()
    program = load_program(values.program, list(mesh.devices.flat))
    about = program.about
    if "step_seconds" not in about:
        raise UserError(f"{values.program}: found no plan in it, expected that of plan_pod")
    seconds = step_seconds(program, values.steps)
    low, high = (1000 * expected for expected in about["step_seconds"])
    say(
        f"{about['config']}, {about['images_per_device']} images a device: "
        f"{1000 * seconds:.1f} ms a step, expected {low:.3g} to {high:.3g} ms; "
        f"{about['global_batch'] / seconds:.3g} images/s"
    )


if __name__ == "__main__":
    define_flags()
    run_main(main)
